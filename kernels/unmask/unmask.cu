// unmask_'s launches. Compiled by nvcc into the CUDA module and by g++ into the emulator.
#include "kernels/unmask/unmask.cuh"

#include <cstdint>

#include "kernels/unmask/unmask_cuda.h"

namespace fastdiff::cuda {
namespace {

using namespace unmasking;

bool accepted(const UnmaskParams& p) {
  const int rule = static_cast<int>(p.rule), order = static_cast<int>(p.order);
  return p.batch >= 0 && p.length >= 0 && p.length <= INT32_MAX && rule >= 0 && rule <= 4 && order >= 0 && order <= 3 &&
         (p.batch <= 1 || p.row_stride >= p.length) && p.row_count >= 0 && p.row_count <= INT32_MAX;
}

dim3 grid_of(int64_t blocks) { return dim3(static_cast<unsigned>(blocks < max_grid() ? blocks : max_grid()), 1, 1); }

int64_t blocks_of(int64_t threads) { return (threads + kUnmaskThreads - 1) / kUnmaskThreads; }

int64_t place_bytes(const UnmaskParams& p) {
  return p.length > kSharedPlaces ? p.batch * p.length * static_cast<int64_t>(sizeof(uint64_t)) : 0;
}

int make_entries(const UnmaskParams& p, int32_t* entry_of, Stream stream) {
  const int64_t positions = p.batch * p.length;
  const dim3 block(kUnmaskThreads, 1, 1);
  FD_LAUNCH(unmask_clear_kernel, grid_of(blocks_of(positions)), block, 0, stream, entry_of, positions);
  const int status = launch_status();
  if (status || p.row_count == 0) return status;
  FD_LAUNCH(unmask_entries_kernel, grid_of(blocks_of(p.row_count)), block, 0, stream, p.rows, p.row_count, entry_of,
            positions);
  return launch_status();
}

}  // namespace

int64_t unmask_workspace_bytes(const UnmaskParams& p) {
  return place_bytes(p) + (p.rows ? p.batch * p.length * static_cast<int64_t>(sizeof(int32_t)) : 0);
}

int unmask(const UnmaskParams& p, Stream stream) {
  if (!accepted(p)) return kInvalidValue;
  if (p.batch == 0) return 0;
  if (!p.committed || (!p.workspace && unmask_workspace_bytes(p) > 0)) return kInvalidValue;
  if (p.length > 0 && (!p.token_ids || !p.token || !p.log_prob || !p.entropy || !p.margin)) return kInvalidValue;
  auto* const places = p.length > kSharedPlaces ? static_cast<uint64_t*>(p.workspace) : nullptr;
  int32_t* entry_of = nullptr;
  if (p.rows) {
    entry_of = reinterpret_cast<int32_t*>(static_cast<unsigned char*>(p.workspace) + place_bytes(p));
    const int status = p.length > 0 ? make_entries(p, entry_of, stream) : 0;
    if (status) return status;
  }
  const size_t shared = places ? 0 : static_cast<size_t>(p.length) * sizeof(uint64_t);
  FD_LAUNCH(unmask_kernel, grid_of(p.batch), dim3(kUnmaskThreads, 1, 1), shared, stream, p, entry_of, places);
  return launch_status();
}

}  // namespace fastdiff::cuda
