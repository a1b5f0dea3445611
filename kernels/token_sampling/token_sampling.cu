// The launches of token sampling. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/token_sampling/token_sampling_cuda.h"

#include <cmath>
#include <cstdint>

#include "kernels/token_sampling/sampling_block.cuh"
#include "kernels/token_sampling/sampling_row.cuh"
#include "kernels/token_sampling/sampling_threshold.cuh"

namespace fastdiff::cuda {
namespace sampling {
namespace {

bool is_device_dtype(DType t) { return t == DType::kFloat32 || t == DType::kBFloat16 || t == DType::kFloat16; }
int64_t rows_of(const TokenSampleParams& p) { return p.batch * p.length; }
bool needs_thresholds(const TokenSampleParams& p) { return p.top_k > 0 || p.top_p < 1.0; }

bool accepted(const TokenSampleParams& p) {
  return p.batch >= 0 && p.length >= 0 && p.vocab >= 1 && is_device_dtype(p.dtype) && p.top_k >= 0 && p.top_p > 0.0 &&
         p.top_p <= 1.0 && (p.temperatures || p.temperature >= 0.0) && p.suppress_count >= 0 && p.end_count >= 0;
}
bool has_operands(const TokenSampleParams& p) {
  return p.token && p.log_prob && p.entropy && p.margin && p.workspace && (p.suppress || p.suppress_count == 0) &&
         (p.end_tokens || p.end_count == 0 || !p.end_log_prob);
}

// 1/T within fp32's normal numbers; 0 where T = 0.
float common_inverse(const TokenSampleParams& p) {
  if (!(p.temperature > 0.0)) return 0.0f;
  const double inverse = 1.0 / p.temperature;
  return inverse > 3.4028234e38 ? 3.40282347e38f : inverse < 1.17549435e-38 ? 1.17549435e-38f : static_cast<float>(inverse);
}

dim3 grid_of(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < max_grid() ? blocks : max_grid()), 1, 1);
}

int64_t records_bytes(const TokenSampleParams& p) {
  return rows_of(p) * blocks_of(p.vocab) * static_cast<int64_t>(sizeof(BlockRecord));
}

Workspace workspace_of(const TokenSampleParams& p) {
  auto* thresholds = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + records_bytes(p));
  return {static_cast<BlockRecord*>(p.workspace), needs_thresholds(p) ? thresholds : nullptr};
}

int launch_threshold(const TokenSampleParams& p, const LogitTile& tile, float* thresholds, Stream stream) {
  int bits = 44;  // of a weight below 1; 2^18 ids of them fit in 62 bits, and more ids get fewer
  for (int64_t ids = p.vocab >> 18; ids > 0; ids >>= 1) --bits;
  const int passes = p.dtype == DType::kFloat32 ? 4 : p.dtype == DType::kFloat16 ? 3 : 2;  // of float's bits
  const ThresholdTask task{thresholds, std::ldexp(1.0f, bits), common_inverse(p), passes};
  const dim3 grid = grid_of(rows_of(p), 1), block(kThresholdThreads, 1, 1);
  FD_LAUNCH(sample_threshold_kernel, grid, block, 0, stream, p, tile, task);
  return launch_status();
}

int launch_blocks(const TokenSampleParams& p, const LogitTile& tile, const Workspace& w, Stream stream) {
  const dim3 grid = grid_of(rows_of(p) * blocks_of(tile.end - tile.begin), kBlockWarps);
  const dim3 block(kBlockWarps * kWarp, 1, 1);
  FD_LAUNCH(sample_blocks_kernel, grid, block, 0, stream, p, tile, w, common_inverse(p));
  return launch_status();
}

template <class T, int kVec>
int launch_head_rows(const LmHeadSampleParams& h, const Workspace& w, Stream stream) {
  const dim3 grid = grid_of(rows_of(h.sample), 1), block(kHeadWarps * kWarp, 1, 1);
  FD_LAUNCH((head_rows_kernel<T, kVec>), grid, block, 0, stream, h, w, common_inverse(h.sample));
  return launch_status();
}

template <class T>
int head_rows_of(const LmHeadSampleParams& h, const Workspace& w, Stream stream) {
  constexpr int kVec = kVectorBytes / sizeof(T);
  const auto starts_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; };
  const bool rows_aligned = h.dim % kVec == 0 && h.weight_stride % kVec == 0;
  const bool aligned = rows_aligned && starts_aligned(h.hidden) && starts_aligned(h.weight);
  return aligned ? launch_head_rows<T, kVec>(h, w, stream) : launch_head_rows<T, 1>(h, w, stream);
}

}  // namespace
}  // namespace sampling

using namespace sampling;

int64_t sample_tokens_workspace_bytes(const TokenSampleParams& p) {
  return records_bytes(p) + (needs_thresholds(p) ? (rows_of(p) + 1) / 2 * 8 : 0);  // one float each
}

int64_t lm_head_sample_workspace_bytes(const LmHeadSampleParams& h) { return records_bytes(h.sample); }

int sample_tokens(const TokenSampleParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (rows_of(p) == 0) return 0;
  if (!has_operands(p) || !p.logits) return kInvalidValue;
  const Workspace w = workspace_of(p);
  const LogitTile all{p.logits, p.batch_stride, p.row_stride, 0, p.vocab};
  int status = 0;
  if (w.thresholds) status = launch_threshold(p, all, const_cast<float*>(w.thresholds), stream);
  if (status == 0) status = launch_blocks(p, all, w, stream);
  if (status) return status;
  FD_LAUNCH(sample_rows_kernel, grid_of(rows_of(p), kRowWarps), dim3(kRowWarps * kWarp, 1, 1), 0, stream, p, w,
            common_inverse(p));
  return launch_status();
}

int lm_head_sample(const LmHeadSampleParams& h, Stream stream, const HeadProduct& product) {
  const TokenSampleParams& p = h.sample;
  if (!accepted(p) || needs_thresholds(p) || h.dim < 1) return kInvalidValue;
  if (h.tile_size < kSampleBlock || h.tile_size % kSampleBlock != 0) return kInvalidValue;
  if (rows_of(p) == 0) return 0;
  if (!has_operands(p) || !h.hidden || !h.weight || !h.tile || !product.run) return kInvalidValue;
  const Workspace w = workspace_of(p);
  for (int64_t begin = 0; begin < p.vocab; begin += h.tile_size) {
    const int64_t end = begin + h.tile_size < p.vocab ? begin + h.tile_size : p.vocab;
    product.run(product.context, {0, p.batch * p.length, begin, end, h.tile});
    const LogitTile tile{h.tile, p.length * (end - begin), end - begin, begin, end};
    const int status = launch_blocks(p, tile, w, stream);
    if (status) return status;
  }
  if (p.dtype == DType::kFloat32) return head_rows_of<float>(h, w, stream);
  if (p.dtype == DType::kBFloat16) return head_rows_of<__nv_bfloat16>(h, w, stream);
  return head_rows_of<__half>(h, w, stream);
}

}  // namespace fastdiff::cuda
