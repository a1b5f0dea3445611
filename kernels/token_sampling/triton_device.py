"""Token sampling in Triton: the device code. triton_kernels.py launches it; README.md has the mathematics.

A program of `block_kernel` reads one block of 1 024 ids of one row and leaves a record in a workspace; a program of a
draw kernel combines a row's records, draws a block, and scans that block again. An absent operand is None, which
compiles away.
Row and block numbers fit in 32 bits (the launch functions check it); offsets in elements have 64.
Arguments that change with the batch or the request are not specialised on, so that neither compiles anything.
"""

import triton
import triton.language as tl

from fastdiff.kernels.common.triton_logits import (
    BLOCK,
    END,
    SUPPRESSED,
    WIDTH,
    block_ids,
    lane_sums,
    load_logits,
    row_offset,
)
from fastdiff.kernels.common.triton_math import DRAW_TOKEN, as_double, as_int64, expm1, log1p, philox, uniform53

CELL = tl.constexpr(128)  # what a fused head computes again

# Fields of the records [FIELDS, rows, blocks], fp64. All but the maximum and SUM leave the block's first argmax out.
MAXIMUM = tl.constexpr(0)  # NaN where the block has NaN or +inf
SECOND = tl.constexpr(1)  # the largest logit of the others
OTHERS = tl.constexpr(2)  # sum of exp(z - maximum)
WEIGHTED = tl.constexpr(3)  # sum of exp(z - maximum) * (z - maximum)
END_MASS = tl.constexpr(4)  # sum of exp(z - maximum) over end tokens
SUM = tl.constexpr(5)  # sum of exp((z - maximum) / temperature) over the kept ids
FIELDS = 6

_CALL = ["rows", "length", "batch_stride", "row_stride", "temperature_low", "temperature_high"]
_TILE = ["first_block", "tile_blocks"]
_RANDOM = ["seed_low", "seed_high", "step_number"]


@triton.jit
def _temperature(temperatures_ptr, row, temperature_low, temperature_high):
    if temperatures_ptr is None:
        temperature = as_double(temperature_low, temperature_high)
    else:
        temperature = tl.load(temperatures_ptr + row).to(tl.float64)
    return temperature


@triton.jit
def _inverse(temperature):
    """1 / T within fp32's normal numbers; 1 where T is 0 and nothing is drawn."""
    drawn = temperature > 0
    inverse = tl.where(drawn, 1.0 / tl.where(drawn, temperature, 1.0), 1.0)
    return tl.maximum(tl.minimum(inverse, 3.4028234663852886e38), 1.1754943508222875e-38).to(tl.float32)


@triton.jit
def _weights(z, maximum, inverse, SCALED: tl.constexpr):
    """exp((z - maximum) / T), fp32; SCALED: T is not 1."""
    x = z - maximum
    if SCALED:
        x = x * inverse
    return tl.exp(x)


# -------------------------------------------------------------------------------------------------------- records


@triton.jit(do_not_specialize=_CALL + _TILE)
def block_kernel(
    logits_ptr, kinds_ptr, temperatures_ptr, records_ptr, argmax_ptr, cells_ptr,
    rows, length, batch_stride, row_stride, vocab, blocks, first_block, tile_blocks, temperature_low, temperature_high,
    ALIGNED: tl.constexpr, ENDS: tl.constexpr, SUMS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The record of one block of a row, and the sums of its cells. Grid: (rows * tile_blocks,).

    logits hold the ids from first_block * BLOCK on. SUMS: SUM is wanted, and every allowed id is kept.
    """
    program = tl.program_id(0)
    row = program // tile_blocks
    block = first_block + program % tile_blocks
    offset = row_offset(row, length, batch_stride, row_stride, ALIGNED) - first_block.to(tl.int64) * BLOCK
    ids = block_ids(block * BLOCK)
    z = load_logits(logits_ptr + offset, ids, vocab, kinds_ptr)

    invalid = tl.max(((z != z) | (z == float("inf"))).to(tl.int32))
    z = tl.where(z != z, float("-inf"), z)
    maximum = tl.max(z)
    origin = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
    argmax = tl.min(tl.where(z == maximum, ids, 2147483647))
    is_top = ids == argmax
    second = tl.max(tl.where(is_top, float("-inf"), z))
    weights = tl.exp(z - origin)
    others = tl.where(is_top, 0.0, weights)
    sum_of_others = tl.sum(lane_sums(others))
    weighted = tl.sum(lane_sums(tl.where(others > 0, others * (z - origin), 0.0)))

    field = rows.to(tl.int64) * blocks
    at = row.to(tl.int64) * blocks + block
    tl.store(argmax_ptr + at, argmax)
    tl.store(records_ptr + MAXIMUM * field + at, tl.where(invalid > 0, float("nan"), maximum).to(tl.float64))
    tl.store(records_ptr + SECOND * field + at, second.to(tl.float64))
    tl.store(records_ptr + OTHERS * field + at, sum_of_others)
    tl.store(records_ptr + WEIGHTED * field + at, weighted)
    if ENDS:
        is_end = tl.load(kinds_ptr + ids, mask=ids < vocab, other=0) == END
        tl.store(records_ptr + END_MASS * field + at, tl.sum(lane_sums(tl.where(is_end, others, 0.0))))
    if SUMS:
        lanes = lane_sums(_weights(z, origin, _inverse(_temperature(
            temperatures_ptr, row, temperature_low, temperature_high)), SCALED))  # fmt: skip
        tl.store(records_ptr + SUM * field + at, tl.sum(lanes))
        if cells_ptr is not None:
            cells = tl.sum(tl.reshape(lanes, [BLOCK // CELL, CELL // WIDTH]), axis=1)
            tl.store(cells_ptr + at * (BLOCK // CELL) + tl.arange(0, BLOCK // CELL), cells)


# ----------------------------------------------------------------------------------------------------------- draw


@triton.jit
def _statistics(
    records_ptr, argmax_ptr, kinds_ptr, entropy_ptr, margin_ptr, end_log_prob_ptr, row, rows, blocks,
    NBLOCKS: tl.constexpr,
):  # fmt: skip
    """Combines a row's records; stores all statistics but the token's.

    Returns valid, the maximum (0 where not valid), its first id, the blocks' maxima less it (-inf: nothing there), and
    the log of the normaliser.
    """
    block = tl.arange(0, NBLOCKS)
    inside = block < blocks
    at = row.to(tl.int64) * blocks + block
    field = rows.to(tl.int64) * blocks
    maxima = tl.load(records_ptr + MAXIMUM * field + at, mask=inside, other=float("-inf"))
    invalid = tl.max((maxima != maxima).to(tl.int32))
    maxima = tl.where(maxima != maxima, float("-inf"), maxima)
    maximum = tl.max(maxima)
    valid = (invalid == 0) & (maximum > float("-inf"))
    maximum = tl.where(valid, maximum, 0.0)
    live = maxima > float("-inf")
    distance = tl.where(live, maxima - maximum, 0.0)
    scale = tl.where(live, tl.exp(distance), 0.0)
    top_block = tl.min(tl.where((maxima == maximum) & inside, block, NBLOCKS))
    is_top = block == top_block
    argmaxes = tl.load(argmax_ptr + at, mask=inside, other=0)
    top = tl.max(tl.where(is_top, argmaxes, 0))

    others = tl.load(records_ptr + OTHERS * field + at, mask=inside, other=0.0)
    weighted = tl.load(records_ptr + WEIGHTED * field + at, mask=inside, other=0.0)
    second = tl.load(records_ptr + SECOND * field + at, mask=inside, other=float("-inf"))
    second = tl.max(tl.where(is_top, second, maxima)) - maximum
    all_others = tl.sum(scale * (others + tl.where(is_top, 0.0, 1.0)))
    all_weighted = tl.sum(scale * (weighted + distance * (others + 1.0)))
    log_normaliser = log1p(all_others)
    entropy = log_normaliser - all_weighted / (1.0 + all_others)
    margin = (0.0 - expm1(second)) / (1.0 + all_others)
    tl.store(entropy_ptr + row, tl.where(valid, entropy, float("nan")).to(tl.float32))
    tl.store(margin_ptr + row, tl.where(valid, margin, float("nan")).to(tl.float32))
    if end_log_prob_ptr is not None:
        mass = tl.load(records_ptr + END_MASS * field + at, mask=inside, other=0.0)
        ends = tl.load(kinds_ptr + argmaxes, mask=live & inside, other=0) == END
        rest = tl.sum(scale * (mass + tl.where(ends & (block != top_block), 1.0, 0.0)))
        top_is_end = tl.max((ends & is_top).to(tl.int32)) > 0
        end_mass = tl.where(top_is_end, log1p(rest), tl.log(rest)) - log_normaliser
        tl.store(end_log_prob_ptr + row, tl.where(valid, end_mass, float("nan")).to(tl.float32))
    return valid, maximum, top, tl.where(live, distance, float("-inf")), log_normaliser


@triton.jit
def _pick(weights, rest, index, END_INDEX: tl.constexpr):
    """(index, sum before it) of the first weight > 0 whose inclusive sum exceeds `rest`, else of the last > 0; fp64."""
    cumulative = tl.cumsum(weights, axis=0)
    positive = weights > 0
    chosen = tl.min(tl.where(positive & (cumulative > rest), index, END_INDEX))
    chosen = tl.minimum(chosen, tl.max(tl.where(positive, index, 0)))
    return chosen, tl.sum(tl.where(index == chosen - 1, cumulative, 0.0))


@triton.jit
def _draw_block(
    records_ptr, temperatures_ptr, seed_ptr, step_ptr, sequence_ids_ptr, positions_ptr, distance,
    row, rows, length, blocks, temperature_low, temperature_high, seed_low, seed_high, step_number,
    NBLOCKS: tl.constexpr,
):  # fmt: skip
    """The drawn block, its maximum (fp32), and what is left of u * total there, in the block's own scale."""
    if seed_ptr is None:
        seed = as_int64(seed_low, seed_high)
    else:
        seed = tl.load(seed_ptr)
    step = step_number.to(tl.int64) if step_ptr is None else tl.load(step_ptr)
    sequence = (row // length).to(tl.int64) if sequence_ids_ptr is None else tl.load(sequence_ids_ptr + row)
    position = (row % length).to(tl.int64) if positions_ptr is None else tl.load(positions_ptr + row)
    w0, w1 = philox(seed, sequence, position, step, DRAW_TOKEN)

    block = tl.arange(0, NBLOCKS)
    at = row.to(tl.int64) * blocks + block
    field = rows.to(tl.int64) * blocks
    sums = tl.load(records_ptr + SUM * field + at, mask=block < blocks, other=0.0)
    temperature = _temperature(temperatures_ptr, row, temperature_low, temperature_high)
    inverse = _inverse(temperature).to(tl.float64)
    weights = tl.where(distance > float("-inf"), sums * tl.exp(distance * inverse), 0.0)
    target = uniform53(w0, w1) * tl.sum(weights)
    chosen, before = _pick(weights, target, block, NBLOCKS)
    below = tl.max(tl.where(block == chosen, distance, float("-inf")))
    rest = tl.maximum(target - before, 0.0) * tl.exp(-below * inverse)
    maximum = tl.load(records_ptr + MAXIMUM * field + row.to(tl.int64) * blocks + chosen)
    return chosen, maximum.to(tl.float32), rest


@triton.jit
def _store_token(token_ptr, log_prob_ptr, row, valid, token, log_prob):
    tl.store(token_ptr + row, tl.where(valid, token, -1).to(tl.int64))
    tl.store(log_prob_ptr + row, tl.where(valid, log_prob, float("nan")).to(tl.float32))


@triton.jit(do_not_specialize=_CALL + _RANDOM)
def draw_kernel(
    logits_ptr, kinds_ptr, temperatures_ptr, thresholds_ptr, records_ptr, argmax_ptr,
    seed_ptr, step_ptr, sequence_ids_ptr, positions_ptr,
    token_ptr, log_prob_ptr, entropy_ptr, margin_ptr, end_log_prob_ptr,
    rows, length, batch_stride, row_stride, vocab, blocks, temperature_low, temperature_high,
    seed_low, seed_high, step_number,
    ALIGNED: tl.constexpr, GREEDY: tl.constexpr, SCALED: tl.constexpr, NBLOCKS: tl.constexpr,
):  # fmt: skip
    """Token and statistics of a row from its records and one block of logits. Grid: (rows,)."""
    row = tl.program_id(0)
    valid, maximum, top, distance, log_normaliser = _statistics(
        records_ptr, argmax_ptr, kinds_ptr, entropy_ptr, margin_ptr, end_log_prob_ptr, row, rows, blocks, NBLOCKS
    )
    token = top
    log_prob = -log_normaliser
    if not GREEDY:
        chosen, block_maximum, rest = _draw_block(
            records_ptr, temperatures_ptr, seed_ptr, step_ptr, sequence_ids_ptr, positions_ptr, distance, row, rows,
            length, blocks, temperature_low, temperature_high, seed_low, seed_high, step_number, NBLOCKS,
        )  # fmt: skip
        temperature = _temperature(temperatures_ptr, row, temperature_low, temperature_high)
        index = tl.arange(0, BLOCK)
        offset = row_offset(row, length, batch_stride, row_stride, ALIGNED)
        z = load_logits(logits_ptr + offset, chosen * BLOCK + index, vocab, kinds_ptr)
        weights = _weights(z, block_maximum, _inverse(temperature), SCALED)
        if thresholds_ptr is not None:
            weights = tl.where(z >= tl.load(thresholds_ptr + row), weights, 0.0)
        weights = tl.where(z > float("-inf"), weights, 0.0).to(tl.float64)
        picked, _ = _pick(weights, rest, index, BLOCK)
        drawn_z = tl.max(tl.where(index == picked, z, float("-inf")))
        drawn = temperature > 0
        token = tl.where(drawn, chosen * BLOCK + picked, token)
        log_prob = tl.where(drawn, drawn_z.to(tl.float64) - maximum - log_normaliser, log_prob)
    _store_token(token_ptr, log_prob_ptr, row, valid, token, log_prob)


@triton.jit
def _head_logits(
    hidden_ptr, weight_ptr, bias_ptr, kinds_ptr, row, ids, vocab, dim, weight_stride,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The logits of `ids` [CELL], computed in fp32 and rounded to hidden's dtype; -inf where an id is not allowed."""
    inside = ids < vocab
    hidden_offset = row.to(tl.int64) * dim
    weight_offset = ids.to(tl.int64) * weight_stride
    if ALIGNED:
        hidden_offset = tl.multiple_of(hidden_offset, 16)
    products = tl.zeros([CELL, CHUNK], tl.float32)
    for first in range(0, dim, CHUNK):
        column = first + tl.arange(0, CHUNK)
        h = tl.load(hidden_ptr + hidden_offset + column, mask=column < dim, other=0.0).to(tl.float32)
        mask = inside[:, None] & (column < dim)[None, :]
        w = tl.load(weight_ptr + weight_offset[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        products += h[None, :] * w
    z = tl.sum(products, axis=1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + ids, mask=inside, other=0.0).to(tl.float32)
    z = z.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    if kinds_ptr is not None:
        inside = inside & (tl.load(kinds_ptr + ids, mask=inside, other=0) != SUPPRESSED)
    return tl.where(inside, z, float("-inf"))


@triton.jit(do_not_specialize=_CALL + _RANDOM)
def draw_head_kernel(
    hidden_ptr, weight_ptr, bias_ptr, kinds_ptr, temperatures_ptr, records_ptr, argmax_ptr, cells_ptr,
    seed_ptr, step_ptr, sequence_ids_ptr, positions_ptr,
    token_ptr, log_prob_ptr, entropy_ptr, margin_ptr, end_log_prob_ptr,
    rows, length, vocab, blocks, dim, weight_stride, temperature_low, temperature_high,
    seed_low, seed_high, step_number,
    ALIGNED: tl.constexpr, SCALED: tl.constexpr, NBLOCKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The same where no logits are left: those of the drawn cell are computed again. Grid: (rows,)."""
    row = tl.program_id(0)
    valid, maximum, top, distance, log_normaliser = _statistics(
        records_ptr, argmax_ptr, kinds_ptr, entropy_ptr, margin_ptr, end_log_prob_ptr, row, rows, blocks, NBLOCKS
    )
    chosen, block_maximum, rest = _draw_block(
        records_ptr, temperatures_ptr, seed_ptr, step_ptr, sequence_ids_ptr, positions_ptr, distance, row, rows,
        length, blocks, temperature_low, temperature_high, seed_low, seed_high, step_number, NBLOCKS,
    )  # fmt: skip
    cells = tl.arange(0, BLOCK // CELL)
    at = row.to(tl.int64) * blocks + chosen
    cell, before = _pick(tl.load(cells_ptr + at * (BLOCK // CELL) + cells), rest, cells, BLOCK // CELL)
    index = tl.arange(0, CELL)
    first = chosen * BLOCK + cell * CELL
    z = _head_logits(
        hidden_ptr, weight_ptr, bias_ptr, kinds_ptr, row, first + index, vocab, dim, weight_stride, ALIGNED, CHUNK
    )
    temperature = _temperature(temperatures_ptr, row, temperature_low, temperature_high)
    weights = _weights(z, block_maximum, _inverse(temperature), SCALED)
    picked, _ = _pick(weights.to(tl.float64), tl.maximum(rest - before, 0.0), index, CELL)
    drawn_z = tl.max(tl.where(index == picked, z, float("-inf"))).to(tl.float64) - maximum
    token = first + picked
    token = tl.where(temperature > 0, token, top)
    # the product that chose the maximum may have rounded it another way
    log_prob = tl.where(token == top, 0.0, tl.minimum(drawn_z, 0.0)) - log_normaliser
    _store_token(token_ptr, log_prob_ptr, row, valid, token, log_prob)
