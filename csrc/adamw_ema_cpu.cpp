// AdamW with a moving average, and the norm of all gradients, as torch operators on lists of CPU tensors.
// fastdiff/ops/adamw_ema.py calls them; the checks here keep a direct call from reading out of bounds.
#include <algorithm>
#include <cmath>
#include <vector>

#include "csrc/tensors.h"
#include "kernels/adamw_ema/adamw_ema.h"

namespace fastdiff::torch_binding {
namespace {

using Tensors = std::vector<Tensor>;

void check_like(const Tensor& t, const Tensor& like, const char* name) {
  check_device(t, like, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == like.numel(), name,
                  " do not fit; expected contiguous float32 tensors of the parameters' sizes");
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor gradient_norm(Tensors grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads is empty; expected at least one tensor");
  std::vector<const float*> data;
  std::vector<int64_t> size;
  for (const Tensor& grad : grads) {
    check_like(grad, grad, "grads");
    STD_TORCH_CHECK(on_cpu(grad), "grads are not on the CPU");
    const float* const begin = static_cast<const float*>(grad.const_data_ptr());
    for (int64_t i = 0; i < grad.numel(); i += kAdamWPiece) {
      data.push_back(begin + i);
      size.push_back(std::min(kAdamWPiece, grad.numel() - i));
    }
  }
  std::vector<double> sums(data.size());
  cpu::sums_of_squares(data.data(), size.data(), static_cast<int64_t>(data.size()), sums.data(),
                       {run_on_torch_threads});
  double total = 0;
  for (const double sum : sums) total += sum;
  Tensor norm = empty(grads[0], {1}, ScalarType::Float);
  *floats(norm) = static_cast<float>(std::sqrt(total));
  return norm;
}

void adamw_ema(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors averages,
               double lr, double beta1, double beta2, double eps, double weight_decay, double grad_scale,
               double average_weight) {
  const size_t count = params.size();
  for (const Tensors* list : {&grads, &exp_avgs, &exp_avg_sqs, &steps, &averages})
    STD_TORCH_CHECK(list->size() == count, "lists of different lengths; expected one tensor a parameter in each");
  for (size_t k = 0; k < count; k++) {
    check_like(params[k], params[k], "params");
    STD_TORCH_CHECK(on_cpu(params[k]), "params are not on the CPU");
    check_like(grads[k], params[k], "grads");
    check_like(exp_avgs[k], params[k], "exp_avgs");
    check_like(exp_avg_sqs[k], params[k], "exp_avg_sqs");
    check_like(averages[k], params[k], "averages");
    check_device(steps[k], params[k], "steps");
    STD_TORCH_CHECK(steps[k].scalar_type() == ScalarType::Float && steps[k].numel() == 1,
                    "steps do not fit; expected one float32 number a parameter");
  }
  std::vector<AdamWPiece> pieces;
  for (size_t k = 0; k < count; k++) {
    const double step = *floats(steps[k]) += 1;
    const float step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
    const float deviation = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
    const float* const grad = static_cast<const float*>(grads[k].const_data_ptr());
    for (int64_t i = 0; i < params[k].numel(); i += kAdamWPiece)
      pieces.push_back({floats(params[k]) + i, grad + i, floats(exp_avgs[k]) + i, floats(exp_avg_sqs[k]) + i,
                        floats(averages[k]) + i, std::min(kAdamWPiece, params[k].numel() - i), step_size, deviation});
  }
  AdamWParams p{};
  p.pieces = pieces.data();
  p.count = static_cast<int64_t>(pieces.size());
  p.grad_scale = static_cast<float>(grad_scale);
  p.keep = static_cast<float>(1 - lr * weight_decay);
  p.beta2 = static_cast<float>(beta2);
  p.eps = static_cast<float>(eps);
  p.grad_weight = static_cast<float>(1 - beta1);
  p.square_weight = static_cast<float>(1 - beta2);
  p.average_weight = static_cast<float>(average_weight);
  cpu::adamw_ema(p, {run_on_torch_threads});
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("gradient_norm(Tensor[] grads) -> Tensor");
  m.def("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, Tensor(e!)[] averages, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "float grad_scale, float average_weight) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("gradient_norm", TORCH_BOX(&gradient_norm));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema));
}

}  // namespace
}  // namespace fastdiff::torch_binding
