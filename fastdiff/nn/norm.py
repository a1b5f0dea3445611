"""Adaptive normalisation as modules over `fastdiff.ops.adaln` and `fastdiff.ops.gated_residual_adaln`."""

import torch
from torch import Tensor, nn

from fastdiff.ops import adaln, gated_residual_adaln

NORMS = ("layer", "rms")
QK_NORM_EPS = 1e-5  # of the norms of query and key, as published


class _AdaNorm(nn.Module):
    def __init__(self, dim: int, *, norm: str = "layer", eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim: got {dim}; expected a positive width")
        if norm not in NORMS:
            raise ValueError(f"norm: got {norm!r}; expected one of {', '.join(NORMS)}")
        self.dim, self.norm, self.eps = dim, norm, eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        # As in torch's RMSNorm, the root-mean-square form has no bias.
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and norm == "layer" else None

    def extra_repr(self) -> str:
        return f"{self.dim}, norm={self.norm!r}, eps={self.eps}, elementwise_affine={self.weight is not None}"


class AdaLayerNorm(_AdaNorm):
    """norm(x)·(1 + scale) + shift, with LayerNorm or RMSNorm (`norm="layer"` or `"rms"`).

    `elementwise_affine` adds a learnt weight (and, for LayerNorm, a bias) before the modulation.
    Raises ValueError for an unknown norm or a width below 1.
    """

    def forward(
        self,
        x: Tensor,  # [B, N, D]
        shift: Tensor | None,  # [B, D], [B, N, D] or any other shape that `fastdiff.ops.adaln` takes
        scale: Tensor | None,  # the same
    ) -> Tensor:  # [B, N, D], x's dtype, under autocast the autocast dtype
        return adaln(x, shift, scale, weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps)


class GatedResidualAdaLayerNorm(_AdaNorm):
    """r = residual + gate·branch and norm(r)·(1 + scale) + shift in one pass; returns both.

    `branch=None` is the first site of a network, where nothing is pending: r is the residual itself.
    `elementwise_affine` and errors are those of `AdaLayerNorm`.
    """

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor | None,  # [B, N, D], or None with gate None
        gate: Tensor | None,  # as shift and scale
        shift: Tensor | None,  # [B, D], [B, N, D] or any other shape that `fastdiff.ops.adaln` takes
        scale: Tensor | None,  # the same
    ) -> tuple[Tensor, Tensor]:  # r [B, N, D] in residual's dtype; its normalised form [B, N, D]
        options = dict(weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps)
        if branch is None:
            return residual, adaln(residual, shift, scale, **options)
        return gated_residual_adaln(residual, branch, gate, shift, scale, **options)
