// AdaLN's launch functions, for the race check.
#include <cstdio>
#include <vector>

#include "kernels/adaln/adaln_cuda.h"
#include "race.h"

namespace {

using namespace fastdiff;

using Floats = std::vector<float>;

struct Case {
  int64_t batch, tokens, frames, dim;
  bool gated, rms;
};

// Long and short rows, many rows a block, vectors and scalars, rows in registers and streamed.
constexpr Case kCases[] = {
    {2, 5, 1, 64, true, false},  {1, 6, 3, 7, true, false},    {1, 3, 1, 384, false, true},
    {1, 3, 3, 1152, true, true}, {1, 2, 1, 3072, true, false}, {1, 2, 1, 8196, true, false},
};

Modulation modulation(const Floats& data, const Case& c) {
  return {data.data(), DType::kFloat32, c.frames * c.dim, c.dim, c.tokens / c.frames};
}

int run_case(const Case& c) {
  const size_t elements = c.batch * c.tokens * c.dim, modulated = c.batch * c.frames * c.dim;
  const Floats x(elements, 1.5f), branch(elements, 0.5f), m(modulated, 0.25f), vector(c.dim, 1.0f);
  Floats residual_out(elements), out(elements), mean(c.batch * c.tokens), rstd(c.batch * c.tokens);
  AdaLNForwardParams f{};
  f.x = x.data();
  f.branch = c.gated ? branch.data() : nullptr;
  f.gate = f.shift = f.scale = modulation(m, c);
  f.weight = f.bias = vector.data();
  f.residual_out = residual_out.data();
  f.out = out.data();
  f.mean = mean.data();
  f.rstd = rstd.data();
  f.batch = c.batch;
  f.tokens = c.tokens;
  f.dim = c.dim;
  f.eps = 1e-6;
  f.rms = c.rms;
  const int status = cuda::adaln_forward(f, nullptr);
  if (status) return status;

  Floats grad_x(elements), grad_branch(elements), gate(modulated), shift(modulated), scale(modulated);
  Floats weight(c.dim), bias(c.dim);
  AdaLNBackwardParams b{};
  b.grad_out = b.grad_residual_out = x.data();
  b.x = c.gated ? residual_out.data() : x.data();
  b.mean = mean.data();
  b.rstd = rstd.data();
  b.branch = f.branch;
  b.gate = f.gate;
  b.scale = f.scale;
  b.weight = b.bias = vector.data();
  b.grad_x = grad_x.data();
  b.grad_branch = grad_branch.data();
  b.grad_gate = gate.data();
  b.grad_shift = shift.data();
  b.grad_scale = scale.data();
  b.grad_weight = weight.data();
  b.grad_bias = bias.data();
  b.batch = c.batch;
  b.tokens = c.tokens;
  b.dim = c.dim;
  b.grad_tokens_per_frame = c.tokens / c.frames;
  b.rows_per_segment = 2;
  b.rms = c.rms;
  Floats workspace(adaln_backward_workspace_bytes(b) / sizeof(float));
  b.workspace = workspace.data();
  return cuda::adaln_backward(b, nullptr);
}

}  // namespace

int race_adaln() {
  for (const Case& c : kCases) {
    const int status = run_case(c);
    std::printf("adaln [%ld, %ld, %ld], %ld frames%s%s: status %d\n", c.batch, c.tokens, c.dim, c.frames,
                c.gated ? ", gated" : "", c.rms ? ", rms" : "", status);
    if (status) return 1;
  }
  return 0;
}
