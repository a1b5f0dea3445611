"""Self-attention on one packed projection in plain PyTorch: what every other backend is held against."""

import torch
from torch import Tensor


def self_attention(
    qkv: Tensor,  # [B, N, 3, H, d]: query, key, value
    scale: float,
) -> Tensor:  # [B, N, H, d]
    """softmax(scale · Q · Kᵀ) · V of each head in fp32 (float64 for float64), rounded once to qkv's dtype."""
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    query, key, value = qkv.to(wide).permute(2, 0, 3, 1, 4)  # [B, H, N, d] each
    weights = (scale * query @ key.transpose(-1, -2)).softmax(-1)
    return (weights @ value).transpose(1, 2).to(qkv.dtype)
