"""Unmasking in Triton: the device code. triton_kernels.py launches it; README.md has the rules.

Four kernels, so that no thread reads what another of the same launch wrote: `index_kernel` (compact samples),
`order_kernel` (the order of the candidates, an int64), `rank_kernel` (rules that count from the best: how many
candidates of the row are better), `commit_kernel`. A position is committed where its `turn` is below the row's limit,
and the best one where there is none such (not under ANCESTRAL).
Candidates are looked for, and ranked, within [block_start, block_end) alone.
"""

import triton
import triton.language as tl

from fastdiff.kernels.common.triton_math import DRAW_ANCESTRAL, DRAW_ORDER, as_double, as_int64, philox, uniform53

CONFIDENCE, MARGIN, ENTROPY, RANDOM = (tl.constexpr(i) for i in range(4))  # enum UnmaskOrder
COUNT, THRESHOLD, FACTOR, ENTROPY_BUDGET, ANCESTRAL = (tl.constexpr(i) for i in range(5))  # enum UnmaskRule
NO_CANDIDATE = tl.constexpr(-(2**63))  # below every candidate's order
NEVER = tl.constexpr(2**31 - 1)  # a turn that no limit exceeds

_SIZES = ["length", "row_stride", "count", "chunks", "value_low", "value_high", "mask_token_id"]
_SIZES += ["seed_low", "seed_high", "step_number"]


@triton.jit(do_not_specialize=["count", "positions"])
def index_kernel(rows_ptr, index_ptr, count, positions, CHUNK: tl.constexpr):
    """index[rows[i]] = i where rows[i] is one of `positions`; index holds -1 before. Grid: (cdiv(count, CHUNK),)."""
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(rows_ptr + i, mask=i < count, other=-1)
    tl.store(index_ptr + row, i, mask=(row >= 0) & (row < positions))


@triton.jit
def _bounds(block_start_ptr, block_end_ptr, active_ptr, b, length):
    """The positions of row b that may be committed: [first, last)."""
    first = tl.full([], 0, tl.int32)
    last = first + length
    if block_start_ptr is not None:
        first = tl.maximum(tl.minimum(tl.load(block_start_ptr + b), length), 0).to(tl.int32)
    if block_end_ptr is not None:
        last = tl.maximum(tl.minimum(tl.load(block_end_ptr + b), length), 0).to(tl.int32)
    if active_ptr is not None:
        last = tl.where(tl.load(active_ptr + b) != 0, last, 0)
    return first, last


@triton.jit
def _value(values_ptr, value_low, value_high, b):
    if values_ptr is None:
        value = as_double(value_low, value_high)
    else:
        value = tl.load(values_ptr + b).to(tl.float64)
    return value


@triton.jit
def _order(score, position, ORDER: tl.constexpr):
    """One int64, the larger the better: the score's place among all fp32 numbers (or words), then the position."""
    if ORDER == RANDOM:
        place = score.to(tl.int64)
    else:
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
        place = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        place = tl.where(score == score, place, -2147483648)  # NaN comes after -inf
    return place * 4294967296 + (4294967295 - position.to(tl.int64))


@triton.jit
def _reaches(log_prob, entropy, margin, word, value, ORDER: tl.constexpr):
    """Whether a position's score is at least `value` (fp64), in logarithms where it is one; false for NaN."""
    if ORDER == CONFIDENCE:
        reached = log_prob.to(tl.float64) >= tl.log(value)
    elif ORDER == MARGIN:
        reached = margin.to(tl.float64) >= value
    elif ORDER == ENTROPY:
        reached = entropy.to(tl.float64) <= -tl.log(value)
    else:
        reached = word.to(tl.float64) * 4.656612873077393e-10 >= value  # 2^-31
    return reached


@triton.jit
def _score(log_prob_ptr, entropy_ptr, margin_ptr, index, mask, word, ORDER: tl.constexpr):
    """The score c in [0, 1], fp64."""
    if ORDER == CONFIDENCE:
        c = tl.exp(tl.load(log_prob_ptr + index, mask=mask, other=0.0).to(tl.float64))
    elif ORDER == MARGIN:
        c = tl.load(margin_ptr + index, mask=mask, other=0.0).to(tl.float64)
    elif ORDER == ENTROPY:
        c = tl.exp(-tl.load(entropy_ptr + index, mask=mask, other=0.0).to(tl.float64))
    else:
        c = word.to(tl.float64) * 4.656612873077393e-10
    return c


@triton.jit
def _sample_index(index_ptr, at, mask):
    """Where the sample of the flat position `at` lies; -1: it has none."""
    if index_ptr is None:
        index = tl.where(mask, at, -1)
    else:
        index = tl.load(index_ptr + at, mask=mask, other=-1).to(tl.int64)
    return index


@triton.jit(do_not_specialize=_SIZES)
def order_kernel(
    token_ids_ptr, token_ptr, log_prob_ptr, entropy_ptr, margin_ptr, index_ptr,
    block_start_ptr, block_end_ptr, active_ptr, values_ptr, seed_ptr, step_ptr, sequence_ids_ptr,
    order_ptr, turn_ptr, word_ptr,
    length, row_stride, chunks, value_low, value_high, mask_token_id, seed_low, seed_high, step_number,
    RULE: tl.constexpr, ORDER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """order [B, L] of every position; turn (0: the rule takes it) where the rule looks at a position alone.

    word [B, L]: the 31 random bits of each position, where a later kernel needs it. Grid: (B * chunks,).
    """
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    position = (program % chunks) * CHUNK + tl.arange(0, CHUNK)
    first, last = _bounds(block_start_ptr, block_end_ptr, active_ptr, b, length)
    at = b * length + position
    candidate = (position >= first) & (position < last)
    candidate &= tl.load(token_ids_ptr + b * row_stride + position, mask=candidate, other=0) == mask_token_id
    index = _sample_index(index_ptr, at, candidate)
    candidate &= index >= 0
    token = tl.load(token_ptr + index, mask=candidate, other=-1)
    candidate &= (token >= 0) & (token != mask_token_id)
    log_prob = tl.load(log_prob_ptr + index, mask=candidate, other=0.0)
    entropy = tl.load(entropy_ptr + index, mask=candidate, other=0.0)
    margin = tl.load(margin_ptr + index, mask=candidate, other=0.0)

    seed = as_int64(seed_low, seed_high) if seed_ptr is None else tl.load(seed_ptr)
    step = step_number.to(tl.int64) if step_ptr is None else tl.load(step_ptr)
    sequence = b if sequence_ids_ptr is None else tl.load(sequence_ids_ptr + b)
    word = tl.zeros([CHUNK], tl.uint32)
    if ORDER == RANDOM:
        word, _ = philox(seed, sequence, position.to(tl.int64), step, DRAW_ORDER)
        word = word >> 1
    if ORDER == CONFIDENCE:
        order = _order(log_prob, position, ORDER)
    elif ORDER == MARGIN:
        order = _order(margin, position, ORDER)
    elif ORDER == ENTROPY:
        order = _order(-entropy, position, ORDER)
    else:
        order = _order(word, position, ORDER)
    inside = position < length
    tl.store(order_ptr + at, tl.where(candidate, order, NO_CANDIDATE), mask=inside)
    if word_ptr is not None:
        tl.store(word_ptr + at, word.to(tl.int64), mask=inside)

    value = _value(values_ptr, value_low, value_high, b)
    if RULE == THRESHOLD:
        taken = _reaches(log_prob, entropy, margin, word, value, ORDER)
        tl.store(turn_ptr + at, tl.where(taken, 0, 1), mask=inside)
    if RULE == ANCESTRAL:
        w0, w1 = philox(seed, sequence, position.to(tl.int64), step, DRAW_ANCESTRAL)
        tl.store(turn_ptr + at, tl.where(uniform53(w0, w1) < value, 0, 1), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def rank_kernel(
    log_prob_ptr, entropy_ptr, margin_ptr, index_ptr, block_start_ptr, block_end_ptr, active_ptr, values_ptr,
    order_ptr, turn_ptr, word_ptr, failure_ptr,
    length, chunks, value_low, value_high,
    RULE: tl.constexpr, ORDER: tl.constexpr, CHUNK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """turn [B, L], a candidate's rank in its row; failure [B, chunks], the first rank whose rule does not hold.

    Grid: (B * chunks,); each compares its CHUNK positions with all of the row's block, OTHERS at a time, in order.
    """
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    start = (program % chunks) * CHUNK
    first, last = _bounds(block_start_ptr, block_end_ptr, active_ptr, b, length)
    if (start >= last) | (start + CHUNK <= first):
        tl.store(failure_ptr + program, NEVER)
    else:
        position = start + tl.arange(0, CHUNK)
        at = b * length + position
        order = tl.load(order_ptr + at, mask=position < length, other=NO_CANDIDATE)
        candidate = order != NO_CANDIDATE
        rank = tl.zeros([CHUNK], tl.int32)
        spent = tl.zeros([CHUNK], tl.float64)  # the entropies of better candidates
        for begin in range(first, last, OTHERS):
            other = begin + tl.arange(0, OTHERS)
            other_at = b * length + other
            other_order = tl.load(order_ptr + other_at, mask=other < last, other=NO_CANDIDATE)
            better = other_order[None, :] > order[:, None]
            rank += tl.sum(better.to(tl.int32), axis=1)
            if RULE == ENTROPY_BUDGET:
                there = other_order != NO_CANDIDATE
                index = _sample_index(index_ptr, other_at, there)
                entropy = tl.load(entropy_ptr + index, mask=there, other=0.0).to(tl.float64)
                cost = tl.where(entropy == entropy, tl.where(entropy > 0.0, entropy, 0.0), float("inf"))
                spent += tl.sum(tl.where(better, cost[None, :], 0.0), axis=1)

        value = _value(values_ptr, value_low, value_high, b)
        index = _sample_index(index_ptr, at, candidate)
        if RULE == COUNT:
            holds = rank.to(tl.float64) < value
        elif RULE == FACTOR:
            word = tl.zeros([CHUNK], tl.int64)
            if word_ptr is not None:
                word = tl.load(word_ptr + at, mask=candidate, other=0)
            score = _score(log_prob_ptr, entropy_ptr, margin_ptr, index, candidate, word, ORDER)
            holds = score > 1.0 - value / (rank.to(tl.float64) + 2.0)
        else:
            holds = spent <= value
        tl.store(turn_ptr + at, rank, mask=candidate)
        tl.store(failure_ptr + program, tl.min(tl.where(candidate & (holds == 0), rank, NEVER)))


@triton.jit(do_not_specialize=_SIZES)
def commit_kernel(
    token_ids_ptr, token_ptr, index_ptr, order_ptr, turn_ptr, failure_ptr, committed_ptr,
    length, row_stride, chunks, CHUNK: tl.constexpr, RULE: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Writes the tokens whose turn it is, or where there is none the best one (not under ANCESTRAL). Grid: (B,)."""
    b = tl.program_id(0).to(tl.int64)
    limit = tl.full([], 1, tl.int32)
    if RANKED:
        failures = tl.full([CHUNK], NEVER, tl.int32)
        for begin in range(0, chunks, CHUNK):
            chunk = begin + tl.arange(0, CHUNK)
            failures = tl.minimum(failures, tl.load(failure_ptr + b * chunks + chunk, mask=chunk < chunks, other=NEVER))
        limit = tl.min(failures)
    best = tl.full([CHUNK], NO_CANDIDATE, tl.int64)
    first_turn = tl.full([CHUNK], NEVER, tl.int32)
    for begin in range(0, length, CHUNK):
        position = begin + tl.arange(0, CHUNK)
        at = b * length + position
        order = tl.load(order_ptr + at, mask=position < length, other=NO_CANDIDATE)
        turn = tl.load(turn_ptr + at, mask=order != NO_CANDIDATE, other=NEVER)
        best = tl.maximum(best, order)
        first_turn = tl.minimum(first_turn, turn)
    best = tl.max(best)
    none = tl.min(first_turn) >= limit

    committed = tl.zeros([CHUNK], tl.int64)
    for begin in range(0, length, CHUNK):
        position = begin + tl.arange(0, CHUNK)
        at = b * length + position
        order = tl.load(order_ptr + at, mask=position < length, other=NO_CANDIDATE)
        candidate = order != NO_CANDIDATE
        turn = tl.load(turn_ptr + at, mask=candidate, other=NEVER)
        taken = candidate & (turn < limit)
        if RULE != ANCESTRAL:
            taken |= candidate & none & (order == best)
        index = _sample_index(index_ptr, at, taken)
        token = tl.load(token_ptr + index, mask=taken, other=0)
        tl.store(token_ids_ptr + b * row_stride + position, token, mask=taken)
        committed += taken.to(tl.int64)
    tl.store(committed_ptr + b, tl.sum(committed))
