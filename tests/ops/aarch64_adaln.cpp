// AdaLN as an aarch64 program, for tests/ops/test_aarch64.py: reads parameters and tensors from stdin, runs
// one forward call, writes the outputs to stdout. No torch, no Python.
#include "tests/ops/aarch64.h"
#include "kernels/adaln/adaln.h"

using namespace fastdiff;

int main() {
  int64_t header[4];  // tokens, dim, dtype, rms
  if (fread(header, sizeof header, 1, stdin) != 1) return 2;
  const int64_t tokens = header[0], dim = header[1];
  const DType dtype = static_cast<DType>(header[2]);
  const int64_t row = dim * dtype_size(dtype);
  std::vector<char> x = read(tokens * row), branch = read(tokens * row), gate = read(row), shift = read(row), scale = read(row);
  std::vector<char> residual_out(tokens * row), out(tokens * row);
  const auto modulation = [&](std::vector<char>& m) { return Modulation{m.data(), dtype, 0, 0, tokens}; };
  AdaLNForwardParams p{};
  p.x = x.data();
  p.branch = branch.data();
  p.gate = modulation(gate);
  p.shift = modulation(shift);
  p.scale = modulation(scale);
  p.residual_out = residual_out.data();
  p.out = out.data();
  p.batch = 1;
  p.tokens = tokens;
  p.dim = dim;
  p.eps = 1e-6;
  p.rms = header[3] != 0;
  p.x_dtype = p.branch_dtype = p.out_dtype = dtype;
  cpu::adaln_forward(p, cpu::ParallelFor{run_serially});
  fwrite(residual_out.data(), 1, residual_out.size(), stdout);
  fwrite(out.data(), 1, out.size(), stdout);
  return 0;
}
