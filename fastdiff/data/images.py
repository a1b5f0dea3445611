"""Sets of labelled images: held in memory, or decoded from files as they are asked for."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.data.labelled import ExampleSet, LabelledData
from fastdiff.data.pictures import read_picture
from fastdiff.files import fingerprint_of_files

if TYPE_CHECKING:
    from PIL import Image


class ImageSet(ExampleSet, Protocol):
    """Labelled images of one shape."""

    labels: Tensor  # [N] int64

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices`: float32 [n, C, H, W] in [-1, 1]."""
        ...


class LabelledImages:
    """What sets of images have in common, beside `images` and `fingerprint`."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"pixel_values": float32 [n, C, H, W] in [-1, 1], "labels": int64 [n]}."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return {"pixel_values": self.images(indices), "labels": self.labels[indices]}


class ArrayImages(LabelledImages):
    """Images kept in memory as bytes.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
    """

    def __init__(self, pixels: Tensor, labels: Tensor):
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == len(labels)
        self.pixels, self.labels = pixels, labels.long()

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return to_signed_unit(self.pixels[torch.as_tensor(indices, dtype=torch.long)])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class FileImages(LabelledImages):
    """Images decoded from files when they are asked for (`fastdiff.data.pictures`), cropped to the centre square and
    resized.

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

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        paths = [self.paths[int(i)] for i in indices]
        empty = torch.empty(0, self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        return to_signed_unit(torch.stack(list(self._pool.map(self._decode, paths))) if paths else empty)

    def _decode(self, path: Path) -> Tensor:  # uint8 [C, image_size, image_size]
        return fitted(read_picture(path, self.channels), (self.image_size, self.image_size), self.channels)

    def fingerprint(self) -> str:
        """See `fastdiff.files.fingerprint_of_files`; names and labels are in it, times and the folder's place not."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}".encode())
        for path, label in zip(self.paths, self.labels.tolist(), strict=True):
            digest.update(f"{path.parent.name}/{path.name} {label}\n".encode(errors="surrogateescape"))
        digest.update(fingerprint_of_files(self.paths).encode())
        return digest.hexdigest()


class ResizedImages(LabelledImages):
    """Images resized when they are asked for: bicubic, without aliasing.

    Args:
        images: the images.
        size: height and width of what `images` returns.
    """

    def __init__(self, images: ImageSet, size: tuple[int, int]):
        self.source, self.size, self.labels = images, size, images.labels

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        return resize(self.source.images(indices), self.size)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"resized {self.size} {self.source.fingerprint()}".encode()).hexdigest()


@dataclass(frozen=True)
class ImageData(LabelledData):
    """Labelled images and their shape."""

    train: ImageSet
    held_out: ImageSet
    image_shape: tuple[int, int, int]  # C, H, W

    @property
    def images_fingerprint(self) -> str:
        """A hash of what classifiers of these images learn from, whatever else the data set has."""
        return self.fingerprint


def resized(data: ImageData, edge: int) -> ImageData:
    """The same data with square images of `edge` pixels."""
    parts = (ResizedImages(part, (edge, edge)) for part in (data.train, data.held_out))
    return replace(data, train=next(parts), held_out=next(parts), image_shape=(data.image_shape[0], edge, edge))


def as_stored(data: ImageData) -> ImageData:
    """The same data with its images as they were before `resized`."""
    if not isinstance(data.train, ResizedImages):
        return data
    train, held_out = data.train.source, data.held_out.source
    return replace(data, train=train, held_out=held_out, image_shape=tuple(train.images([0]).shape[1:]))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:  # float [N, C, H, W], -1 … 1 -> [N, C, *size]
    """Images of another size: bicubic, without aliasing, clipped to -1 … 1."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def fitted(picture: "Image.Image", size: tuple[int, int], channels: int) -> Tensor:  # uint8 [C, *size]
    """A picture of mode "L" or "RGB", cropped around its centre to the shape of `size` (height, width) and resized."""
    from PIL import Image, ImageOps

    image = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).reshape(*size, channels).permute(2, 0, 1)


def to_signed_unit(pixels: Tensor) -> Tensor:
    """Bytes 0…255 as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_bytes(images: Tensor) -> Tensor:
    """Float images in [-1, 1] (others are clipped) as uint8, rounded to nearest."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def flip_some(images: Tensor, draws: Tensor) -> Tensor:  # [B, C, H, W], uniform on [0, 1) [B] -> [B, C, H, W]
    """Each image mirrored with probability 1/2."""
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(-1), images)


def shift_and_scale(
    images: Tensor,  # [B, C, H, W]
    draws: Tensor,  # [B, 3], uniform on [0, 1)
    shift: float,
    scale: float,
) -> Tensor:  # [B, C, H, W]
    """Each image moved by up to `shift` of its edge each way and resized by up to `scale`, bilinearly.

    Where nothing is resized, images move by whole pixels, so that none of them is blurred. Beyond an edge the image
    goes on as it is there. The same draws give the same images, whatever else is in the batch.
    """
    signed = draws.to(images.dtype) * 2 - 1
    moved = shift * signed[:, 1:]  # of x and y, in shares of the edge
    if not scale:
        edges = moved.new_tensor([images.shape[3], images.shape[2]])
        moved = (moved * edges).round() / edges
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / (1 + scale * signed[:, 0])
    theta[:, :, 2] = 2 * moved  # in grid_sample's units an image is 2 wide
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
