"""eos_log_prob in Triton: the device code. triton_kernels.py launches it; README.md has the mathematics.

A program of `eos_block_kernel` reads one block of 1 024 ids of one row and leaves a part in a workspace; a program of
`eos_row_kernel` puts a row's parts together. Row and block numbers fit in 32 bits (the launch functions check it);
offsets in elements have 64. Arguments that change with the batch are not specialised on: none compiles anything.
"""

import triton
import triton.language as tl

from fastdiff.kernels.common.triton_logits import BLOCK, END, block_ids, lane_sums, row_offset
from fastdiff.kernels.common.triton_math import log1p

# Fields of the parts [FIELDS, rows, blocks], fp64: of the end tokens and of the others the largest logit (-inf: none)
# and the sum of exp(z - it), NaN where one is NaN or +inf.
END_MAX = tl.constexpr(0)
END_SUM = tl.constexpr(1)
OTHER_MAX = tl.constexpr(2)
OTHER_SUM = tl.constexpr(3)
FIELDS = 4


@triton.jit
def _store_part(z, ptr, field):
    """z: the block's logits of one of the two groups, -inf elsewhere."""
    invalid = tl.max(((z != z) | (z == float("inf"))).to(tl.int32))
    z = tl.where(z != z, float("-inf"), z)
    maximum = tl.max(z)
    origin = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
    total = tl.sum(lane_sums(tl.exp(z - origin)))
    tl.store(ptr, maximum.to(tl.float64))
    tl.store(ptr + field, tl.where(invalid > 0, float("nan"), total))


@triton.jit(do_not_specialize=["rows", "length", "batch_stride", "row_stride", "first_block", "tile_blocks"])
def eos_block_kernel(
    logits_ptr, kinds_ptr, parts_ptr, rows, length, batch_stride, row_stride, vocab, blocks, first_block, tile_blocks,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The part of one block of a row; logits hold the ids from first_block * BLOCK on. Grid: (rows * tile_blocks,)."""
    program = tl.program_id(0)
    row = program // tile_blocks
    block = first_block + program % tile_blocks
    offset = row_offset(row, length, batch_stride, row_stride, ALIGNED) - first_block.to(tl.int64) * BLOCK
    ids = block_ids(block * BLOCK)
    inside = ids < vocab
    z = tl.load(logits_ptr + offset + ids, mask=inside, other=float("-inf")).to(tl.float32)
    kind = tl.load(kinds_ptr + ids, mask=inside, other=0)

    field = rows.to(tl.int64) * blocks
    at = parts_ptr + row.to(tl.int64) * blocks + block
    _store_part(tl.where(kind == END, z, float("-inf")), at + END_MAX * field, field)
    _store_part(tl.where(kind == 0, z, float("-inf")), at + OTHER_MAX * field, field)


@triton.jit
def _log_sum(ptr, field, block, blocks):
    """Maximum over the parts of one group, and the logarithm of the sum of exp(z - it)."""
    maxima = tl.load(ptr + block, mask=block < blocks, other=float("-inf"))
    sums = tl.load(ptr + field + block, mask=block < blocks, other=0.0)
    maximum = tl.max(maxima)
    origin = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
    scaled = tl.where(sums == 0.0, 0.0, sums * tl.exp(tl.minimum(maxima - origin, 0.0)))  # +inf has a NaN for a sum
    return maximum, tl.log(tl.sum(scaled))


@triton.jit(do_not_specialize=["rows"])
def eos_row_kernel(parts_ptr, end_log_prob_ptr, rows, blocks, NBLOCKS: tl.constexpr):
    """The result of a row from its parts. Grid: (rows,)."""
    row = tl.program_id(0)
    field = rows.to(tl.int64) * blocks
    ptr = parts_ptr + row.to(tl.int64) * blocks
    block = tl.arange(0, NBLOCKS)
    end_max, log_end = _log_sum(ptr + END_MAX * field, field, block, blocks)
    other_max, log_other = _log_sum(ptr + OTHER_MAX * field, field, block, blocks)
    odds = (other_max - end_max) + (log_other - log_end)
    loss = tl.maximum(odds, 0.0) + log1p(tl.exp(-tl.abs(odds)))  # NaN stays
    tl.store(end_log_prob_ptr + row, (0.0 - loss).to(tl.float32))
