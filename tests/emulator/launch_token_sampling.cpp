// Token sampling's launch functions, and the choice of a weight by itself, as Python calls them.
#include "launch.h"

#include "head_product.h"
#include "kernels/token_sampling/sampling_warp.cuh"
#include "kernels/token_sampling/token_sampling_cuda.h"

using cuda_on_cpu::guarded;

namespace {

struct Chosen {
  int64_t index;
  double before, weight;
};

__global__ void choose_kernel(const double* weights, int64_t count, double u, Chosen* chosen) {
  const auto choice = fastdiff::cuda::sampling::choose<double>(
      count, [&](double all) { return u * all; }, [&](int64_t i) { return weights[i]; });
  chosen[threadIdx.x] = {choice.index, choice.before, choice.weight};
}

}  // namespace

extern "C" {

long fd_size_of_token_sample_params() { return sizeof(fastdiff::TokenSampleParams); }
long fd_size_of_lm_head_sample_params() { return sizeof(fastdiff::LmHeadSampleParams); }
long fd_sample_tokens_workspace_bytes(const fastdiff::TokenSampleParams* p) {
  return fastdiff::cuda::sample_tokens_workspace_bytes(*p);
}
long fd_lm_head_sample_workspace_bytes(const fastdiff::LmHeadSampleParams* p) {
  return fastdiff::cuda::lm_head_sample_workspace_bytes(*p);
}

int fd_sample_tokens(const fastdiff::TokenSampleParams* p) {
  return guarded([&] { return fastdiff::cuda::sample_tokens(*p, nullptr); });
}
int fd_lm_head_sample(fastdiff::LmHeadSampleParams* p) {
  cuda_on_cpu::HeadOperands h{p->hidden, p->weight, p->bias, p->weight_stride, p->dim, p->sample.dtype};
  return guarded([&] { return fastdiff::cuda::lm_head_sample(*p, nullptr, {cuda_on_cpu::run_head_product, &h}); });
}

// `chosen` [32]: what every lane got
int fd_choose(const double* weights, long count, double u, Chosen* chosen) {
  return guarded([&] {
    const fastdiff::cuda::Stream stream = nullptr;
    FD_LAUNCH(choose_kernel, dim3(1), dim3(32), 0, stream, weights, static_cast<int64_t>(count), u, chosen);
    return 0;
  });
}

}  // extern "C"
