// What every operator's binding needs of a tensor: its element type, a new one, and checks that end in one line.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernels/common/dtype.h"
#include "kernels/common/parallel_for.h"

// In torch since 2.13, null in older ones: what went wrong in the call that failed last.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastdiff::torch_binding {

// A call of torch's C shim, which returns 0 or has failed; torch's own macros drop its message for targets before 2.13.
#define FASTDIFF_TORCH_CALL(call)                                                                             \
  STD_TORCH_CHECK((call) == 0, torch_exception_get_what_without_backtrace != nullptr                          \
                                   ? torch_exception_get_what_without_backtrace()                             \
                                   : "torch refused a call that fastdiff made and printed why",               \
                  " (" #call ")")

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
inline Tensor empty(const Tensor& like, int64_t dims, const int64_t* sizes, ScalarType type) {
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type, device_index;
  FASTDIFF_TORCH_CALL(aoti_torch_get_device_type(like.get(), &device_type));
  FASTDIFF_TORCH_CALL(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  FASTDIFF_TORCH_CALL(
      aoti_torch_empty_strided(dims, sizes, strides.data(), dtype, device_type, device_index, &handle));
  Tensor result(handle);
  if (poison_empty())
    torch::stable::fill_(result, type == ScalarType::Long ? -0x1p62 : std::numeric_limits<double>::quiet_NaN());
  return result;
}
template <int kDims>
Tensor empty(const Tensor& like, const int64_t (&sizes)[kDims], ScalarType type) {
  return empty(like, kDims, sizes, type);
}
inline Tensor empty_like_contiguous(const Tensor& x) {  // its shape and dtype
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); i++) sizes[i] = x.size(i);
  return empty(x, x.dim(), sizes.data(), x.scalar_type());
}

// Views of bytes can begin anywhere; the kernels' elements cannot.
inline void check_aligned(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined(), name, " is None; expected a tensor");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(t.element_size()) == 0, name,
                  " begins between two elements of its dtype; expected an aligned tensor: pass a clone");
}

// Every operand comes through here once.
inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  int32_t type, like;
  // torch takes None for any tensor of a schema
  STD_TORCH_CHECK(t.defined() && x.defined(), t.defined() ? "an operand" : name, " is None; expected a tensor");
  FASTDIFF_TORCH_CALL(aoti_torch_get_device_type(t.get(), &type));
  FASTDIFF_TORCH_CALL(aoti_torch_get_device_type(x.get(), &like));
  STD_TORCH_CHECK(type == like && t.get_device_index() == x.get_device_index(), name, " is not on x's device");
  check_aligned(t, name);
}

// The bytes from a tensor's first element to its last; none where it has no element.
struct Span {
  uintptr_t begin, end;
};
inline Span span_of(const Tensor& t) {
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * t.element_size())};
}

// What is written lies apart from what is read: otherwise results depend on the order of the threads.
inline void check_apart(const Tensor& written, const char* name, const Tensor& read, const char* other) {
  check_device(read, written, other);
  const Span a = span_of(written), b = span_of(read);
  STD_TORCH_CHECK(a.begin >= b.end || b.begin >= a.end, name, " overlaps ", other, "; expected memory of its own");
}
inline void check_apart(const Tensor& written, const char* name, const OptionalTensor& read, const char* other) {
  if (read) check_apart(written, name, *read, other);
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.dim() == 3 && t.is_contiguous() && t.size(0) == x.size(0) && t.size(1) == x.size(1) &&
                      t.size(2) == x.size(2),
                  name, " does not fit; expected a contiguous tensor of x's shape [", x.size(0), ", ", x.size(1), ", ",
                  x.size(2), "]");
}

template <class T>
const T* numbers(const OptionalTensor& t, const Tensor& like, int64_t count, const char* name) {
  if (!t) return nullptr;
  check_device(*t, like, name);
  const ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Long;
  STD_TORCH_CHECK(t->is_contiguous() && (count < 0 || t->numel() == count) && t->scalar_type() == type, name,
                  " does not fit; expected contiguous ", std::is_same_v<T, float> ? "float32" : "int64",
                  count < 0 ? "" : " of the number of rows");
  return static_cast<const T*>(t->const_data_ptr());
}

inline bool on_cpu(const Tensor& t) {
  int32_t type;
  FASTDIFF_TORCH_CALL(aoti_torch_get_device_type(t.get(), &type));
  return type == aoti_torch_device_type_cpu();
}

// Ids that are used as indices. Their values are looked at on the CPU alone: on a GPU that would wait for it.
inline const int64_t* ids(const OptionalTensor& t, const Tensor& like, int64_t vocab, const char* name) {
  const int64_t* values = numbers<int64_t>(t, like, -1, name);
  if (values == nullptr || !on_cpu(like)) return values;
  for (int64_t i = 0; i < t->numel(); i++)
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < vocab && (i == 0 || values[i] > values[i - 1]), name,
                    " does not fit; expected ascending ids below ", vocab);
  return values;
}

}  // namespace fastdiff::torch_binding
