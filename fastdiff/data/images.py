"""Sets of labelled images: held in memory, or decoded from files as they are asked for."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ImageSet(Protocol):
    """Labelled images of one shape."""

    labels: Tensor  # [N] int64

    def __len__(self) -> int: ...

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices`: float32 [n, C, H, W] in [-1, 1]."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the images or labels do."""
        ...


class ArrayImages:
    """Images kept in memory as bytes.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.pixels, self.labels = pixels, labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return to_signed_unit(self.pixels[torch.as_tensor(indices, dtype=torch.long)])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class FileImages:
    """Images decoded from files when they are asked for, cropped to the centre square and resized.

    Args:
        paths: N image files.
        labels: int64 [N].
        image_size: edge in pixels of what `images` returns.
        channels: 3 (RGB) or 1 (grey).
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, image_size: int, channels: int):
        self.paths, self.labels = list(paths), labels.long()
        self.image_size, self.channels = image_size, channels
        self._pool = ThreadPoolExecutor(max_workers=4)  # PIL releases the interpreter lock while it decodes

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        paths = [self.paths[int(i)] for i in indices]
        empty = torch.empty(0, self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        return to_signed_unit(torch.stack(list(self._pool.map(self._decode, paths))) if paths else empty)

    def _decode(self, path: Path) -> Tensor:  # uint8 [C, image_size, image_size]
        from PIL import Image, ImageOps

        try:
            with Image.open(path) as image:
                image = image.convert("L" if self.channels == 1 else "RGB")
                image = ImageOps.fit(image, (self.image_size, self.image_size), Image.Resampling.BICUBIC)
                pixels = np.array(image)
        except OSError as error:
            raise ValueError(f"{path} cannot be decoded as an image ({error}); remove it or replace it") from None
        return torch.from_numpy(pixels).reshape(self.image_size, self.image_size, self.channels).permute(2, 0, 1)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.image_size} {self.channels}".encode())
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            stat = path.stat()
            digest.update(f"{path.parent.name}/{path.name} {label} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageData:
    """A data set: its two parts, the classes' names in the order of their labels, and the shape of an image."""

    name: str
    train: ImageSet
    held_out: ImageSet
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]  # C, H, W

    @cached_property
    def fingerprint(self) -> str:
        """A hash of both parts and of the classes."""
        parts = (self.name, *self.class_names, self.train.fingerprint(), self.held_out.fingerprint())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def to_signed_unit(pixels: Tensor) -> Tensor:
    """Bytes 0…255 as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [-1, 1] (others are clipped) as uint8, rounded to nearest."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
