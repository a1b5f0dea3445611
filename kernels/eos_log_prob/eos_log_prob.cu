// The launches of eos_log_prob. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/eos_log_prob/eos_log_prob_cuda.h"

#include "kernels/eos_log_prob/eos_log_prob.cuh"

namespace fastdiff::cuda {
namespace eos {
namespace {

int64_t rows_of(const EosLogProbParams& p) { return p.batch * p.length; }

bool accepted(const EosLogProbParams& p) {
  const bool dtype = p.dtype == DType::kFloat32 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return dtype && p.batch >= 0 && p.length >= 0 && p.vocab >= 1 && p.end_count >= 1 && p.excluded_count >= 0;
}
bool has_operands(const EosLogProbParams& p) {
  return p.end_log_prob && p.workspace && p.end_tokens && (p.excluded || p.excluded_count == 0);
}

dim3 grid_of(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < max_grid() ? blocks : max_grid()), 1, 1);
}

int launch_blocks(const EosLogProbParams& p, const LogitTile& tile, Stream stream) {
  const dim3 grid = grid_of(rows_of(p) * blocks_of(tile.end - tile.begin), kBlockWarps);
  FD_LAUNCH(eos_blocks_kernel, grid, dim3(kBlockWarps * kWarp, 1, 1), 0, stream, p, tile);
  return launch_status();
}

int launch_rows(const EosLogProbParams& p, Stream stream) {
  FD_LAUNCH(eos_rows_kernel, grid_of(rows_of(p), kRowWarps), dim3(kRowWarps * kWarp, 1, 1), 0, stream, p);
  return launch_status();
}

}  // namespace
}  // namespace eos

using namespace eos;

int64_t eos_log_prob_workspace_bytes(const EosLogProbParams& p) {
  return rows_of(p) * blocks_of(p.vocab) * static_cast<int64_t>(sizeof(EosPart));
}

int eos_log_prob_from_logits(const EosLogProbParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (rows_of(p) == 0) return 0;
  if (!has_operands(p) || !p.logits) return kInvalidValue;
  const int status = launch_blocks(p, {p.logits, p.batch_stride, p.row_stride, 0, p.vocab}, stream);
  return status ? status : launch_rows(p, stream);
}

int eos_log_prob(const EosLogProbParams& p, const EosHeadTiles& tiles, Stream stream, const HeadProduct& product) {
  if (!accepted(p) || tiles.tile_size < kLogitBlock || tiles.tile_size % kLogitBlock != 0) return kInvalidValue;
  if (rows_of(p) == 0) return 0;
  if (!has_operands(p) || !tiles.logits || !product.run) return kInvalidValue;
  for (int64_t begin = 0; begin < p.vocab; begin += tiles.tile_size) {
    const int64_t end = begin + tiles.tile_size < p.vocab ? begin + tiles.tile_size : p.vocab;
    product.run(product.context, {0, rows_of(p), begin, end, tiles.logits});
    const LogitTile tile{tiles.logits, p.length * (end - begin), end - begin, begin, end};
    const int status = launch_blocks(p, tile, stream);
    if (status) return status;
  }
  return launch_rows(p, stream);
}

}  // namespace fastdiff::cuda
