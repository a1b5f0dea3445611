// QGFD attention's hops and their gradients as an aarch64 program, for tests/ops/test_aarch64.py: reads parameters and
// operands from stdin, writes results to stdout. No torch, no Python.
#include "kernels/qgfd/qgfd.h"
#include "tests/ops/aarch64.h"

using namespace fastdiff;

int main() {
  // heads, length, dim, dtype, hops, first_mixed, last_mixed, causal; 4 operands [heads, length, dim]
  const auto header = read<int64_t>(8);
  const int64_t heads = header[0], length = header[1], dim = header[2], rows = heads * length;
  const DType dtype = static_cast<DType>(header[3]);
  const int64_t bytes = rows * dim * dtype_size(dtype);
  std::vector<char> operand[4], result[4];
  QgfdHeads seen[4];
  for (int i = 0; i < 4; i++) {
    operand[i] = read<char>(bytes);
    result[i].resize(bytes);
    seen[i] = {operand[i].data(), rows * dim, length * dim, dim};
  }
  std::vector<int32_t> end(length);
  for (int64_t i = 0; i < length; i++) end[i] = static_cast<int32_t>(i + 1);
  std::vector<float> lse(rows);

  QgfdForwardParams p{};
  p.matrix.query = seen[0];
  p.matrix.key = seen[1];
  p.matrix.row_end = header[7] ? end.data() : nullptr;
  p.matrix.batch = 1;
  p.matrix.heads = p.matrix.kv_heads = heads;
  p.matrix.queries = p.matrix.keys = length;
  p.matrix.dim = dim;
  p.matrix.scale = 0.25f;
  p.matrix.dtype = dtype;
  p.recurrence = {header[4], header[5], header[6], 0.5f};
  p.value = seen[2];
  std::vector<char> passes(bytes * p.recurrence.saved());
  p.out = result[0].data();
  p.lse = lse.data();
  p.passes = passes.data();
  cpu::qgfd_forward(p, {run_serially});

  QgfdBackwardParams b{};
  b.matrix = p.matrix;
  b.recurrence = p.recurrence;
  b.value = p.value;
  b.out = {p.out, rows * dim, dim, heads * dim};
  b.grad_out = seen[3];
  b.lse = lse.data();
  b.passes = passes.data();
  b.grad_query = result[1].data();
  b.grad_key = result[2].data();
  b.grad_value = result[3].data();
  cpu::qgfd_backward(b, {run_serially});
  for (const auto& r : result) fwrite(r.data(), 1, bytes, stdout);
  return 0;
}
