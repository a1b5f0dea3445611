"""scale_shift in Triton: the kernel, and its launch on tensors that fastdiff.ops has checked."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_TILE, MAX_TILE = 128, 1024  # columns of a program
MAX_PROGRAMS = 2**31 - 1  # a grid's first dimension


@triton.jit(do_not_specialize=["tokens", "tiles"])
def scale_shift_kernel(x_ptr, scale_ptr, shift_ptr, out_ptr, tokens, dim, tiles, TILE: tl.constexpr):
    """One tile of one row. Grid: (rows * tiles,)."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    sample, inside = row // tokens, i < dim
    x = tl.load(x_ptr + row * dim + i, mask=inside).to(tl.float32)
    scale = tl.load(scale_ptr + sample * dim + i, mask=inside).to(tl.float32)
    shift = tl.load(shift_ptr + sample * dim + i, mask=inside).to(tl.float32)
    out = x * (1 + scale) + shift
    tl.store(out_ptr + row * dim + i, out.to(out_ptr.dtype.element_ty), mask=inside)


def scale_shift(
    x: Tensor,  # [B, N, D] contiguous, fp32, bf16 or fp16
    scale: Tensor,  # [B, D] contiguous, like x
    shift: Tensor,  # the same
) -> Tensor:  # like x
    """x · (1 + scale) + shift. Raises ValueError for more than 2^31 - 1 tiles of rows."""
    batch, tokens, dim = x.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    tile = min(max(triton.next_power_of_2(dim), MIN_TILE), MAX_TILE)
    tiles = triton.cdiv(dim, tile)
    if batch * tokens * tiles > MAX_PROGRAMS:
        raise ValueError(f"x: got {batch} x {tokens} rows; expected at most {MAX_PROGRAMS // tiles}: split the batch")
    with torch.cuda.device_of(x):
        scale_shift_kernel[(batch * tokens * tiles,)](
            x_ptr=x, scale_ptr=scale, shift_ptr=shift, out_ptr=out, tokens=tokens, dim=dim, tiles=tiles, TILE=tile,
            num_warps=4,
        )  # fmt: skip
    return out
