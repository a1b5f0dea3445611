"""top-k and top-p in Triton: the device code. triton_kernels.py launches it; README.md has the mathematics.

A program of `threshold_kernel` finds the smallest logit that a row keeps, from the records of block_kernel and up to 32
readings for each of the two; one of `kept_sum_kernel` completes a block's record with the weights that are left.
"""

import triton
import triton.language as tl

from fastdiff.kernels.common.triton_logits import (
    BLOCK,
    LANES,
    WIDTH,
    block_ids,
    lane_sums,
    load_logits,
    row_offset,
)
from fastdiff.kernels.common.triton_math import as_double

from .triton_device import _CALL, MAXIMUM, SUM, _inverse, _temperature, _weights

_THRESHOLD = ["top_k", "top_p_low", "top_p_high"]


@triton.jit
def _as_float(key):
    """The fp32 number whose place in the order of all numbers `key` (int64) is; see _as_key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _as_key(number):
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _above(
    ptr, kinds_ptr, maxima_ptr, vocab, blocks, threshold, maximum, inverse,
    COUNT: tl.constexpr, SCALED: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """How many logits of a row are >= threshold, or the sum of their weights; SPAN blocks at a time, in order.

    Blocks whose maximum is below the threshold are not read.
    """
    total = tl.zeros([SPAN * LANES], tl.float64)
    for first in range(0, blocks, SPAN):
        block = first + tl.arange(0, SPAN)
        if tl.max(tl.load(maxima_ptr + block, mask=block < blocks, other=float("-inf"))) >= threshold:
            ids = first * BLOCK + tl.arange(0, SPAN * LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            z = load_logits(ptr, ids, vocab, kinds_ptr)
            kept = (z >= threshold) & (z > float("-inf"))
            if COUNT:
                total += lane_sums(kept.to(tl.float32))
            else:
                total += lane_sums(tl.where(kept, _weights(z, maximum, inverse, SCALED), 0.0))
    return tl.sum(total)


@triton.jit(do_not_specialize=_CALL + _THRESHOLD)
def threshold_kernel(
    logits_ptr, kinds_ptr, temperatures_ptr, records_ptr, thresholds_ptr,
    rows, length, batch_stride, row_stride, vocab, blocks, temperature_low, temperature_high,
    top_k, top_p_low, top_p_high,
    ALIGNED: tl.constexpr, SCALED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
    NBLOCKS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The smallest logit that top-k, then top-p keep: bisection over all fp32 numbers. Grid: (rows,)."""
    row = tl.program_id(0)
    ptr = logits_ptr + row_offset(row, length, batch_stride, row_stride, ALIGNED)
    maxima_ptr = records_ptr + row.to(tl.int64) * blocks  # MAXIMUM is the first field
    block = tl.arange(0, NBLOCKS)
    maxima = tl.load(maxima_ptr + block, mask=block < blocks, other=float("-inf"))
    invalid = tl.max((maxima != maxima).to(tl.int32))
    maximum = tl.max(tl.where(maxima != maxima, float("-inf"), maxima)).to(tl.float32)
    temperature = _temperature(temperatures_ptr, row, temperature_low, temperature_high)
    inverse = _inverse(temperature)

    # `low` is kept by every test so far, `high` by none; they meet at a logit
    low = _as_key(tl.full([], float("-inf"), tl.float32))
    end = _as_key(maximum) + 1
    searched = (invalid == 0) & (maximum > float("-inf")) & (temperature > 0)
    end = tl.where(searched, end, low + 1)
    if TOP_K:
        high = end
        while low + 1 < high:
            middle = (low + high) >> 1
            count = _above(
                ptr, kinds_ptr, maxima_ptr, vocab, blocks, _as_float(middle), maximum, inverse, True, SCALED, SPAN
            )
            low, high = tl.where(count >= top_k, middle, low), tl.where(count >= top_k, high, middle)
    if TOP_P:
        high = end
        total = _above(ptr, kinds_ptr, maxima_ptr, vocab, blocks, _as_float(low), maximum, inverse, False, SCALED, SPAN)
        wanted = as_double(top_p_low, top_p_high) * total
        while low + 1 < high:
            middle = (low + high) >> 1
            mass = _above(
                ptr, kinds_ptr, maxima_ptr, vocab, blocks, _as_float(middle), maximum, inverse, False, SCALED, SPAN
            )
            low, high = tl.where(mass >= wanted, middle, low), tl.where(mass >= wanted, high, middle)
    tl.store(thresholds_ptr + row, _as_float(low))


@triton.jit(do_not_specialize=_CALL)
def kept_sum_kernel(
    logits_ptr, kinds_ptr, temperatures_ptr, thresholds_ptr, records_ptr,
    rows, length, batch_stride, row_stride, vocab, blocks, temperature_low, temperature_high,
    ALIGNED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """SUM of one block where a threshold says which ids are kept. Grid: (rows * blocks,)."""
    program = tl.program_id(0)
    row = program // blocks
    block = program % blocks
    at = row.to(tl.int64) * blocks + block
    threshold = tl.load(thresholds_ptr + row)
    maximum = tl.load(records_ptr + MAXIMUM * (rows.to(tl.int64) * blocks) + at).to(tl.float32)
    total = tl.zeros([], tl.float64)
    if (maximum >= threshold) & (tl.abs(maximum) < float("inf")):
        offset = row_offset(row, length, batch_stride, row_stride, ALIGNED)
        z = load_logits(logits_ptr + offset, block_ids(block * BLOCK), vocab, kinds_ptr)
        inverse = _inverse(_temperature(temperatures_ptr, row, temperature_low, temperature_high))
        total = tl.sum(lane_sums(tl.where(z >= threshold, _weights(z, maximum, inverse, SCALED), 0.0)))
    tl.store(records_ptr + SUM * (rows.to(tl.int64) * blocks) + at, total)
