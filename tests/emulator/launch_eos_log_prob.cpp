// eos_log_prob's launch functions, as Python calls them.
#include "launch.h"

#include "head_product.h"
#include "kernels/eos_log_prob/eos_log_prob_cuda.h"

using cuda_on_cpu::guarded;

extern "C" {

long fd_size_of_eos_log_prob_params() { return sizeof(fastdiff::EosLogProbParams); }
long fd_eos_log_prob_workspace_bytes(const fastdiff::EosLogProbParams* p) {
  return fastdiff::cuda::eos_log_prob_workspace_bytes(*p);
}

int fd_eos_log_prob_from_logits(const fastdiff::EosLogProbParams* p) {
  return guarded([&] { return fastdiff::cuda::eos_log_prob_from_logits(*p, nullptr); });
}

// `tile`: [rows, tile_size] of the operands' dtype
int fd_eos_log_prob(const fastdiff::EosLogProbParams* p, const void* hidden, const void* weight, const void* bias,
                    long weight_stride, long dim, void* tile, long tile_size) {
  cuda_on_cpu::HeadOperands h{hidden, weight, bias, weight_stride, dim, p->dtype};
  return guarded([&] {
    return fastdiff::cuda::eos_log_prob(*p, {tile, tile_size}, nullptr, {cuda_on_cpu::run_head_product, &h});
  });
}

}  // extern "C"
