"""Tensors as PIL images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastdiff.data.images import to_bytes
from fastdiff.models.autoencoder import FOLDER

if TYPE_CHECKING:
    from PIL.Image import Image


def to_pil(images: Tensor) -> "list[Image]":  # float [N, C, H, W], -1 … 1, C 1 or 3
    """8-bit images, grey ("L") or RGB."""
    from PIL import Image

    return [Image.fromarray(to_bytes(image).squeeze(-1).numpy()) for image in images.permute(0, 2, 3, 1)]


def check_pictures(source: Path, channels: int, decoder: Any) -> None:
    """Raises ValueError where samples are latents that nothing makes pictures of.

    Args:
        source: where the model came from.
        channels: of its samples.
        decoder: what makes images of latents, or None.
    """
    if decoder is None and channels not in (1, 3):
        raise ValueError(
            f"{source}: got a model of latents with {channels} channels and no decoder; expected the folder {FOLDER} "
            "of its pipeline beside it; in Python, output_type='latent' gives the latents"
        )
