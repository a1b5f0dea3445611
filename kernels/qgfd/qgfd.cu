// The forward pass on the host: all hops in one launch, or one pass over M a hop.
#include "kernels/qgfd/qgfd_cuda.h"
#include "kernels/qgfd/qgfd_fused.cuh"
#include "kernels/qgfd/qgfd_launch.h"
#include "kernels/qgfd/qgfd_mask_tiles.cuh"

namespace fastdiff::cuda {
namespace qgfd {
namespace {

struct ForwardWorkspace {
  MaskTiles tiles;
  float* lse = nullptr;
  void* u[2] = {nullptr, nullptr};  // u_1, u_3, ... and u_2, u_4, ..., where they are not kept as passes

  ForwardWorkspace(const QgfdForwardParams& p, Pieces& pieces) {
    const QgfdMatrix& m = p.matrix;
    tiles = take_mask_tiles(m, pieces);
    const int64_t hops = p.recurrence.hops, bytes = pass_elements(m) * dtype_size(m.dtype);
    if (hops > 1 && !p.lse) lse = pieces.take<float>(m.batch * m.heads * m.queries * sizeof(float));
    for (int64_t j = 1; j < hops && j <= 2; ++j) u[j - 1] = pieces.take<void>(bytes);
  }
};

int forward_passes(const QgfdForwardParams& p, Stream stream) {
  const QgfdMatrix& m = p.matrix;
  const QgfdRecurrence& r = p.recurrence;
  Pieces pieces(p.workspace);
  const ForwardWorkspace w(p, pieces);
  Masks masks = masks_of(m);
  int status = look_at_masks(m, w.tiles, &masks, stream);
  const int64_t pass_bytes = pass_elements(m) * dtype_size(m.dtype);
  const Operand value = operand(p.value, m.heads / m.kv_heads, m.dtype);
  Operand u = value;
  for (int64_t j = 1; j <= r.hops && status == 0; ++j) {
    Pass pass = pass_of(m, masks, false);
    const bool last = j == r.hops, mixed = r.mixed(j), kept = p.passes && j <= r.saved();
    const QgfdHeads y = by_heads(static_cast<char*>(p.passes) + (j - 1) * pass_bytes, m, m.queries);
    const QgfdHeads kept_here = kept && !mixed ? y : by_heads(w.u[(j - 1) % 2], m, m.queries);
    const QgfdHeads next = last ? by_rows(p.out, m, m.queries) : kept_here;
    pass.values = u;
    pass.lse = p.lse ? p.lse : w.lse;
    if (j == 1) pass.out.lse = p.lse ? p.lse : w.lse;
    if (mixed) {
      pass.out.mixed = result(next);
      pass.out.alpha = r.alpha;
      pass.out.beta = 1.0f - r.alpha;
      pass.out.base = value;
      if (kept) pass.out.plain = result(y);
    } else {
      pass.out.plain = result(next);
    }
    status = run_pass(pass, j == 1 ? Kind::kFirstHop : Kind::kHop, m.dtype, stream);
    if (!last) u = operand(next, 1, m.dtype);
  }
  return status;
}

bool fused(const QgfdForwardParams& p, QgfdPath path) {
  return path == QgfdPath::kFused || (path == QgfdPath::kByShape && qgfd_fuses(p));
}

template <class T>
int launch_fused(const QgfdForwardParams& p, Stream stream) {
  const QgfdMatrix& m = p.matrix;
  const int64_t group = m.heads / m.kv_heads, bytes = fused_shared_bytes<T>(m.queries, m.dim);
  const Fused f{p, operand(m.query, 1, m.dtype), operand(m.key, group, m.dtype), operand(p.value, group, m.dtype),
                masks_of(m)};
  const int status = allow_shared(fused_kernel<T>, bytes);
  if (status) return status;
  const int warps = round_up(m.queries, kWarpRows) / kWarpRows;
  FD_LAUNCH(fused_kernel<T>, grid_of(m.batch * m.heads, 1), dim3(warps * kWarp), bytes, stream, f);
  return launch_status();
}

}  // namespace

int look_at_masks(const QgfdMatrix& m, const MaskTiles& tiles, Masks* masks, Stream stream) {
  if (!tiles.queries && !tiles.keys) return 0;
  const int64_t warps = m.batch * (Masks::tiles(masks->queries) + Masks::tiles(masks->keys));
  if (warps == 0) return 0;
  FD_LAUNCH(mask_tiles_kernel, grid_of(warps, 4), dim3(4 * kWarp), 0, stream, *masks, m.batch, tiles.queries,
            tiles.keys);
  masks->query_tiles = tiles.queries;
  masks->key_tiles = tiles.keys;
  return launch_status();
}

}  // namespace qgfd

using namespace qgfd;

bool qgfd_fuses(const QgfdForwardParams& p) {
  const QgfdMatrix& m = p.matrix;
  if (p.recurrence.hops < 2 || m.queries != m.keys || m.queries > kFusedRows) return false;
  return (m.dtype == DType::kFloat32 ? fused_shared_bytes<float>(m.queries, m.dim)
                                     : fused_shared_bytes<__half>(m.queries, m.dim)) <= kSharedLimit;
}

int64_t qgfd_forward_workspace_bytes(const QgfdForwardParams& p, QgfdPath path) {
  if (fused(p, path)) return 0;
  Pieces pieces(nullptr);
  ForwardWorkspace(p, pieces);
  return pieces.bytes();
}

int qgfd_forward(const QgfdForwardParams& p, Stream stream, QgfdPath path) {
  const QgfdMatrix& m = p.matrix;
  if (!accepted(m, p.recurrence) || (path == QgfdPath::kFused && !qgfd_fuses(p))) return kInvalidValue;
  if (m.batch * m.heads * m.queries == 0) return 0;
  if (!p.out || (!p.workspace && qgfd_forward_workspace_bytes(p, path) > 0)) return kInvalidValue;
  if (!fused(p, path)) return forward_passes(p, stream);
  if (m.dtype == DType::kFloat32) return launch_fused<float>(p, stream);
  if (m.dtype == DType::kBFloat16) return launch_fused<__nv_bfloat16>(p, stream);
  return launch_fused<__half>(p, stream);
}

}  // namespace fastdiff::cuda
