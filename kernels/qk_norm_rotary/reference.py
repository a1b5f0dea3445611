"""Norms and rotary positions of queries and keys in plain PyTorch: what every other backend is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def qk_norm_rotary(
    qkv: Tensor,  # [B, N, 3, H, d]: query, key, value
    weight: Tensor,  # [2, H · d]: of the query's norm and the key's
    bias: Tensor,  # [2, H · d]
    cosine: Tensor | None,  # [N, d / 2]
    sine: Tensor | None,  # [N, d / 2]
    eps: float,
) -> Tensor:  # like qkv
    """LayerNorm over H · d, then the turn, in fp32 (float64 for float64), rounded once; values as they are."""
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    parts = []
    for index, part in enumerate(qkv.unbind(2)[:2]):
        normed = F.layer_norm(
            part.flatten(2).to(wide), weight.shape[1:], weight[index].to(wide), bias[index].to(wide), eps
        ).view(part.shape)
        if cosine is not None:
            first, second = normed.chunk(2, -1)
            cos, sin = cosine.to(wide)[:, None], sine.to(wide)[:, None]
            normed = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        parts.append(normed.to(qkv.dtype))
    return torch.stack([*parts, qkv[:, :, 2]], dim=2)
