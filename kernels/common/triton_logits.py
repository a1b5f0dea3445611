"""What Triton kernels on rows of logits share: blocks of 1 024 ids, which ids are left out, a head's product by tiles.

logits are [B, L, V] with a contiguous last dimension and any other strides. Ids and their logits are [LANES, WIDTH]: 8
terms are added in fp32, the lanes in fp64. `kinds` says of each id whether it is suppressed or an end token (None:
neither).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(1024)
LANES = tl.constexpr(128)
WIDTH = tl.constexpr(8)

SUPPRESSED = tl.constexpr(1)  # kinds
END = tl.constexpr(2)

MAX_PROGRAMS = 2**31 - 1  # a grid's first dimension
MAX_VOCAB = 1024 * 1024  # what is left of a row's blocks is combined in registers
MIN_RECORDS = 16


def count_blocks(rows: int, vocab: int) -> int:
    """The number of blocks per row. Raises ValueError where a launch cannot count the programs."""
    blocks = triton.cdiv(vocab, BLOCK.value)
    if vocab > MAX_VOCAB:
        raise ValueError(f"logits: {vocab} ids; the triton backend takes at most {MAX_VOCAB}: use another backend")
    if rows * blocks > MAX_PROGRAMS:
        most = MAX_PROGRAMS // blocks
        raise ValueError(
            f"logits: {rows} rows; the triton backend takes at most {most} of {vocab} ids: split the batch"
        )
    return blocks


def padded_blocks(blocks: int) -> int:
    """How many blocks a program has registers for that combines a row's."""
    return max(triton.next_power_of_2(blocks), MIN_RECORDS)


def aligned(tensor: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 elements from the first."""
    return all(stride % 16 == 0 for stride in tensor.stride()[:-1])


def kinds_of(vocab: int, device: torch.device, *lists: tuple[Tensor | None, tl.constexpr]) -> Tensor | None:
    """uint8 [V]: of each id what the last list that has it says, 0 where none has; None where there is no list."""
    if all(ids is None for ids, _ in lists):
        return None
    kinds = torch.zeros(vocab, dtype=torch.uint8, device=device)
    for ids, kind in lists:
        if ids is not None:
            kinds.index_fill_(0, ids, kind.value)
    return kinds


def head_tiles(
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    logits: Tensor,  # [R, tile]: where each tile lies
) -> Iterator[tuple[int, int]]:
    """Makes logits by torch's product, one tile of ids at a time; yields the tile's first id and the one after it."""
    vocab, tile = weight.shape[0], logits.shape[1]
    for begin in range(0, vocab, tile):
        end = min(begin + tile, vocab)
        part, view = weight[begin:end].t(), logits[:, : end - begin]
        if bias is None:
            torch.mm(hidden, part, out=view)
        else:
            torch.addmm(bias[begin:end], hidden, part, out=view)
        yield begin, end


@triton.jit
def row_offset(row, length, batch_stride, row_stride, ALIGNED: tl.constexpr):
    """Where the logits of row b * length + l start, in elements. ALIGNED: both strides are multiples of 16."""
    offset = (row // length).to(tl.int64) * batch_stride + (row % length).to(tl.int64) * row_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def load_logits(ptr, ids, vocab, kinds_ptr):
    """ptr[ids] as fp32; -inf where an id is suppressed or past the last one."""
    inside = ids < vocab
    z = tl.load(ptr + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if kinds_ptr is not None:
        z = tl.where(tl.load(kinds_ptr + ids, mask=inside, other=0) == SUPPRESSED, float("-inf"), z)
    return z


@triton.jit
def block_ids(first):
    return first + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def lane_sums(t):
    """[LANES, WIDTH] -> [LANES]: 8 terms in fp32, then fp64."""
    return tl.sum(t, axis=1).to(tl.float64)
