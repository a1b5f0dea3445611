// conv_activation as torch operators on CPU tensors: schemas, checks, allocation. Users come through
// fastdiff/ops/conv_activation.py, which checks with kinder messages; these keep a direct call from reading out of bounds.
#include <tuple>

#include "csrc/tensors.h"
#include "kernels/conv_activation/conv_activation.h"

namespace fastdiff::torch_binding {
namespace {

ConvActivationShape shape_of(const Tensor& x, int64_t activation) {
  check_device(x, x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "x does not fit; expected contiguous [B, H, W, C]");
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kSilu), "activation is ",
                  activation, "; expected 0 (gelu), 1 (gelu_tanh) or 2 (silu)");
  ConvActivationShape s{};
  s.batch = x.size(0);
  s.rows = x.size(1);
  s.columns = x.size(2);
  s.dim = x.size(3);
  s.activation = static_cast<Activation>(activation);
  s.dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(s.dtype != DType::kFloat64, "x is float64; expected float32, bfloat16 or float16");
  return s;
}

const float* row_of(const OptionalTensor& t, const Tensor& x, const char* name) {
  return numbers<float>(t, x, x.size(3), name);
}
const float* weights_of(const Tensor& weight, const Tensor& x) {
  check_device(weight, x, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 9 && weight.size(1) == x.size(3) && weight.is_contiguous() &&
                      weight.scalar_type() == ScalarType::Float,
                  "weight does not fit; expected contiguous float32 [9, ", x.size(3), "]");
  return static_cast<const float*>(weight.const_data_ptr());
}

Tensor conv_activation(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor x_bias, int64_t activation) {
  ConvActivationForwardParams p{};
  p.shape = shape_of(x, activation);
  p.weight = weights_of(weight, x);
  p.bias = row_of(bias, x, "bias");
  p.x_bias = row_of(x_bias, x, "x_bias");
  p.x = x.const_data_ptr();
  Tensor out = empty_like_contiguous(x);
  p.out = out.mutable_data_ptr();
  if (x.numel() > 0) cpu::conv_activation_forward(p, {run_on_torch_threads});
  return out;
}

// Gradients of x, and of weight, bias and x_bias as the rows of [11, C]; without a row where they are not wanted.
std::tuple<Tensor, Tensor> conv_activation_backward(Tensor grad_out, Tensor x, Tensor weight, OptionalTensor bias,
                                                    OptionalTensor x_bias, int64_t activation, bool need_parameters) {
  ConvActivationBackwardParams p{};
  p.shape = shape_of(x, activation);
  p.weight = weights_of(weight, x);
  p.bias = row_of(bias, x, "bias");
  p.x_bias = row_of(x_bias, x, "x_bias");
  p.x = x.const_data_ptr();
  check_device(grad_out, x, "grad_out");
  bool fits = grad_out.dim() == 4 && grad_out.is_contiguous() && grad_out.scalar_type() == x.scalar_type();
  for (int64_t i = 0; fits && i < 4; i++) fits = grad_out.size(i) == x.size(i);
  STD_TORCH_CHECK(fits, "grad_out does not fit; expected a contiguous tensor of x's shape and dtype");
  p.grad_out = grad_out.const_data_ptr();
  Tensor grad_x = empty_like_contiguous(x);
  Tensor grads = empty(x, {need_parameters ? kConvSums : 0, p.shape.dim}, ScalarType::Float);
  if (x.numel() == 0) {  // sums over nothing
    torch::stable::zero_(grads);
    return {grad_x, grads};
  }
  p.grad_x = grad_x.mutable_data_ptr();
  const int64_t segments = need_parameters ? conv_activation_segments(p.shape) : 0;
  Tensor workspace = empty(x, {segments, kConvSums, p.shape.dim}, ScalarType::Float);
  if (need_parameters) {
    p.grad_parameters = static_cast<float*>(grads.mutable_data_ptr());
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  }
  cpu::conv_activation_backward(p, {run_on_torch_threads});
  return {grad_x, grads};
}

#define OPERANDS "Tensor x, Tensor weight, Tensor? bias, Tensor? x_bias, int activation"

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("conv_activation(" OPERANDS ") -> Tensor");
  m.def("conv_activation_backward(Tensor grad_out, " OPERANDS ", bool need_parameters) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("conv_activation", TORCH_BOX(&conv_activation));
  m.impl("conv_activation_backward", TORCH_BOX(&conv_activation_backward));
}

}  // namespace
}  // namespace fastdiff::torch_binding
