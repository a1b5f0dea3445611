// What every operator's binding needs of a tensor: its element type, a new one, and checks that end in one line.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <limits>
#include <optional>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

namespace fastdiff::torch_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " has an unsupported dtype; expected float32, bfloat16 or float16");
      return DType::kFloat32;
  }
}
inline DType dtype_of(const Tensor& t, const char* name) { return dtype_of(t.scalar_type(), name); }

// The threads that CPU kernels get: torch's pool.
inline void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, cpu::ParallelFor::Body body,
                                 const void* closure) {
  torch::stable::parallel_for(begin, end, grain, [=](int64_t b, int64_t e) { body(closure, b, e); });
}

// The type of statistics and affine parameters.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Set by the tests (FASTDIFF_POISON_EMPTY=1): new tensors are filled with NaN (-2^62), so that forgotten outputs show.
inline bool poison_empty() {
  static const bool poison = [] {
    const char* value = std::getenv("FASTDIFF_POISON_EMPTY");
    return value != nullptr && *value == '1';
  }();
  return poison;
}

// A new contiguous tensor on like's device. The C shim is called directly: the dispatcher costs a microsecond more.
template <int kDims>
Tensor empty(const Tensor& like, const int64_t (&sizes)[kDims], ScalarType type) {
  int64_t strides[kDims], stride = 1;
  for (int i = kDims - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(kDims, sizes, strides, dtype, device_type, device_index, &handle));
  Tensor result(handle);
  if (poison_empty())
    torch::stable::fill_(result, type == ScalarType::Long ? -0x1p62 : std::numeric_limits<double>::quiet_NaN());
  return result;
}

inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  int32_t type, like;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &like));
  STD_TORCH_CHECK(type == like && t.get_device_index() == x.get_device_index(), name, " is not on x's device");
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.dim() == 3 && t.is_contiguous() && t.size(0) == x.size(0) && t.size(1) == x.size(1) &&
                      t.size(2) == x.size(2),
                  name, " does not fit; expected a contiguous tensor of x's shape [", x.size(0), ", ", x.size(1), ", ",
                  x.size(2), "]");
}

}  // namespace fastdiff::torch_binding
