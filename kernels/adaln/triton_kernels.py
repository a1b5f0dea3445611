"""AdaLN in Triton: the launch functions, on tensors that fastdiff.ops has checked. triton_device.py has the kernels.

Tensors: x, residual, branch and gradients are contiguous [B, N, D]; shift, scale and gate are [D], [1, D], [B, D] or
[B or 1, F, D] (F divides N), in place with any strides but a contiguous last dimension; weight and bias are fp32 [D];
mean and rstd are fp32 [B * N]. Each may be fp32, bf16 or fp16 where nothing else is said.

There is no autotuning: tiles and warps follow from D alone, so that a first call compiles one variant, in about a
second. tools/triton_aot.py compiles every variant that these rules can pick, and fails on a spill.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_device as device

# Widths. What stays free of spills on every target (tools/triton_aot.py checks it) sets the upper ones.
MIN_BLOCK = 128
FORWARD_MAX_BLOCK, FORWARD_TILE = 8192, 4096  # wider rows are read in tiles
BACKWARD_MAX_BLOCK, BACKWARD_TILE = 4096, 4096
BACKWARD_UNALIGNED_BLOCK = 2048  # rows that cannot be read in vectors need more registers
MAX_WARPS = 16
# What a thread may have with that many warps. Told so, ptxas does not spill a register or two to fit more programs.
MAX_REGISTERS = 65536 // (32 * MAX_WARPS)
MIN_TILE = 1024  # narrow rows share a program until its tile has this many elements
SEGMENT_TARGET = 512  # the backward pass cuts the rows into about this many segments,
MIN_SEGMENT, MAX_SEGMENT = 4, 64  # of so many rows
MAX_ROWS = 2**31 - MIN_TILE  # row numbers are 32-bit


class Modulation(NamedTuple):
    """A modulation operand as the kernels see it: [batch, frames, dim], stride 0 where it broadcasts."""

    data: Tensor | None
    batch_stride: int
    frame_stride: int
    tokens_per_frame: int

    @staticmethod
    def of(operand: Tensor | None, tokens: int) -> "Modulation":
        if operand is None or operand.ndim == 1:
            return Modulation(operand, 0, 0, max(tokens, 1))
        batch_stride = operand.stride(0) if operand.shape[0] > 1 else 0
        if operand.ndim == 2:
            return Modulation(operand, batch_stride, 0, max(tokens, 1))
        frames = operand.shape[1]
        return Modulation(operand, batch_stride, operand.stride(1) if frames > 1 else 0, max(tokens // frames, 1))

    def arguments(self, name: str) -> dict[str, object]:
        return {
            f"{name}_ptr": self.data,
            f"{name}_batch_stride": self.batch_stride,
            f"{name}_frame_stride": self.frame_stride,
            f"{name}_tokens_per_frame": self.tokens_per_frame,
        }


class Tile(NamedTuple):
    rows: int
    block: int
    num_warps: int

    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "maxnreg": MAX_REGISTERS}

    @staticmethod
    def of(dim: int, widest: int, otherwise: int, elements_per_thread: int) -> "Tile":
        """Whole rows, or tiles of width `otherwise` where a row is wider than `widest`."""
        block = max(triton.next_power_of_2(dim), MIN_BLOCK)
        rows, block = (max(MIN_TILE // block, 1), block) if block <= widest else (1, otherwise)
        return Tile(rows, block, min(max(rows * block // (32 * elements_per_thread), 4), MAX_WARPS))


REDUCE_TILE = Tile(8, 128, num_warps=4)  # what adds segments


def forward_tile(dim: int) -> Tile:
    return Tile.of(dim, FORWARD_MAX_BLOCK, FORWARD_TILE, elements_per_thread=8)


def backward_tile(dim: int) -> Tile:
    if dim % 16:
        return Tile.of(dim, BACKWARD_UNALIGNED_BLOCK, BACKWARD_UNALIGNED_BLOCK, elements_per_thread=4)
    return Tile.of(dim, BACKWARD_MAX_BLOCK, BACKWARD_TILE, elements_per_thread=4)


def _check_rows(x: Tensor) -> int:
    rows = x.shape[0] * x.shape[1]
    if rows > MAX_ROWS:
        raise ValueError(f"x: {rows} rows; the triton backend takes at most {MAX_ROWS}: split the batch")
    return rows


# ------------------------------------------------------------------------------------------------------- forward


def _launch_forward(
    x, branch, gate, shift, scale, weight, bias, rms, eps, residual_out, out, mean, rstd, saturate=False
) -> None:
    _, tokens, dim = x.shape
    rows = _check_rows(x)
    if rows == 0:
        return
    tile = forward_tile(dim)
    kernel = device.forward_kernel if dim <= tile.block else device.forward_tiled_kernel
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, tile.rows),)](
            x_ptr=x, branch_ptr=branch, weight_ptr=weight, bias_ptr=bias,
            residual_out_ptr=residual_out, out_ptr=out, mean_ptr=mean, rstd_ptr=rstd,
            rows=rows, tokens=tokens, dim=dim, eps=eps,
            **Modulation.of(gate, tokens).arguments("gate"), **Modulation.of(shift, tokens).arguments("shift"),
            **Modulation.of(scale, tokens).arguments("scale"),
            RMS=rms, SATURATE=saturate and x.dtype == torch.float16, ROWS=tile.rows, BLOCK=tile.block,
            **tile.launch_options(),
        )  # fmt: skip


def _statistics(x: Tensor, rms: bool) -> tuple[Tensor | None, Tensor]:
    rows = x.shape[0] * x.shape[1]
    mean = None if rms else torch.empty(rows, dtype=torch.float32, device=x.device)
    return mean, torch.empty(rows, dtype=torch.float32, device=x.device)


def _absent(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=x.device)


def adaln_forward_out(x, shift, scale, weight, bias, rms, eps, out_dtype, out) -> None:
    """adaln into `out` [B, N, D], whose dtype is out_dtype."""
    _launch_forward(x, None, None, shift, scale, weight, bias, rms, eps, None, out, None, None)


def adaln_forward(x, shift, scale, weight, bias, rms, eps, out_dtype) -> Tensor:
    """norm(x) * (1 + scale) + shift, [B, N, D], in out_dtype (None: x's)."""
    out = torch.empty_like(x, dtype=out_dtype)
    adaln_forward_out(x, shift, scale, weight, bias, rms, eps, out_dtype, out)
    return out


def adaln_forward_stats(x, shift, scale, weight, bias, rms, eps, out_dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the row statistics: (out, mean, rstd); mean is empty for rms."""
    out = torch.empty_like(x, dtype=out_dtype)
    mean, rstd = _statistics(x, rms)
    _launch_forward(x, None, None, shift, scale, weight, bias, rms, eps, None, out, mean, rstd)
    return out, _absent(x) if mean is None else mean, rstd


def gated_residual_adaln_forward_out(
    residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate, residual_out, out
) -> None:
    """gated_residual_adaln into `residual_out` (the residual's dtype) and `out` (out_dtype), both [B, N, D]."""
    _launch_forward(
        residual, branch, gate, shift, scale, weight, bias, rms, eps, residual_out, out, None, None, saturate
    )


def gated_residual_adaln_forward(
    residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate
) -> tuple[Tensor, Tensor]:
    """(residual + gate * branch, adaln of that), both [B, N, D]."""
    residual_out, out = torch.empty_like(residual), torch.empty_like(residual, dtype=out_dtype)
    _launch_forward(
        residual, branch, gate, shift, scale, weight, bias, rms, eps, residual_out, out, None, None, saturate
    )
    return residual_out, out


def gated_residual_adaln_forward_stats(
    residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the row statistics: (residual_out, out, mean, rstd); mean is empty for rms."""
    residual_out, out = torch.empty_like(residual), torch.empty_like(residual, dtype=out_dtype)
    mean, rstd = _statistics(residual, rms)
    _launch_forward(
        residual, branch, gate, shift, scale, weight, bias, rms, eps, residual_out, out, mean, rstd, saturate
    )
    return residual_out, out, _absent(residual) if mean is None else mean, rstd


# ------------------------------------------------------------------------------------------------------ backward


def _own_frames(operand: Tensor) -> int:
    return operand.shape[1] if operand.ndim == 3 else 1


def _gradient_of(operand: Tensor | None, wanted: bool, x: Tensor, frames: int) -> Tensor | None:
    """Where an operand's gradient goes: [B, frames, D], in its own dtype where that is its own shape, else fp32."""
    if operand is None or not wanted:
        return None
    batch, _, dim = x.shape
    own_batch = operand.shape[0] if operand.ndim > 1 else 1
    own = own_batch == batch and _own_frames(operand) == frames
    dtype = operand.dtype if own else torch.float32
    return torch.empty(batch, frames, dim, dtype=dtype, device=x.device)


class Gradients(NamedTuple):
    """What the backward pass fills; None is not wanted."""

    x: Tensor
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @property
    def modulation_wanted(self) -> bool:
        return not (self.gate is None and self.shift is None and self.scale is None)

    @property
    def affine_wanted(self) -> bool:
        return not (self.weight is None and self.bias is None)

    def modulation_pointers(self, absent: bool = False) -> dict[str, Tensor | None]:
        pointers = {"grad_gate_ptr": self.gate, "grad_shift_ptr": self.shift, "grad_scale_ptr": self.scale}
        return dict.fromkeys(pointers) if absent else pointers

    def tensors(self) -> list[Tensor]:
        return [_absent(self.x) if grad is None else grad for grad in self]


class Segments(NamedTuple):
    """How the rows are cut for the sums over tokens: every frame into `per_frame` segments of `rows` rows."""

    frames: int  # batch * frames of a sample
    frame_rows: int
    rows: int
    per_frame: int

    @staticmethod
    def of(x: Tensor, frames: int, tile: Tile) -> "Segments":
        batch, tokens, _ = x.shape
        frame_rows = tokens // frames
        wanted = triton.next_power_of_2(triton.cdiv(batch * tokens, SEGMENT_TARGET))
        rows = min(max(min(max(wanted, MIN_SEGMENT), MAX_SEGMENT), tile.rows), frame_rows)
        return Segments(batch * frames, frame_rows, rows, triton.cdiv(frame_rows, rows))

    @property
    def count(self) -> int:
        return self.frames * self.per_frame


def _row_means(grad_out, x, statistics: dict, scale: dict, weight, tile: Tile) -> Tensor:
    """[2, rows]: the two means that the gradient of a row needs, where a row is wider than a tile."""
    batch, tokens, dim = x.shape
    row_means = torch.empty(2, batch * tokens, dtype=torch.float32, device=x.device)
    device.row_means_kernel[(batch * tokens,)](
        grad_out_ptr=grad_out, x_ptr=x, **statistics, **scale, weight_ptr=weight, row_means_ptr=row_means,
        rows=batch * tokens, tokens=tokens, dim=dim, BLOCK=tile.block, **tile.launch_options(),
    )  # fmt: skip
    return row_means


def _reduce(grads: Gradients, sums: Tensor, scale: dict, weight, bias, tokens: int, segments: Segments) -> None:
    """Adds what the segments left in `sums` [2 or 3, segments, D], in order."""
    dim = sums.shape[-1]
    tile = REDUCE_TILE
    column_tiles = triton.cdiv(dim, tile.block)
    common = {"sums_ptr": sums, "segments_per_frame": segments.per_frame, "segments": segments.count, "dim": dim}
    common |= {"ROWS": tile.rows, "BLOCK": tile.block, **tile.launch_options()}
    if grads.modulation_wanted:
        device.reduce_modulation_kernel[(segments.frames, column_tiles)](
            weight_ptr=weight, bias_ptr=bias, **grads.modulation_pointers(), **common
        )
    if grads.affine_wanted:
        device.reduce_affine_kernel[(column_tiles,)](
            **scale, grad_weight_ptr=grads.weight, grad_bias_ptr=grads.bias,
            tokens=tokens, frame_rows=segments.frame_rows, **common,
        )  # fmt: skip


def _launch_backward(
    grads: Gradients,
    grad_out,
    grad_residual_out,
    x,
    mean,
    rstd,
    residual_in,
    branch,
    gate,
    scale,
    weight,
    bias,
    frames: int,
) -> None:
    batch, tokens, dim = x.shape
    tile = backward_tile(dim)
    segments = Segments.of(x, frames, tile)
    statistics = {"mean_ptr": mean, "rstd_ptr": rstd}
    scale = Modulation.of(scale, tokens).arguments("scale")
    branch = None if grads.gate is None and residual_in is None else branch
    # where a frame is one segment, its sums are its gradients: they need no second pass
    two_steps = grads.affine_wanted or (grads.modulation_wanted and segments.per_frame > 1)
    sums = None
    if two_steps:
        kinds = 2 if branch is None else 3
        sums = torch.empty(kinds, segments.count, dim, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        row_means = _row_means(grad_out, x, statistics, scale, weight, tile) if dim > tile.block else None
        device.backward_kernel[(segments.count, triton.cdiv(dim, tile.block))](
            grad_out_ptr=grad_out, grad_residual_out_ptr=grad_residual_out, x_ptr=x, **statistics,
            residual_in_ptr=residual_in, branch_ptr=branch, weight_ptr=weight, bias_ptr=bias,
            row_means_ptr=row_means, grad_x_ptr=grads.x, grad_branch_ptr=grads.branch, sums_ptr=sums,
            **grads.modulation_pointers(absent=two_steps), **Modulation.of(gate, tokens).arguments("gate"), **scale,
            rows=batch * tokens, tokens=tokens, dim=dim, frame_rows=segments.frame_rows,
            segment_rows=segments.rows, segments_per_frame=segments.per_frame, segments=segments.count,
            ROWS=tile.rows, BLOCK=tile.block, **tile.launch_options(),
        )  # fmt: skip
        if two_steps:
            _reduce(grads, sums, scale, weight, bias, tokens, segments)


def _backward(
    grad_out,
    grad_residual_out,
    x,
    mean,
    rstd,
    branch,
    gate,
    shift,
    scale,
    weight,
    bias,
    rms,
    need_modulation,
    need_affine,
    residual_in=None,
) -> Gradients:
    frames = math.lcm(*(_own_frames(m) for m in (gate, shift, scale) if m is not None))
    grads = Gradients(
        x=torch.empty_like(x),
        branch=None if branch is None else torch.empty_like(branch),
        gate=_gradient_of(gate, need_modulation, x, frames),
        shift=_gradient_of(shift, need_modulation, x, frames),
        scale=_gradient_of(scale, need_modulation, x, frames),
        weight=torch.empty_like(weight) if weight is not None and need_affine else None,
        bias=torch.empty_like(bias) if bias is not None and need_affine else None,
    )
    if _check_rows(x):
        mean = None if rms else mean
        rest = (residual_in, branch, gate, scale, weight, bias, frames)
        _launch_backward(grads, grad_out, grad_residual_out, x, mean, rstd, *rest)
    else:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return grads


def adaln_backward(
    grad_out, x, mean, rstd, shift, scale, weight, bias, rms, need_modulation, need_affine
) -> tuple[Tensor, ...]:
    """(grad_x, grad_shift, grad_scale, grad_weight, grad_bias); what is absent or not needed is an empty tensor.

    The modulation gradients are [B, F*, D] with F* the least common multiple of the operands' frames, in the
    operand's dtype where that is its own shape and in fp32 where the caller has yet to sum it.
    """
    grads = _backward(
        grad_out, None, x, mean, rstd, None, None, shift, scale, weight, bias, rms, need_modulation, need_affine
    ).tensors()
    return grads[0], *grads[3:]


def gated_residual_adaln_backward(
    grad_out, grad_residual_out, residual_out, mean, rstd, branch, gate, shift, scale, weight, bias, rms,
    need_modulation, need_affine, residual_in,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(grad_residual, grad_branch, grad_gate, grad_shift, grad_scale, grad_weight, grad_bias), as adaln_backward.

    residual_in is what a forward pass that saturated was given, or None.
    """
    return tuple(
        _backward(
            grad_out, grad_residual_out, residual_out, mean, rstd, branch, gate, shift, scale, weight, bias, rms,
            need_modulation, need_affine, residual_in,
        ).tensors()
    )  # fmt: skip
