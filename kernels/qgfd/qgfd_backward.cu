// The backward pass on the host: h_j hop by hop through the transposed M, then the gradients of query and key.
#include "kernels/qgfd/qgfd_cuda.h"
#include "kernels/qgfd/qgfd_launch.h"
#include "kernels/qgfd/qgfd_rows.cuh"

namespace fastdiff::cuda {
namespace qgfd {
namespace {

struct BackwardWorkspace {
  MaskTiles tiles;
  char* h;         // h_1, h_2, ...; h_hops only where it is not grad_out itself
  char* mixed;     // u_j of the mixed hops below the last
  float* running;  // sum of (1 - alpha) g_j over them
  float* delta;

  BackwardWorkspace(const QgfdBackwardParams& p, Pieces& pieces) {
    const QgfdMatrix& m = p.matrix;
    const QgfdRecurrence& r = p.recurrence;
    const int64_t elements = pass_elements(m), bytes = elements * dtype_size(m.dtype), inner = mixed_below_last(r);
    tiles = take_mask_tiles(m, pieces);
    h = pieces.take<char>(bytes * (r.mixed(r.hops) ? r.hops : r.hops - 1));
    mixed = pieces.take<char>(bytes * inner);
    running = pieces.take<float>(inner ? elements * sizeof(float) : 0);
    delta = pieces.take<float>(m.batch * m.heads * m.queries * sizeof(float));
  }
  static int64_t mixed_below_last(const QgfdRecurrence& r) {
    const int64_t last = r.last_mixed < r.hops ? r.last_mixed : r.hops - 1;
    return last >= r.first_mixed ? last - r.first_mixed + 1 : 0;
  }
};

class Backward {
 public:
  Backward(const QgfdBackwardParams& p, const BackwardWorkspace& w, Stream stream)
      : p_(p), m_(p.matrix), r_(p.recurrence), w_(w), stream_(stream), masks_(masks_of(m_)) {
    bytes_ = pass_elements(m_) * dtype_size(m_.dtype);
    const Operand layout = operand(by_heads(nullptr, m_, m_.queries), 1, m_.dtype);
    chain_ = {operand(p.value, m_.heads / m_.kv_heads, m_.dtype), operand(p.grad_out, 1, m_.dtype), p.passes, w.mixed,
              w.h, r_, layout, bytes_};
    chain_.layout.aligned = reinterpret_cast<uintptr_t>(p.passes) % kPieceBytes == 0 && bytes_ % kPieceBytes == 0;
  }

  int run() {
    int status = look_at_masks(m_, w_.tiles, &masks_, stream_);
    if (status == 0) status = mix_again();
    for (int64_t j = r_.hops; j >= 1 && status == 0; --j) status = pass_back(j);
    if (status == 0) status = make_delta();
    if (status == 0) status = gradient(false, p_.grad_query, m_.queries);
    if (status == 0) status = gradient(true, p_.grad_key, m_.keys);
    return status;
  }

 private:
  // u_j of the mixed hops below the last, and h_hops where that hop is mixed.
  int mix_again() {
    int status = 0;
    for (int64_t i = 0; i < BackwardWorkspace::mixed_below_last(r_) && status == 0; ++i) {
      const Operand y = chain_.at(p_.passes, r_.first_mixed + i - 1);
      status = mix(y, chain_.value, w_.mixed + i * bytes_);
    }
    if (r_.mixed(r_.hops) && status == 0) {
      status = mix(chain_.grad_out, Operand{}, w_.h + (r_.hops - 1) * bytes_);
    }
    return status;
  }
  int mix(const Operand& a, const Operand& b, void* to) {
    const Mixture x{a, b, to, r_.alpha, 1.0f - r_.alpha, m_.batch, m_.heads, m_.queries, m_.dim, m_.dtype};
    const int64_t rows = x.batch * x.heads * x.rows;
    if (rows == 0) return 0;
    FD_LAUNCH(mix_kernel, grid_of(rows, kRowWarps), dim3(kRowWarps * kWarp), 0, stream_, x);
    return launch_status();
  }

  // g_{j-1} from h_j: becomes h_{j-1}, or with what the mixed hops add the gradient of value.
  int pass_back(int64_t j) {
    Pass pass = pass_of(m_, masks_, true);
    Output& out = pass.out;
    const bool inner = BackwardWorkspace::mixed_below_last(r_) > 0;
    pass.values = chain_.gradient(j);
    pass.lse = p_.lse;
    if (j == 1) {
      const Result grad = result(by_rows(p_.grad_value, m_, m_.keys));
      if (!inner && !r_.mixed(r_.hops)) {
        out.plain = grad;
      } else {
        out.mixed = grad;
        out.alpha = 1.0f;
        if (inner) out.addend = w_.running;
        if (r_.mixed(r_.hops)) {
          out.base = chain_.grad_out;
          out.beta = 1.0f - r_.alpha;
        }
      }
    } else {
      const Result h = result(by_heads(w_.h + (j - 2) * bytes_, m_, m_.queries));
      if (r_.mixed(j - 1)) {
        out.mixed = h;
        out.alpha = r_.alpha;
        out.running = w_.running;
        out.running_weight = 1.0f - r_.alpha;
        out.fresh = j == r_.hops || !r_.mixed(j);
      } else {
        out.plain = h;
      }
    }
    return run_pass(pass, Kind::kHop, m_.dtype, stream_);
  }

  int make_delta() {
    const int64_t rows = m_.batch * m_.heads * m_.queries;
    if (rows == 0) return 0;
    const Operand last = r_.mixed(r_.hops) ? chain_.at(p_.passes, r_.hops - 1) : operand(p_.out, 1, m_.dtype);
    const Delta d{chain_, last, w_.delta, m_.batch, m_.heads, m_.queries, m_.dim, m_.dtype};
    FD_LAUNCH(delta_kernel, grid_of(rows, kRowWarps), dim3(kRowWarps * kWarp), 0, stream_, d);
    return launch_status();
  }

  int gradient(bool transposed, void* grad, int64_t rows) {
    Pass pass = pass_of(m_, masks_, transposed);
    pass.values = pass.right;
    pass.lse = p_.lse;
    pass.delta = w_.delta;
    pass.chain = chain_;
    pass.out.factor = m_.scale;
    pass.out.plain = result(by_rows(grad, m_, rows));
    return run_pass(pass, Kind::kGradient, m_.dtype, stream_);
  }

  const QgfdBackwardParams& p_;
  const QgfdMatrix& m_;
  const QgfdRecurrence& r_;
  const BackwardWorkspace& w_;
  Stream stream_;
  Masks masks_;
  Chain chain_;
  int64_t bytes_;
};

}  // namespace
}  // namespace qgfd

using namespace qgfd;

int64_t qgfd_backward_workspace_bytes(const QgfdBackwardParams& p) {
  Pieces pieces(nullptr);
  BackwardWorkspace(p, pieces);
  return pieces.bytes();
}

int qgfd_backward(const QgfdBackwardParams& p, Stream stream) {
  const QgfdMatrix& m = p.matrix;
  if (!accepted(m, p.recurrence)) return kInvalidValue;
  if (m.batch * m.heads * (m.queries + m.keys) == 0) return 0;
  const bool outputs = (p.grad_query || m.queries == 0) && ((p.grad_key && p.grad_value) || m.keys == 0);
  if (!outputs || (m.queries > 0 && (!p.lse || !p.workspace))) return kInvalidValue;
  Pieces pieces(p.workspace);
  const BackwardWorkspace w(p, pieces);
  return Backward(p, w, stream).run();
}

}  // namespace fastdiff::cuda
