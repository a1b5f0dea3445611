// Which AdaLN kernel a launch takes, and its grid. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/adaln/adaln_cuda.h"

#include <cstdint>

#include "kernels/adaln/adaln.cuh"
#include "kernels/adaln/adaln_backward.cuh"

namespace fastdiff::cuda {
namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_device_dtype(DType t) { return t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16; }

// Whether every access of `vec` elements is aligned, given that it starts at a multiple of `vec` elements in its row.
class VectorCheck {
 public:
  VectorCheck(int vec, int64_t dim) : vec_(vec), fits_(dim % vec == 0) {}
  VectorCheck& rows(const void* data, DType dtype) {  // rows of `dim` elements, or one row
    const int64_t access = access_bytes(dtype);
    fits_ = fits_ && reinterpret_cast<uintptr_t>(data) % access == 0;
    return *this;
  }
  VectorCheck& modulation(const Modulation& m) {
    if (!m.data) return *this;
    const int64_t access = access_bytes(m.dtype), element = dtype_size(m.dtype);
    fits_ = fits_ && m.batch_stride * element % access == 0 && m.frame_stride * element % access == 0;
    return rows(m.data, m.dtype);
  }
  bool fits() const { return fits_; }

 private:
  int64_t access_bytes(DType dtype) const {
    const int64_t bytes = vec_ * dtype_size(dtype);
    return bytes < kVectorBytes ? bytes : kVectorBytes;
  }
  int vec_;
  bool fits_;
};

bool accepted(const Modulation& m, bool required) {
  return m.data ? is_device_dtype(m.dtype) && m.tokens_per_frame >= 1 : !required;
}

// Threads in x so that each holds `held` elements, rows in y to make small rows fill a block.
dim3 block_of(int64_t dim, int held, int64_t max_threads, int64_t rows, int64_t wanted_threads) {
  int64_t x = round_up(round_up(dim, held), kWarp) * kWarp;
  if (x > max_threads) x = max_threads;
  int64_t y = wanted_threads / x;
  if (y > rows) y = rows;
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y < 1 ? 1 : y), 1);
}

dim3 grid_of(int64_t work, int64_t per_block) {
  const int64_t blocks = round_up(work, per_block);
  return dim3(static_cast<unsigned>(blocks < max_grid() ? blocks : max_grid()), 1, 1);
}

// ---------------------------------------------------------------------------------------------------------- forward

template <class X, int kVec, int kHeld>
int launch_forward(const AdaLNForwardParams& p, Stream stream) {
  constexpr int kChunks = kHeld / kVec;
  const int64_t rows = p.batch * p.tokens;
  const dim3 block = block_of(p.dim, kHeld ? kHeld : 4 * kVec, max_threads(kVec, kChunks), rows, 128);
  FD_LAUNCH((adaln_forward_kernel<X, kVec, kChunks>), grid_of(rows, block.y), block, 0, stream, p);
  return launch_status();
}

template <class X>
int forward_of(const AdaLNForwardParams& p, Stream stream) {
  constexpr int kVec = kVectorBytes / sizeof(X);
  VectorCheck check(kVec, p.dim);
  check.rows(p.x, p.x_dtype).rows(p.out, p.out_dtype).modulation(p.shift).modulation(p.scale);
  check.rows(p.weight, DType::kFloat32).rows(p.bias, DType::kFloat32);
  if (p.branch) check.rows(p.branch, p.branch_dtype).rows(p.residual_out, p.x_dtype).modulation(p.gate);
  if (!check.fits()) return launch_forward<X, 1, kStreamed>(p, stream);
  if (p.dim <= kSmallHeld * 256) return launch_forward<X, kVec, kSmallHeld>(p, stream);
  if (p.dim <= kLargeHeld * 384) return launch_forward<X, kVec, kLargeHeld>(p, stream);
  return launch_forward<X, kVec, kStreamed>(p, stream);
}

bool accepted(const AdaLNForwardParams& p) {
  const bool gated = p.branch != nullptr;
  return p.dim >= 1 && p.batch >= 0 && p.tokens >= 0 && is_device_dtype(p.x_dtype) && is_device_dtype(p.out_dtype) &&
         (!gated || is_device_dtype(p.branch_dtype)) && accepted(p.gate, gated) && accepted(p.shift, false) &&
         accepted(p.scale, false);
}

// --------------------------------------------------------------------------------------------------------- backward

template <class X, int kVec, int kHeld>
int launch_rows(const AdaLNBackwardParams& p, int64_t segments, Stream stream) {
  constexpr int kChunks = kHeld / kVec;
  constexpr int kThreads = max_threads(kVec, kChunks);
  // Streamed rows add to the workspace one after the other, so that a block has one row at a time.
  const int64_t rows = kChunks == kStreamed ? 1 : p.rows_per_segment;
  const dim3 block = block_of(p.dim, kHeld ? kHeld : 4 * kVec, kThreads, rows, kThreads);
  const size_t tile = p.workspace ? (block.y - 1) * block.x * kHeld * sizeof(float) : 0;
  FD_LAUNCH((adaln_backward_rows_kernel<X, kVec, kChunks>), grid_of(segments, 1), block, tile, stream, p, segments);
  return launch_status();
}

template <class X>
int rows_of(const AdaLNBackwardParams& p, int64_t segments, Stream stream) {
  constexpr int kVec = kVectorBytes / sizeof(X);
  VectorCheck check(kVec, p.dim);
  check.rows(p.x, p.x_dtype).rows(p.grad_x, p.x_dtype).rows(p.grad_out, p.out_dtype).modulation(p.scale);
  check.rows(p.weight, DType::kFloat32).rows(p.workspace, DType::kFloat32);
  check.rows(p.grad_residual_out, p.x_dtype);
  if (p.branch) check.rows(p.branch, p.branch_dtype).rows(p.grad_branch, p.branch_dtype).modulation(p.gate);
  check.rows(p.residual_in, p.x_dtype);
  if (!check.fits()) return launch_rows<X, 1, kStreamed>(p, segments, stream);
  if (p.dim <= kSmallHeld * 256) return launch_rows<X, kVec, kSmallHeld>(p, segments, stream);
  if (p.dim <= kLargeHeld * 384 && !p.residual_in) return launch_rows<X, kVec, kLargeHeld>(p, segments, stream);
  return launch_rows<X, kVec, kStreamed>(p, segments, stream);
}

// The second step: what the segments left in the workspace, added in order.
int launch_sums(const AdaLNBackwardParams& p, int64_t segments, Stream stream) {
  int status = 0;
  if (segments && (p.grad_gate || p.grad_shift || p.grad_scale)) {
    const int64_t per_frame = segments_per_frame(p), frames = segments / per_frame;
    const dim3 block(kFrameThreads, static_cast<unsigned>(per_frame < kFrameSlices ? per_frame : kFrameSlices), 1);
    const dim3 grid = grid_of(frames * round_up(p.dim, kFrameThreads), 1);
    FD_LAUNCH(adaln_backward_frames_kernel, grid, block, 0, stream, p, frames);
    status = launch_status();
  }
  if (status == 0 && (p.grad_weight || p.grad_bias)) {
    const dim3 grid = grid_of(p.dim, kWeightThreads), block(kWeightThreads, kWeightSlices, 1);
    FD_LAUNCH(adaln_backward_weights_kernel, grid, block, 0, stream, p, segments);
    status = launch_status();
  }
  return status;
}

bool accepted(const AdaLNBackwardParams& p) {
  const bool gated = p.branch != nullptr;
  const bool dtypes = is_device_dtype(p.x_dtype) && is_device_dtype(p.out_dtype) &&
                      (!gated || is_device_dtype(p.branch_dtype)) &&
                      (!p.grad_gate || is_device_dtype(p.grad_gate_dtype)) &&
                      (!p.grad_shift || is_device_dtype(p.grad_shift_dtype)) &&
                      (!p.grad_scale || is_device_dtype(p.grad_scale_dtype));
  return dtypes && p.dim >= 1 && p.batch >= 0 && p.tokens >= 0 && accepted(p.gate, gated) && accepted(p.scale, false) &&
         (!p.residual_in || (gated && p.x_dtype == DType::kFloat16));
}

}  // namespace

int adaln_forward(const AdaLNForwardParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (p.batch * p.tokens == 0) return 0;
  if (!p.x || !p.out || (p.branch && !p.residual_out)) return kInvalidValue;
  if (p.x_dtype == DType::kFloat32) return forward_of<float>(p, stream);
  if (p.x_dtype == DType::kBFloat16) return forward_of<__nv_bfloat16>(p, stream);
  return forward_of<__half>(p, stream);
}

int adaln_backward(const AdaLNBackwardParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (p.batch * p.tokens == 0) return launch_sums(p, 0, stream);
  const bool layer_saved = p.rstd && (p.rms || p.mean);
  if (!p.x || !p.grad_out || !p.grad_x || !layer_saved || (p.branch && !p.grad_branch)) return kInvalidValue;
  if (p.grad_tokens_per_frame < 1 || p.rows_per_segment < 1 || p.tokens % p.grad_tokens_per_frame != 0) {
    return kInvalidValue;
  }
  if (!p.workspace && adaln_backward_workspace_bytes(p) > 0) return kInvalidValue;
  const int64_t segments = adaln_backward_segments(p);
  int status = 0;
  if (p.x_dtype == DType::kFloat32) {
    status = rows_of<float>(p, segments, stream);
  } else if (p.x_dtype == DType::kBFloat16) {
    status = rows_of<__nv_bfloat16>(p, segments, stream);
  } else {
    status = rows_of<__half>(p, segments, stream);
  }
  return status ? status : launch_sums(p, segments, stream);
}

}  // namespace fastdiff::cuda
