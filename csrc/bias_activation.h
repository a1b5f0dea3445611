// bias_activation as torch operators, for any backend: checks, allocation, and the parameters of the launch functions.
// fastdiff/ops/bias_activation.py checks with kinder messages; these keep a direct call from reading out of bounds.
#pragma once
#include <initializer_list>
#include <tuple>

#include "csrc/tensors.h"
#include "kernels/bias_activation/bias_activation.h"

namespace fastdiff::torch_binding {

struct BiasActivationOperands {
  const Tensor& x;
  const OptionalTensor &bias, &up, &up_bias;
  int64_t activation;
};

inline void check_same_shape(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  bool fits = t.dim() == x.dim() && t.is_contiguous() && t.scalar_type() == x.scalar_type();
  for (int64_t i = 0; fits && i < x.dim(); i++) fits = t.size(i) == x.size(i);
  STD_TORCH_CHECK(fits, name, " does not fit; expected a contiguous tensor of x's shape and dtype");
}

inline const void* bias_row(const OptionalTensor& t, const Tensor& x, const char* name) {
  if (!t) return nullptr;
  check_device(*t, x, name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(x.dim() - 1) && t->is_contiguous() &&
                      t->scalar_type() == compute_type(x),
                  name, " does not fit; expected contiguous [", x.size(x.dim() - 1), "] in float32, float64 where x is");
  return t->const_data_ptr();
}

// What forward and backward parameters have in common.
template <class Params>
Params bias_activation_params(const BiasActivationOperands& a) {
  check_aligned(a.x, "x");
  STD_TORCH_CHECK(a.x.dim() >= 1 && a.x.is_contiguous(), "x does not fit; expected contiguous [..., D]");
  STD_TORCH_CHECK(a.activation >= 0 && a.activation <= static_cast<int64_t>(Activation::kSilu), "activation is ",
                  a.activation, "; expected 0 (gelu), 1 (gelu_tanh) or 2 (silu)");
  STD_TORCH_CHECK(a.up || !a.up_bias, "up_bias goes with up; expected both or neither");
  Params p{};
  p.x = a.x.const_data_ptr();
  p.dtype = dtype_of(a.x, "x");
  p.bias = bias_row(a.bias, a.x, "bias");
  if (a.up) {
    check_same_shape(*a.up, a.x, "up");
    p.up = a.up->const_data_ptr();
    p.up_bias = bias_row(a.up_bias, a.x, "up_bias");
  }
  p.dim = a.x.size(a.x.dim() - 1);
  p.rows = p.dim > 0 ? a.x.numel() / p.dim : 0;
  p.activation = static_cast<Activation>(a.activation);
  return p;
}

template <class Backend>
Tensor bias_activation(Tensor x, OptionalTensor bias, OptionalTensor up, OptionalTensor up_bias, int64_t activation) {
  auto p = bias_activation_params<BiasActivationParams>({x, bias, up, up_bias, activation});
  Tensor out = empty_like_contiguous(x);
  p.out = out.mutable_data_ptr();
  if (p.rows > 0) Backend::forward(p, x);
  return out;
}

template <class Backend>
void bias_activation_out(Tensor x, OptionalTensor bias, OptionalTensor up, OptionalTensor up_bias, int64_t activation,
                         Tensor out) {
  auto p = bias_activation_params<BiasActivationParams>({x, bias, up, up_bias, activation});
  check_same_shape(out, x, "out");
  for (const Tensor* t : {static_cast<const Tensor*>(&x), up ? static_cast<const Tensor*>(&*up) : nullptr})  // itself
    if (t && t->const_data_ptr() != out.const_data_ptr()) check_apart(out, "out", *t, "an operand");
  check_apart(out, "out", bias, "bias");
  check_apart(out, "out", up_bias, "up_bias");
  p.out = out.mutable_data_ptr();
  if (p.rows > 0) Backend::forward(p, x);
}

// Gradients of x, up, bias and up_bias; what is absent or not wanted has no element.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> bias_activation_backward(Tensor grad_out, Tensor x, OptionalTensor bias,
                                                                    OptionalTensor up, OptionalTensor up_bias,
                                                                    int64_t activation, bool need_bias) {
  auto p = bias_activation_params<BiasActivationBackwardParams>({x, bias, up, up_bias, activation});
  check_same_shape(grad_out, x, "grad_out");
  Tensor grad_x = empty_like_contiguous(x);
  Tensor grad_up = up ? empty_like_contiguous(x) : empty(x, {0}, x.scalar_type());
  Tensor grad_bias = empty(x, {bias && need_bias ? p.dim : 0}, compute_type(x));
  Tensor grad_up_bias = empty(x, {up_bias && need_bias ? p.dim : 0}, compute_type(x));
  if (p.rows == 0) {  // sums over no rows
    torch::stable::zero_(grad_bias);
    torch::stable::zero_(grad_up_bias);
    return {grad_x, grad_up, grad_bias, grad_up_bias};
  }
  p.grad_out = grad_out.const_data_ptr();
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_up = up ? grad_up.mutable_data_ptr() : nullptr;
  p.grad_bias = bias && need_bias ? grad_bias.mutable_data_ptr() : nullptr;
  p.grad_up_bias = up_bias && need_bias ? grad_up_bias.mutable_data_ptr() : nullptr;
  p.rows_per_segment = Backend::rows_per_segment(p);
  const int64_t bytes = bias_activation_workspace_bytes(p);
  Tensor workspace = empty(x, {bytes / dtype_size(DType::kFloat32)}, ScalarType::Float);
  p.workspace = workspace.mutable_data_ptr();
  Backend::backward(p, x);
  return {grad_x, grad_up, grad_bias, grad_up_bias};
}

template <class Backend>
void register_bias_activation(torch::stable::detail::StableLibrary& m) {
  m.impl("bias_activation", TORCH_BOX(&bias_activation<Backend>));
  m.impl("bias_activation_out", TORCH_BOX(&bias_activation_out<Backend>));
  m.impl("bias_activation_backward", TORCH_BOX(&bias_activation_backward<Backend>));
}

}  // namespace fastdiff::torch_binding
