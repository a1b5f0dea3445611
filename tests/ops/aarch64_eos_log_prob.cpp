// eos_log_prob as an aarch64 program, for tests/ops/test_aarch64.py: reads parameters and logits from stdin, writes what
// both launch functions make of them to stdout; the head's product lends tiles of the same logits. No torch, no Python.
#include "kernels/eos_log_prob/eos_log_prob.h"
#include "tests/ops/aarch64.h"

using namespace fastdiff;

namespace {

// HeadProduct::run with the parameters as its context: a tile is copied from the logits that are there.
void copy_tile(void* context, const HeadTile& tile) {
  const auto& p = *static_cast<const EosLogProbParams*>(context);
  const int64_t item = dtype_size(p.dtype), ids = tile.end - tile.begin;
  for (int64_t r = 0; r < tile.rows; r++) {
    const auto* from = static_cast<const char*>(p.logits) + ((tile.first_row + r) * p.vocab + tile.begin) * item;
    for (int64_t i = 0; i < ids * item; i++) static_cast<char*>(tile.logits)[r * ids * item + i] = from[i];
  }
}

}  // namespace

int main() {
  const auto header = read<int64_t>(5);  // rows, vocab, dtype, how many end tokens and excluded ids
  const int64_t rows = header[0], vocab = header[1];
  const auto end_tokens = read<int64_t>(header[3]), excluded = read<int64_t>(header[4]);
  const auto logits = read<char>(rows * vocab * dtype_size(static_cast<DType>(header[2])));
  std::vector<float> result(rows);
  EosLogProbParams p{};
  p.logits = logits.data();
  p.batch = rows;
  p.length = 1;
  p.batch_stride = p.row_stride = p.vocab = vocab;
  p.dtype = static_cast<DType>(header[2]);
  p.end_tokens = end_tokens.data();
  p.end_count = header[3];
  p.excluded = excluded.data();
  p.excluded_count = header[4];
  p.end_log_prob = result.data();
  cpu::eos_log_prob_from_logits(p, {run_serially});
  fwrite(result.data(), 4, rows, stdout);
  cpu::eos_log_prob(p, {nullptr, kLogitBlock}, {run_serially}, {copy_tile, &p});
  fwrite(result.data(), 4, rows, stdout);
  return 0;
}
