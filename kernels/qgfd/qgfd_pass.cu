// The passes, one kernel a dtype, a width of the output and a kind.
#include "kernels/qgfd/qgfd_pass.cuh"

namespace fastdiff::cuda::qgfd {
namespace {

template <class T>
int64_t tile_bytes(int dim) {
  return int64_t{kTile} * resident_stride(dim, kChunk<T>, kPiece<T>) * static_cast<int64_t>(sizeof(T));
}
template <class T>
int64_t shared_bytes(int dim, int resident) {
  const int64_t stage = kChunkElements<T> * static_cast<int64_t>(sizeof(T)) * (resident ? 1 : 2);
  const int64_t weights = kThreads / kWarp * Weights<T>::kStored * static_cast<int64_t>(sizeof(T));
  return 2 * static_cast<int64_t>(sizeof(Columns)) + kStages * stage + resident * tile_bytes<T>(dim) + weights;
}

template <class T, int kOut, class Does>
int launch(Pass pass, Stream stream) {
  // Left operands stay in shared memory where all of them fit, else they stream with the right ones.
  const int lefts = Does::kKind == Kind::kGradient ? 1 + static_cast<int>(pass.chain.recurrence.hops) : 1;
  pass.resident = shared_bytes<T>(pass.dim, lefts) <= kSharedLimit ? lefts : 0;
  const int64_t bytes = shared_bytes<T>(pass.dim, pass.resident);
  const int64_t items = pass.batch * pass.heads * Masks::tiles(pass.rows) * ((pass.dim + kOut - 1) / kOut);
  if (items == 0) return 0;
  const int status = allow_shared(pass_kernel<T, kOut, Does>, bytes);
  if (status) return status;
  const dim3 grid(static_cast<unsigned>(items < max_grid() ? items : max_grid()));
  FD_LAUNCH((pass_kernel<T, kOut, Does>), grid, dim3(kThreads), bytes, stream, pass);
  return launch_status();
}

template <class T, int kOut>
int launch(const Pass& pass, Kind kind, Stream stream) {
  if (kind == Kind::kFirstHop) return launch<T, kOut, FirstHop>(pass, stream);
  if (kind == Kind::kHop) return launch<T, kOut, Hop>(pass, stream);
  return launch<T, kOut, Gradient>(pass, stream);
}

// Wider heads are split: scores are made again for every 128 columns of the output (fp32: 64).
template <class T>
int launch(const Pass& pass, Kind kind, Stream stream) {
  return pass.dim <= 64 ? launch<T, 64>(pass, kind, stream) : launch<T, 128>(pass, kind, stream);
}

}  // namespace

int run_pass(const Pass& pass, Kind kind, DType dtype, Stream stream) {
  if (dtype == DType::kFloat32) return launch<float, 64>(pass, kind, stream);
  if (dtype == DType::kBFloat16) return launch<__nv_bfloat16>(pass, kind, stream);
  return launch<__half>(pass, kind, stream);
}

}  // namespace fastdiff::cuda::qgfd
