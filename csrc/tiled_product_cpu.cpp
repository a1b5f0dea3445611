// A matrix product by tiles of columns, a thread a tile at a time: what the masked loss makes of its large products.
//
// torch's own product shares one out among all threads, which then wait for one another at its end; cut into tiles that
// stay in a core's cache it is faster, but not if they wait at each. Here they wait once, each tile is the product of one
// thread, and so the result does not depend on how many there are. (MKL's own product of several threads may split a sum
// among them, which changes its last bits.)
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "csrc/tensors.h"

namespace fastdiff::torch_binding {
namespace {

// `size` entries of a dimension of t, from `at` on, as a tensor of its own over that memory. torch's threads do not have the
// caller's inference mode and would refuse to write a view of one of its tensors.
Tensor part_of(const Tensor& t, int64_t dim, int64_t at, int64_t size) {
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < t.dim(); i++) {
    sizes.push_back(i == dim ? size : t.size(i));
    strides.push_back(t.stride(i));
  }
  auto* const begin = static_cast<char*>(t.data_ptr()) + at * t.stride(dim) * static_cast<int64_t>(t.element_size());
  return torch::stable::from_blob(begin, sizes, strides, t.device(), t.scalar_type());
}

// out [M, N] = beta · (input, or out where it is None) + alpha · a [M, K] · b [K, N]; input: [N], added to every row.
void tiled_addmm_(Tensor out, OptionalTensor input, Tensor a, Tensor b, double beta, double alpha, int64_t tile) {
  for (const Tensor* t : {&out, &a, &b}) check_aligned(*t, "an operand");
  STD_TORCH_CHECK(out.dim() == 2 && a.dim() == 2 && b.dim() == 2 && out.size(0) == a.size(0) &&
                      out.size(1) == b.size(1) && a.size(1) == b.size(0) && tile > 0,
                  "the operands do not fit; expected out [M, N], a [M, K], b [K, N] and tile > 0");
  STD_TORCH_CHECK(std::fabs(alpha) <= FLT_MAX && std::fabs(beta) <= FLT_MAX, "alpha or beta is out of float32's range");
  STD_TORCH_CHECK(!input || (input->dim() == 1 && input->size(0) == out.size(1)), "input does not fit; expected [N]");
  for (const Tensor& t : {a, b, input ? *input : out}) {
    check_device(t, out, "an operand");
    STD_TORCH_CHECK(t.scalar_type() == out.scalar_type(), "the operands do not fit; expected one dtype");
    dtype_of(t, "an operand");
  }
  STD_TORCH_CHECK(out.numel() < 2 || (out.stride(0) >= out.size(1) && out.stride(1) == 1) ||
                      (out.stride(1) >= out.size(0) && out.stride(0) == 1),
                  "out does not fit; expected rows, or columns, that lie apart");
  check_apart(out, "out", a, "a");
  check_apart(out, "out", b, "b");
  check_apart(out, "out", input, "input");
  const int64_t columns = out.size(1);
  tile = std::min(tile, std::max<int64_t>(columns, 1));
  const int64_t tiles = columns / tile + (columns % tile != 0);
  // Two at least: torch calls the body of a loop of one outside its threads, where the product would start threads itself.
  torch::stable::parallel_for(0, tiles < 2 ? 2 : tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end && k < tiles; k++) {
      const int64_t at = k * tile, size = columns - at < tile ? columns - at : tile;
      const Tensor to = part_of(out, 1, at, size), from = part_of(b, 1, at, size), rows = part_of(a, 0, 0, a.size(0));
      const Tensor plus = input ? part_of(*input, 0, at, size) : to;
      FASTDIFF_TORCH_CALL(aoti_torch_cpu_addmm_out(to.get(), plus.get(), rows.get(), from.get(), beta, alpha));
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff, m) {
  m.def("tiled_addmm_(Tensor(a!) out, Tensor? input, Tensor a, Tensor b, float beta, float alpha, int tile) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("tiled_addmm_", TORCH_BOX(&tiled_addmm_)); }

}  // namespace
}  // namespace fastdiff::torch_binding
