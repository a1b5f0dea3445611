// bias_activation's launches. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/bias_activation/bias_activation.cuh"

#include <initializer_list>

namespace fastdiff::cuda {
namespace {

constexpr int64_t kForwardRows = 4 * kRowsAtOnce;  // a block's, so that the bias is loaded once for four rows

dim3 grid_of(int64_t items) { return dim3(static_cast<unsigned>(items < max_grid() ? items : max_grid())); }

int64_t items_of(int64_t rows, int64_t dim, int64_t rows_per_segment, int vec) {
  return ((rows + rows_per_segment - 1) / rows_per_segment) * ((dim + kLanes * vec - 1) / (kLanes * vec));
}

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

// Calls f(T{}, Count{}) with the dtype's type, and whole vectors where every row is aligned to them.
template <class T, class F>
int with_vector(int64_t dim, std::initializer_list<const void*> operands, const F& f) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  bool aligned = dim % kVec == 0;
  for (const void* data : operands) aligned = aligned && reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  return aligned ? f(T{}, Count<kVec>{}) : f(T{}, Count<1>{});
}
template <class F>
int with_dtype(DType dtype, int64_t dim, std::initializer_list<const void*> operands, const F& f) {
  if (dtype == DType::kFloat32) return with_vector<float>(dim, operands, f);
  if (dtype == DType::kBFloat16) return with_vector<__nv_bfloat16>(dim, operands, f);
  return with_vector<__half>(dim, operands, f);
}

template <class Params>
bool accepted(const Params& p) {
  const bool known = p.activation >= Activation::kGelu && p.activation <= Activation::kSilu;
  const bool dtype = p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return p.rows >= 0 && p.dim >= 1 && known && dtype;
}

}  // namespace

int bias_activation(const BiasActivationParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (p.rows == 0) return 0;
  if (!p.x || !p.out || (p.up_bias && !p.up)) return kInvalidValue;
  return with_dtype(p.dtype, p.dim, {p.x, p.bias, p.up, p.up_bias, p.out}, [&](auto type, auto vector) {
    using T = decltype(type);
    constexpr int kVec = decltype(vector)::value;
    const int64_t items = items_of(p.rows, p.dim, kForwardRows, kVec);
    FD_LAUNCH((bias_activation_kernel<T, kVec>), grid_of(items), dim3(kLanes, kRowsAtOnce), 0, stream, p, items,
              kForwardRows);
    return launch_status();
  });
}

int bias_activation_backward(const BiasActivationBackwardParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (p.rows == 0) return 0;
  if (!p.x || !p.grad_out || !p.grad_x || (p.up && !p.grad_up)) return kInvalidValue;
  if (!p.up && (p.up_bias || p.grad_up_bias)) return kInvalidValue;
  const bool sums = p.grad_bias || p.grad_up_bias;
  if (p.rows_per_segment < 1 || (sums && !p.workspace)) return kInvalidValue;
  BiasActivationBackwardParams q = p;
  if (!sums) q.workspace = nullptr;
  const int status = with_dtype(
      q.dtype, q.dim, {q.grad_out, q.x, q.bias, q.up, q.up_bias, q.grad_x, q.grad_up, q.workspace},
      [&](auto type, auto vector) {
        using T = decltype(type);
        constexpr int kVec = decltype(vector)::value;
        const int64_t items = items_of(q.rows, q.dim, q.rows_per_segment, kVec);
        FD_LAUNCH((bias_activation_backward_kernel<T, kVec>), grid_of(items), dim3(kLanes, kRowsAtOnce), 0, stream, q,
                  items);
        return launch_status();
      });
  if (status || !sums) return status;
  const int64_t columns = (q.up ? 2 : 1) * q.dim;
  FD_LAUNCH(bias_activation_sums_kernel, grid_of((columns + kSumColumns - 1) / kSumColumns),
            dim3(kSumColumns, kSumSlices), 0, stream, q, bias_activation_segments(q));
  return launch_status();
}

}  // namespace fastdiff::cuda
