// sample_tokens and lm_head_sample on the CPU, compiled once an instruction set (see kernels/common/vec.h).
// A block of 1 024 logits is read from memory once; the second pass over it hits the L1 cache.
#include <math.h>

#include "kernels/common/double_sum.h"
#include "kernels/common/exp.h"
#include "kernels/common/lanes.h"
#include "kernels/common/logit_blocks.h"
#include "kernels/common/philox.h"
#include "kernels/token_sampling/token_sampling.h"
#include "kernels/token_sampling/token_sampling_cpu_block.inl"
#include "kernels/token_sampling/token_sampling_cpu_threshold.inl"

namespace fastdiff::cpu::FASTDIFF_ISA {
namespace {

struct RowTemperature {
  Temper temper;
  float inverse;
};
RowTemperature row_temperature(const TokenSampleParams& p, int64_t r) {
  const double t = p.temperatures != nullptr ? double(p.temperatures[r]) : p.temperature;
  if (!(t > 0)) return {Temper::kZero, 1};  // a raw call's negative number or NaN too, as on GPUs
  // Within float's normal numbers: an inverse of 0 would make NaNs of suppressed logits.
  const double inverse = 1 / t, least = inverse > FLT_MIN ? inverse : FLT_MIN;
  return {t == 1 ? Temper::kOne : Temper::kOther, least < FLT_MAX ? float(least) : FLT_MAX};
}

struct Statistics {
  bool valid;
  int64_t block;  // of the first argmax
  double maximum, log_normaliser, entropy, margin;
};

int64_t top_block(const Record* records, int64_t blocks) {
  int64_t top = 0;
  for (int64_t b = 1; b < blocks; b++)
    if (records[b].max > records[top].max) top = b;
  return top;
}

bool has_distribution(const Record* records, int64_t blocks) {
  double sum = 0;
  for (int64_t b = 0; b < blocks; b++) sum += records[b].sum;
  return sum == sum && sum > 0;
}

// `scales`: of every block its weights' factor exp(its maximum - the row's), for later.
Statistics combine(const Record* records, int64_t blocks, int64_t top, const Peak& peak, double* scales) {
  const double m = records[top].max;
  double others = peak.others, weighted = records[top].weighted;
  float second = peak.second;
  for (int64_t b = 0; b < blocks; b++) {
    const Record& r = records[b];
    scales[b] = b == top;
    if (b == top || r.sum == 0) continue;
    const double below = r.max - m, e = scales[b] = ::exp(below);
    others += r.sum * e;
    weighted += e * (r.weighted + below * r.sum);
    second = r.max > second ? r.max : second;
  }
  const double log_normaliser = log1p(others);
  return {true, top, m, log_normaliser, log_normaliser - weighted / (1 + others), (0.0 - expm1(second - m)) / (1 + others)};
}

struct Choice {
  int64_t block;
  double target;  // in the block's own weights
};

// The weights of all blocks together, from the row's maximum. `scales` holds the factors at temperature 1, and those at
// the row's own afterwards.
double tempered_total(const Record* records, int64_t blocks, double m, const RowTemperature& t, double* scales) {
  const double inverse = t.inverse;
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) {
    if (!(records[b].tempered > 0)) continue;
    if (t.temper != Temper::kOne) scales[b] = ::exp((records[b].max - m) * inverse);
    total += records[b].tempered * scales[b];
  }
  return total;
}

// `scales`: what a block's tempered weights are multiplied with to be measured from the row's maximum.
Choice choose_block(const Record* records, int64_t blocks, double u, double total, const double* scales) {
  Choice choice{0, 0};
  double before = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const double scale = records[b].tempered > 0 ? scales[b] : 0, weight = records[b].tempered * scale;
    if (!(weight > 0)) continue;
    choice = {b, (u * total - before) / scale};
    before += weight;
    if (before > u * total) break;
  }
  return choice;
}

double row_uniform(const TokenSampleParams& p, int64_t r) {
  const int64_t seed = p.seed_at != nullptr ? *p.seed_at : p.seed, step = p.step_at != nullptr ? *p.step_at : p.step;
  const int64_t sequence = p.sequence_ids != nullptr ? p.sequence_ids[r] : r / p.length;
  const int64_t position = p.positions != nullptr ? p.positions[r] : r % p.length;
  return uniform53(philox(uint64_t(seed), uint64_t(sequence), uint64_t(position), uint64_t(step), Draw::kToken));
}

void store_invalid(const TokenSampleParams& p, int64_t r) {
  p.token[r] = -1;
  p.log_prob[r] = p.entropy[r] = p.margin[r] = NAN;
  if (p.end_log_prob != nullptr) p.end_log_prob[r] = NAN;
}

bool is_suppressed(const TokenSampleParams& p, int64_t id) {
  const int64_t s = first_not_below(p.suppress, p.suppress_count, id);
  return s < p.suppress_count && p.suppress[s] == id;
}

// logit_of_end(i): the logit of the i-th end token.
template <class F>
void store_row(const TokenSampleParams& p, int64_t r, const Statistics& s, int64_t argmax, int64_t token, double logit,
               const F& logit_of_end) {
  p.token[r] = token;
  p.log_prob[r] = float((token == argmax ? 0.0 : logit - s.maximum) - s.log_normaliser);
  p.entropy[r] = float(s.entropy);
  p.margin[r] = float(s.margin);
  if (p.end_log_prob == nullptr) return;
  double rest = 0;
  bool certain = false;
  for (int64_t i = 0; i < p.end_count; i++) {
    if (p.end_tokens[i] == argmax)
      certain = true;
    else if (!is_suppressed(p, p.end_tokens[i]))
      rest += ::exp(logit_of_end(i) - s.maximum);
  }
  p.end_log_prob[r] = float((certain ? log1p(rest) : log(rest)) - s.log_normaliser);
}

// ------------------------------------------------------------------------------------------------ sample_tokens
template <class T>
void sample_row(const TokenSampleParams& p, int64_t r, Record* records, double* scales, const Work& work, float* pad) {
  const int64_t blocks = divide_up(p.vocab, kSampleBlock);
  const T* row = static_cast<const T*>(p.logits) + r / p.length * p.batch_stride + r % p.length * p.row_stride;
  const Blocks<T> block{row, 0, p.vocab, p.suppress, p.suppress_count, pad};
  const RowTemperature t = row_temperature(p, r);
  for (int64_t b = 0; b < blocks; b++)
    records[b] = block(b, [&](const auto* z, int64_t n) { return block_record<false>(t.temper, z, n, t.inverse); });
  if (!has_distribution(records, blocks)) return store_invalid(p, r);

  const int64_t top = top_block(records, blocks);
  const float m = records[top].max;
  const Peak peak =
      block(top, [&](const auto* z, int64_t n) { return find_peak(z, n, m, pad + kSampleBlock); });
  const Statistics s = combine(records, blocks, top, peak, scales);
  const int64_t argmax = top * kSampleBlock + peak.argmax;
  int64_t token = argmax;
  if (t.temper != Temper::kZero) {
    const double inverse = t.inverse;
    double total = tempered_total(records, blocks, m, t, scales);
    float cut = -INFINITY;
    const bool cuts = work.values != nullptr;
    if (cuts) {  // which leaves what is kept of each block, measured from the row's maximum
      const RowView<T> view{block, blocks, m, t.inverse};
      cut = cut_row(view, p.vocab, p.vocab - p.suppress_count, p.top_k, p.top_p, total, work, records);
      total = 0;
      for (int64_t b = 0; b < blocks; b++) {
        total += records[b].tempered;
        scales[b] = 1;
      }
    }
    Choice choice = choose_block(records, blocks, row_uniform(p, r), total, scales);
    if (cuts) choice.target *= ::exp((m - double(records[choice.block].max)) * inverse);
    const float from = records[choice.block].max;
    token = choice.block * kSampleBlock + block(choice.block, [&](const auto* z, int64_t n) {
      return scan(z, n, from, t.inverse, cut, choice.target, pad + kSampleBlock);
    });
  }
  store_row(p, r, s, argmax, token, to_float(row[token]), [&](int64_t i) { return to_float(row[p.end_tokens[i]]); });
}

void sample(const TokenSampleParams& p, const ParallelFor& parallel_for) {
  const int64_t blocks = divide_up(p.vocab, kSampleBlock);
  const bool cuts = p.top_p < 1 || (p.top_k > 0 && p.top_k < p.vocab);
  parallel_for(0, p.batch * p.length, divide_up(16384, p.vocab), [&](int64_t begin, int64_t end) {
    const Array<Record> records(blocks);
    const Array<double> scales(blocks);
    const Array<float> pad(2 * kSampleBlock), floats(cuts ? 2 * (p.vocab + Vec::kWidth) + kSample * 2 : 1);
    const Array<int64_t> offsets(cuts ? blocks + 1 : 1);
    const Array<double> above(cuts ? blocks : 1);
    float* const values = cuts ? floats.data : nullptr;
    const Work work{values, values + p.vocab + Vec::kWidth + kSample, offsets.data, above.data};
    with_type<Vec>(p.dtype, [&](auto type) {
      for (int64_t r = begin; r < end; r++)
        sample_row<typename decltype(type)::type>(p, r, records.data, scales.data, work, pad.data);
    });
  });
}

// ------------------------------------------------------------------------------------------------ lm_head_sample
struct RowState {
  float top_max;  // of a tile's blocks, and what is known of that block
  int64_t top;
  Peak peak;
};

template <class T>
void see_row(const TokenSampleParams& p, const HeadTile& tile, int64_t r, Record* records, RowState* state,
             float* end_logits, float* pad) {
  const int64_t begin = tile.begin, end = tile.end;
  const T* row = static_cast<const T*>(tile.logits) + (r - tile.first_row) * (end - begin);
  const Blocks<T> block{row, begin, end, p.suppress, p.suppress_count, pad};
  const RowTemperature t = row_temperature(p, r);
  for (int64_t b = begin / kSampleBlock; b * kSampleBlock < end; b++) {
    block(b, [&](const auto* z, int64_t n) {
      records[b] = block_record<true>(t.temper, z, n, t.inverse);
      if (records[b].max > state->top_max)
        *state = {records[b].max, b, find_peak(z, n, records[b].max, pad + kSampleBlock)};
    });
  }
  for (int64_t i = 0; i < p.end_count; i++)
    if (p.end_tokens[i] >= begin && p.end_tokens[i] < end) end_logits[i] = to_float(row[p.end_tokens[i] - begin]);
}

// One logit again: the product in fp32, rounded to the dtype as the head's own product is.
template <class T>
float logit_again(const LmHeadSampleParams& h, int64_t r, int64_t id) {
  const T* x = static_cast<const T*>(h.hidden) + r * h.dim;
  const T* w = static_cast<const T*>(h.weight) + id * h.weight_stride;
  Vec sum = Vec::set(0);
  for_lanes<Vec>(h.dim, [&](int64_t i, auto n) { sum = fma(load<Vec>(x + i, n), load<Vec>(w + i, n), sum); });
  float value = sum.sum();
  if (h.bias != nullptr) value += to_float(static_cast<const T*>(h.bias)[id]);
  T rounded;
  from_float(value, &rounded);
  return to_float(rounded);
}

template <class T>
int64_t draw_from_head(const LmHeadSampleParams& h, int64_t r, const Record* records, int64_t blocks, float m,
                       double* scales, float* logits, float* weights, double* logit) {
  const TokenSampleParams& p = h.sample;
  const RowTemperature t = row_temperature(p, r);
  const double total = tempered_total(records, blocks, m, t, scales);
  const Choice choice = choose_block(records, blocks, row_uniform(p, r), total, scales);
  const Record& record = records[choice.block];
  int64_t cell = 0;
  double before = 0;
  for (int64_t c = 0; c < kCells && choice.block * kSampleBlock + c * kSampleCell < p.vocab; c++) {
    if (!(record.cell[c] > 0)) continue;
    cell = c;
    if (before + record.cell[c] > choice.target) break;
    before += record.cell[c];
  }
  const int64_t first = choice.block * kSampleBlock + cell * kSampleCell;
  for (int64_t i = 0; i < kSampleCell; i++)
    logits[i] = first + i < p.vocab && !is_suppressed(p, first + i) ? logit_again<T>(h, r, first + i) : -INFINITY;
  const int64_t i = scan(logits, kSampleCell, record.max, t.inverse, -INFINITY, choice.target - before, weights);
  *logit = logits[i];
  return first + i;
}

template <class T>
void finish_row(const LmHeadSampleParams& h, int64_t r, const Record* records, int64_t blocks, const RowState& state,
                const float* end_logits, double* scales, float* pad) {
  const TokenSampleParams& p = h.sample;
  if (!has_distribution(records, blocks)) return store_invalid(p, r);
  const Statistics s = combine(records, blocks, state.top, state.peak, scales);
  const int64_t argmax = state.top * kSampleBlock + state.peak.argmax;
  int64_t token = argmax;
  double logit = state.top_max;
  if (row_temperature(p, r).temper != Temper::kZero)
    token = draw_from_head<T>(h, r, records, blocks, state.top_max, scales, pad, pad + kSampleBlock, &logit);
  store_row(p, r, s, argmax, token, logit, [&](int64_t i) { return end_logits[i]; });
}

// States are a tile's own, and put together afterwards.
void head_sample(const LmHeadSampleParams& h, const ParallelFor& parallel_for, const HeadProduct& product) {
  const TokenSampleParams& p = h.sample;
  const int64_t rows = p.batch * p.length, blocks = divide_up(p.vocab, kSampleBlock);
  const int64_t tiles = divide_up(p.vocab, h.tile_size);
  const Array<Record> records(rows * blocks);
  const Array<RowState> states(rows * tiles);
  const Array<float> end_logits(rows * p.end_count);
  with_type<Vec>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_head_tiles<T>(rows, p.vocab, h.tile_size, parallel_for, product, [&](const HeadTile& tile, float* pad) {
      for (int64_t r = tile.first_row; r < tile.first_row + tile.rows; r++) {
        RowState* state = states.data + r * tiles + tile.begin / h.tile_size;
        *state = {-INFINITY, 0, {0, -INFINITY, 0}};
        see_row<T>(p, tile, r, records.data + r * blocks, state, end_logits.data + r * p.end_count, pad);
      }
    });
    parallel_for(0, rows, 1, [&](int64_t from, int64_t to) {
      const Array<float> pad(2 * kSampleBlock);
      const Array<double> scales(blocks);
      for (int64_t r = from; r < to; r++) {
        const RowState* top = states.data + r * tiles;
        for (int64_t k = 1; k < tiles; k++)  // the first of equals
          if (states.data[r * tiles + k].top_max > top->top_max) top = states.data + r * tiles + k;
        finish_row<T>(h, r, records.data + r * blocks, blocks, *top, end_logits.data + r * p.end_count, scales.data,
                      pad.data);
      }
    });
  });
}

}  // namespace

void sample_tokens(const TokenSampleParams& p, const ParallelFor& parallel_for) { sample(p, parallel_for); }
void lm_head_sample(const LmHeadSampleParams& p, const ParallelFor& parallel_for, const HeadProduct& product) {
  head_sample(p, parallel_for, product);
}

}  // namespace fastdiff::cpu::FASTDIFF_ISA
