// scale_shift's launch. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/scale_shift/scale_shift.cuh"

namespace fastdiff::cuda {
namespace {

template <class T, int kVec>
int launch(const ScaleShiftParams& p, Stream stream) {
  const int64_t rows = p.batch * p.tokens, threads = (p.dim + kVec - 1) / kVec;
  const dim3 grid(static_cast<unsigned>(rows < max_grid() ? rows : max_grid()));
  const dim3 block(static_cast<unsigned>(threads < kScaleShiftThreads ? threads : kScaleShiftThreads));
  FD_LAUNCH((scale_shift_kernel<T, kVec>), grid, block, 0, stream, p);
  return launch_status();
}

template <class T>
int launch_of(const ScaleShiftParams& p, Stream stream) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  bool aligned = p.dim % kVec == 0;
  for (const void* data : {p.x, p.scale, p.shift, static_cast<const void*>(p.out)}) {
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }
  return aligned ? launch<T, kVec>(p, stream) : launch<T, 1>(p, stream);
}

}  // namespace

int scale_shift(const ScaleShiftParams& p, Stream stream) {
  if (p.batch < 0 || p.tokens < 0 || p.dim < 1) return kInvalidValue;
  if (p.batch * p.tokens == 0) return 0;
  if (!p.x || !p.scale || !p.shift || !p.out) return kInvalidValue;
  if (p.dtype == DType::kFloat32) return launch_of<float>(p, stream);
  if (p.dtype == DType::kBFloat16) return launch_of<__nv_bfloat16>(p, stream);
  if (p.dtype == DType::kFloat16) return launch_of<__half>(p, stream);
  return kInvalidValue;
}

}  // namespace fastdiff::cuda
