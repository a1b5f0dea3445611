"""scale_shift in plain PyTorch: what every other backend is held against."""

import torch
from torch import Tensor


def scale_shift(
    x: Tensor,  # [B, N, D]
    scale: Tensor,  # [B, D]
    shift: Tensor,  # [B, D]
) -> Tensor:  # like x
    """x · (1 + scale) + shift in fp32 (float64 for float64), rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) * (1 + scale.to(wide))[:, None] + shift.to(wide)[:, None]).to(x.dtype)
