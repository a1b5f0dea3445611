"""Tensors as PIL images."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastdiff.data.images import to_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


def to_pil(images: Tensor) -> "list[Image]":  # float [N, C, H, W], -1 … 1, C 1 or 3
    """8-bit images, grey ("L") or RGB."""
    from PIL import Image

    return [Image.fromarray(to_bytes(image).squeeze(-1).numpy()) for image in images.permute(0, 2, 3, 1)]
