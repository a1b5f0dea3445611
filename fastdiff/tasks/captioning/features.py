"""Images as a vision encoder's states: a data set's once, in the cache; pictures that somebody names one by one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.data.images import ImageData, fitted, to_signed_unit
from fastdiff.data.latents import cached_latents
from fastdiff.data.pictures import flattened, read_picture
from fastdiff.models.vision_encoder import VisionEncoder
from fastdiff.tasks.captioning.recipe import VisionConfig
from fastdiff.training.setup import keep_freed_memory

Data = TypeVar("Data", bound=ImageData)


def cached_features(data: Data, encoder: VisionEncoder, config: VisionConfig, *, progress: bool = True) -> Data:
    """A data set with the states of its images [M, C] in the place of these; see `cached_latents`, also for errors."""
    shape = (encoder.num_tokens, encoder.hidden_size)
    keep_freed_memory()  # two thirds of EfficientNet's time on a CPU were pages of activations, mapped anew
    return cached_latents(
        data, shape, encoder.encode, encoder.fingerprint, dtype=config.feature_dtype, progress=progress
    )


def states_of(images: Tensor, encoder: VisionEncoder, config: VisionConfig) -> list[Tensor]:
    """The states [M, C] of each image, float32, rounded as training had them.

    Args:
        images: float32 [N, C, H, W] in [-1, 1].

    They are encoded one by one: what is drawn for an image depends on its states to the last bit, and not on the images
    beside it.
    """
    stored = getattr(torch, config.feature_dtype)
    return [encoder.encode(image[None])[0].to(stored).float() for image in images]


def read_images(images: Sequence[Any], shape: tuple[int, int, int]) -> Tensor:
    """Pictures as a run's data has them: float32 [N, C, H, W] in [-1, 1].

    Args:
        images: paths or PIL images, of any size and mode: turned by EXIF, alpha on white, grey or RGB as the data,
            cropped to the centre and resized.
        shape: (C, H, W).

    Raises:
        FileNotFoundError: no such file. ValueError: none that can be decoded, or no image at all.
        TypeError: neither a path nor a PIL image. One line that names it.
    """
    if not images:
        raise ValueError("images: got none; expected one or more")
    channels, *size = shape
    return to_signed_unit(torch.stack([fitted(_picture(image, channels), tuple(size), channels) for image in images]))


def _picture(image: Any, channels: int) -> Any:
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        path = Path(image).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"image: got {str(image)!r}, which is not a file; expected a picture")
        return read_picture(path, channels)
    if not isinstance(image, Image.Image):
        raise TypeError(f"images: got a {type(image).__name__}; expected paths or PIL images")
    return flattened(image, channels)


def name_of(image: Any, number: int) -> str:
    """How an image is called: its path, or its number in the call."""
    return str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
