// What the forward and the backward pass share on the host: views, masks, and a workspace cut into pieces.
#pragma once
#include "kernels/qgfd/qgfd_pass.h"

namespace fastdiff::cuda::qgfd {

// Pieces of 256-byte aligned memory, one after the other; without memory it only adds up their bytes.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t bytes) {
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

inline Operand operand(const QgfdHeads& heads, int64_t group, DType dtype) {
  const int64_t piece = kPieceBytes / dtype_size(dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(heads.data) % kPieceBytes == 0 && heads.batch_stride % piece == 0 &&
                       heads.head_stride % piece == 0 && heads.row_stride % piece == 0;
  return {heads.data, heads.batch_stride, heads.head_stride, heads.row_stride, static_cast<int32_t>(group), aligned};
}

// [batch, heads, rows, dim] contiguous
inline QgfdHeads by_heads(const void* data, const QgfdMatrix& m, int64_t rows) {
  return {data, m.heads * rows * m.dim, rows * m.dim, m.dim};
}
// [batch, rows, heads, dim] contiguous
inline QgfdHeads by_rows(const void* data, const QgfdMatrix& m, int64_t rows) {
  return {data, rows * m.heads * m.dim, m.dim, m.heads * m.dim};
}
inline Result result(const QgfdHeads& heads) {
  return {const_cast<void*>(heads.data), heads.batch_stride, heads.head_stride, heads.row_stride};
}

inline bool accepted(const QgfdMatrix& m, const QgfdRecurrence& r) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const bool dtype = m.dtype == DType::kFloat32 || m.dtype == DType::kBFloat16 || m.dtype == DType::kFloat16;
  const bool sizes = m.batch >= 0 && m.heads >= 0 && m.kv_heads >= 1 && m.heads % m.kv_heads == 0 && m.queries >= 0 &&
                     m.queries < kMost && m.keys >= 0 && m.keys < kMost && m.dim >= 8 && m.dim <= 256 && m.dim % 8 == 0;
  const bool square = m.queries == m.keys, mixes = r.first_mixed <= r.last_mixed;
  const bool hops = r.hops >= 1 && r.hops < kMost && (square || (r.hops == 1 && !mixes)) &&
                    (!mixes || (r.first_mixed >= 1 && r.last_mixed <= r.hops));
  return dtype && sizes && hops && m.scale > 0;
}

inline int64_t pass_elements(const QgfdMatrix& m) { return m.batch * m.heads * m.queries * m.dim; }

inline dim3 grid_of(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < max_grid() ? blocks : max_grid()));
}

struct MaskTiles {
  QueryTile* queries = nullptr;
  KeyTile* keys = nullptr;
};
inline MaskTiles take_mask_tiles(const QgfdMatrix& m, Pieces& pieces) {
  if (!m.key_mask && !m.row_begin && !m.row_end) return {};
  MaskTiles t;
  t.queries = pieces.take<QueryTile>(m.batch * Masks::tiles(static_cast<int>(m.queries)) * sizeof(QueryTile));
  t.keys = pieces.take<KeyTile>(m.batch * Masks::tiles(static_cast<int>(m.keys)) * sizeof(KeyTile));
  return t;
}
inline Masks masks_of(const QgfdMatrix& m) {
  return {m.key_mask, m.row_begin, m.row_end, m.begin_batch_stride, m.end_batch_stride, static_cast<int>(m.queries),
          static_cast<int>(m.keys), nullptr, nullptr};
}

// Fills `tiles`, where there are any, and makes `masks` use them. Returns a cudaError_t.
int look_at_masks(const QgfdMatrix& m, const MaskTiles& tiles, Masks* masks, Stream stream);

inline Pass pass_of(const QgfdMatrix& m, const Masks& masks, bool transposed) {
  const int64_t group = m.heads / m.kv_heads;
  const Operand query = operand(m.query, 1, m.dtype), key = operand(m.key, group, m.dtype);
  Pass pass{};
  pass.batch = m.batch;
  pass.heads = m.heads;
  pass.rows = static_cast<int>(transposed ? m.keys : m.queries);
  pass.columns = static_cast<int>(transposed ? m.queries : m.keys);
  pass.dim = static_cast<int>(m.dim);
  pass.transposed = transposed;
  pass.left = transposed ? key : query;
  pass.right = transposed ? query : key;
  pass.masks = masks;
  pass.scale = m.scale * kLog2E;
  pass.out.factor = 1.0f;
  return pass;
}

}  // namespace fastdiff::cuda::qgfd
