"""bias_activation's Triton launches, on tensors that fastdiff.ops has checked; the kernels are in triton_device.py."""

import torch
import triton
from torch import Tensor

from fastdiff.kernels.bias_activation import triton_device as device

ROWS, MIN_COLS, MAX_COLS = 16, 32, 128  # a program's tile
SUM_ROWS, SUM_COLS = 32, 32
MAX_COLUMN_TILES = 65535  # a grid's second dimension


def _launch(x: Tensor) -> tuple[int, int, tuple[int, int], dict[str, int]]:
    """(rows, dim, grid, tile) of x [..., D]. Raises ValueError where the grid would be too large."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    cols = min(max(triton.next_power_of_2(dim), MIN_COLS), MAX_COLS)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(dim, cols))
    if grid[1] > MAX_COLUMN_TILES or rows > 2**31 - ROWS:
        most = f"{2**31 - ROWS} rows of {MAX_COLUMN_TILES * cols}"
        raise ValueError(f"x: got {rows} rows of {dim} elements; expected at most {most}: split it")
    return rows, dim, grid, {"ROWS": ROWS, "COLS": cols}


def bias_activation_out(
    x: Tensor,  # [..., D] contiguous, fp32, bf16 or fp16
    bias: Tensor | None,  # [D] fp32
    up: Tensor | None,  # like x
    up_bias: Tensor | None,  # [D] fp32
    activation: int,
    out: Tensor,  # like x; may be x or up
) -> None:
    """out = act(x + bias), or act(x + bias) · (up + up_bias)."""
    if x.numel() == 0:
        return
    rows, dim, grid, tile = _launch(x)
    with torch.cuda.device_of(x):
        device.forward_kernel[grid](
            x_ptr=x, bias_ptr=bias, up_ptr=up, up_bias_ptr=up_bias, out_ptr=out, rows=rows, dim=dim,
            ACTIVATION=activation, num_warps=4, **tile,
        )  # fmt: skip


def bias_activation(x, bias, up, up_bias, activation) -> Tensor:
    """The same in a new tensor."""
    out = torch.empty_like(x)
    bias_activation_out(x, bias, up, up_bias, activation, out)
    return out


def bias_activation_backward(
    grad_out: Tensor,  # like x
    x: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: int,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up, bias and up_bias; what is absent or not wanted has no element."""
    grad_x = torch.empty_like(x)
    grad_up = x.new_empty(0) if up is None else torch.empty_like(x)
    wanted = [b is not None and need_bias for b in (bias, up_bias)]
    none, kinds = x.new_empty(0, dtype=torch.float32), 1 if up is None else 2
    if x.numel() == 0:  # sums over no rows
        zeros = (torch.zeros_like(b) if want else none for b, want in zip((bias, up_bias), wanted, strict=True))
        return grad_x, grad_up, *zeros
    rows, dim, grid, tile = _launch(x)
    sums = x.new_empty(grid[0], kinds * dim, dtype=torch.float32) if any(wanted) else None
    with torch.cuda.device_of(x):
        device.backward_kernel[grid](
            grad_out_ptr=grad_out, x_ptr=x, bias_ptr=bias, up_ptr=up, up_bias_ptr=up_bias, grad_x_ptr=grad_x,
            grad_up_ptr=None if up is None else grad_up, sums_ptr=sums, rows=rows, dim=dim, ACTIVATION=activation,
            num_warps=4, **tile,
        )  # fmt: skip
        if sums is None:
            return grad_x, grad_up, none, none
        total = sums.new_empty(kinds * dim)
        device.sums_kernel[(triton.cdiv(kinds * dim, SUM_COLS),)](
            sums_ptr=sums, out_ptr=total, segments=grid[0], columns=kinds * dim, ROWS=SUM_ROWS, COLS=SUM_COLS,
            num_warps=4,
        )  # fmt: skip
    grads = total.view(kinds, dim).unbind()
    # a clone: the operator's results are apart from each other
    return grad_x, grad_up, *(grads[i].clone() if want else none for i, want in enumerate(wanted))
