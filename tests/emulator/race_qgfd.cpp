// QGFD attention's launch functions, for the race check.
#include <cstdio>
#include <vector>

#include "cuda_on_cpu.h"
#include "kernels/qgfd/qgfd_cuda.h"
#include "race.h"

namespace {

using namespace fastdiff;
using cuda::QgfdPath;

struct Case {
  DType dtype;
  int64_t length, dim, hops, first_mixed, last_mixed;
  bool masked, misaligned;
  QgfdPath path;
};

constexpr QgfdPath kPasses = QgfdPath::kPasses, kFused = QgfdPath::kFused;
constexpr DType k32 = DType::kFloat32, kBrain = DType::kBFloat16, kHalf = DType::kFloat16;

// Both paths, both widths of the output, left operands that stay and that stream, full and partly masked tiles.
constexpr Case kCases[] = {
    {kBrain, 130, 8, 2, 2, 2, true, false, kPasses}, {kBrain, 33, 40, 3, 1, 3, false, true, kFused},
    {kHalf, 20, 136, 2, 1, 1, false, false, kPasses}, {kBrain, 20, 128, 6, 6, 6, true, false, kPasses},
    {k32, 70, 40, 2, 1, 2, true, true, kPasses},      {k32, 33, 16, 3, 3, 3, true, false, kFused},
    {k32, 20, 64, 4, 1, 0, false, false, kPasses},
};

// `count` numbers of the dtype, and a few more.
std::vector<uint8_t> operand(DType dtype, int64_t count) {
  const std::vector<float> values = numbers(count + 8);
  std::vector<uint8_t> bytes((count + 8) * dtype_size(dtype));
  for (int64_t i = 0; i < count + 8; ++i) {
    if (dtype == k32) {
      reinterpret_cast<float*>(bytes.data())[i] = values[i];
    } else if (dtype == kBrain) {
      reinterpret_cast<__nv_bfloat16*>(bytes.data())[i] = __float2bfloat16_rn(values[i]);
    } else {
      reinterpret_cast<__half*>(bytes.data())[i] = __float2half_rn(values[i]);
    }
  }
  return bytes;
}

int run_case(const Case& c) {
  constexpr int64_t kBatch = 2, kHeads = 2;
  const int64_t count = kBatch * kHeads * c.length * c.dim, size = dtype_size(c.dtype);
  std::vector<uint8_t> memory = operand(c.dtype, count), gradient = memory, key_mask(kBatch * c.length, 1);
  for (int64_t i = 0; i < c.length; i += 3) key_mask[i] = 0;
  std::vector<int32_t> row_end(c.length);
  for (int64_t i = 0; i < c.length; ++i) row_end[i] = static_cast<int32_t>(i + 1);
  const auto heads = [&](std::vector<uint8_t>& of) {
    return QgfdHeads{of.data() + (c.misaligned ? size : 0), kHeads * c.length * c.dim, c.length * c.dim, c.dim};
  };
  QgfdForwardParams p{};
  p.matrix = {heads(memory), heads(memory), nullptr, nullptr, nullptr, 0, 0, kBatch, kHeads, kHeads, c.length, c.length,
              c.dim, 0.2f, c.dtype};
  if (c.masked) {
    p.matrix.key_mask = key_mask.data();
    p.matrix.row_end = row_end.data();
  }
  p.recurrence = {c.hops, c.first_mixed, c.last_mixed, 0.7f};
  p.value = heads(memory);
  std::vector<uint8_t> out(count * size), passes(p.recurrence.saved() * count * size);
  std::vector<uint8_t> grads[3] = {out, out, out};
  std::vector<float> lse(kBatch * kHeads * c.length);
  p.out = out.data();
  p.lse = lse.data();
  p.passes = passes.data();
  std::vector<double> workspace(cuda::qgfd_forward_workspace_bytes(p, c.path) / 8 + 1);
  p.workspace = workspace.data();
  const int status = cuda::qgfd_forward(p, nullptr, c.path);
  if (status) return status;
  const QgfdHeads out_heads{out.data(), c.length * kHeads * c.dim, c.dim, kHeads * c.dim};
  QgfdBackwardParams b{p.matrix, p.recurrence, p.value, out_heads, heads(gradient), lse.data(), passes.data(),
                       grads[0].data(), grads[1].data(), grads[2].data(), nullptr};
  std::vector<double> more(cuda::qgfd_backward_workspace_bytes(b) / 8 + 1);
  b.workspace = more.data();
  return cuda::qgfd_backward(b, nullptr);
}

}  // namespace

int race_qgfd() {
  auto& config = cuda_on_cpu::config();
  const auto before = config;
  config.shared_limit = 99 << 10;
  for (const Case& c : kCases) {
    config.max_grid = c.path == kFused ? 1 : 3;  // a CUDA block takes several items, one after the other
    const int status = run_case(c);
    std::printf("qgfd [%ld, %ld], %ld hops, dtype %d, %s: status %d\n", static_cast<long>(c.length),
                static_cast<long>(c.dim), static_cast<long>(c.hops), static_cast<int>(c.dtype),
                c.path == kFused ? "one launch" : "passes", status);
    if (status) return 1;
  }
  config = before;
  return 0;
}
