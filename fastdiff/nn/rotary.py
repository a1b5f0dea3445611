"""Rotary positions (Su et al. 2021): queries and keys turned by angles that grow with their position."""

import torch
from torch import Tensor


def rotary_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position · theta^(-2i / head_dim): `[B, L]` → two of `[B, 1, L, head_dim / 2]`, float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def axial_rotary_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """`rotary_table` of tokens with any number of coordinates: `[L, axes]` → two of `[1, 1, L, head_dim / 2]`, float32.

    The axes share a head's pairs of numbers as evenly as they can. Raises ValueError where an axis would get none.
    """
    pairs, axes = head_dim // 2, position_ids.shape[1]
    if axes > pairs:
        raise ValueError(
            f"position_ids: got {axes} axes for rotary heads of {head_dim} numbers; expected {pairs} at most"
        )
    parts = [
        rotary_table(coordinates[None], 2 * (pairs // axes + (axis < pairs % axes)), theta)
        for axis, coordinates in enumerate(position_ids.unbind(1))
    ]
    return tuple(torch.cat(waves, dim=-1) for waves in zip(*parts, strict=True))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:  # [B, H, L, d] -> the same
    """Rotary positions (Su et al. 2021) with a head's first half paired with its second, as in Llama; in float32."""
    cos, sin = table
    first, second = (x if x.dtype == torch.float64 else x.float()).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
