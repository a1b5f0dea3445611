// The launch of the row kernel. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy_cuda.h"

#include "kernels/masked_linear_cross_entropy/masked_linear_cross_entropy.cuh"

namespace fastdiff::cuda {
namespace {

template <class T>
int launch(const CrossEntropyParams& p, Stream stream) {
  // every thread should have a vector or two; short rows need fewer threads
  int64_t threads = (p.vocab / (2 * RowChunks<T>::kVec) + kWarp - 1) / kWarp * kWarp;
  threads = threads < kWarp ? kWarp : threads > kLossThreads ? kLossThreads : threads;
  const int64_t blocks = p.rows < max_grid() ? p.rows : max_grid();
  FD_LAUNCH((cross_entropy_kernel<T>), dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), 0, stream, p);
  return launch_status();
}

}  // namespace

int cross_entropy(const CrossEntropyParams& p, Stream stream) {
  if (p.rows == 0) return 0;
  if (p.rows < 0 || p.vocab < 1 || p.vocab > 2147483647 || !p.logits || !p.targets || !p.row_loss) return kInvalidValue;
  if (p.suppress_count < 0 || p.suppress_count >= p.vocab || (p.suppress_count > 0 && !p.suppress)) return kInvalidValue;
  if (p.dtype == DType::kFloat32) return launch<float>(p, stream);
  if (p.dtype == DType::kBFloat16) return launch<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kFloat16) return launch<__half>(p, stream);
  return kInvalidValue;
}

}  // namespace fastdiff::cuda
