"""AdaLN in plain PyTorch: what every other backend is held against."""

import torch
from torch import Tensor


def _rows(modulation: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation of shape [D], [1, D], [B, D] or [B or 1, F, D] as a tensor that broadcasts against x [B, N, D]."""
    if modulation is None:
        return None
    m = modulation.to(_compute_dtype(x))
    if m.ndim == 1:
        return m
    if m.ndim == 2:
        return m[:, None]
    frames = m.shape[1]
    return m if frames in (1, x.shape[1]) else m.repeat_interleave(x.shape[1] // frames, dim=1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def adaln(
    x: Tensor,  # [B, N, D]
    shift: Tensor | None,  # [D], [1, D], [B, D], [B, F, D], [B, N, D], [1, N, D]
    scale: Tensor | None,  # the same
    *,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, N, D]
    h = x.to(_compute_dtype(x))
    if norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight
    if bias is not None:
        h = h + bias
    if scale is not None:
        h = h * (1 + _rows(scale, x))
    if shift is not None:
        h = h + _rows(shift, x)
    return h.to(out_dtype or x.dtype)


def gated_residual_adaln(
    residual: Tensor,  # [B, N, D]
    branch: Tensor,  # [B, N, D]
    gate: Tensor,  # as shift and scale
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    saturate: bool = False,
) -> tuple[Tensor, Tensor]:  # (residual + gate * branch, adaln of that)
    compute = _compute_dtype(residual)
    stream = (residual.to(compute) + _rows(gate, residual) * branch.to(compute)).to(residual.dtype)
    if saturate and stream.dtype == torch.float16:
        # not clip, whose gradient at the bounds is 1 until torch 2.13 and 0 from 2.14 on: here it is 1
        stream = torch.where(stream.abs() > 65504, stream.detach().clip(-65504, 65504), stream)
    return stream, adaln(stream, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype)
