"""What QGFD attention is compared with: its definition, and the ways to compute it with torch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor


def weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)


def dense(query: Tensor, key: Tensor, value: Tensor, steps: int, alpha: float) -> Tensor:
    """The definition, as TorchDire's code has it: powers of the L x L matrix."""
    attention = weights(query, key)
    diffused = attention
    for _ in range(steps):
        diffused = diffused @ attention
    return (alpha * diffused + (1 - alpha) * attention) @ value


def chain(query: Tensor, key: Tensor, value: Tensor, steps: int, alpha: float) -> Tensor:
    """steps + 1 calls of torch's fused attention."""
    w = value
    for _ in range(steps):
        w = F.scaled_dot_product_attention(query, key, w)
    return F.scaled_dot_product_attention(query, key, torch.lerp(value, w, alpha))


def kept(query: Tensor, key: Tensor, value: Tensor, steps: int, alpha: float) -> Tensor:
    """The matrix once in memory, times the values again and again."""
    attention = weights(query, key)
    w = value
    for _ in range(steps):
        w = attention @ w
    return attention @ torch.lerp(value, w, alpha)
