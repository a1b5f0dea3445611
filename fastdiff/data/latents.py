"""What a frozen model makes of a data set's images (latents, features): encoded once, kept in the cache as .npy files,
and read through memory maps.

A folder of the cache has train.npy and held_out.npy, [N, *shape] in float32 or float16, and latents.json. While they
are made, they grow in a folder beside it, and a file says how many images are safely there: a process that is killed
goes on with the image after them.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.data.growing import GrowingArray, npy_header
from fastdiff.data.images import ImageData, ImageSet, LabelledImages
from fastdiff.files import cache_folder, make_folder_once, read_json, sha256_of, write_atomically
from fastdiff.reading import reading

VERSION = 1
_PARTS, _RECORD = ("train", "held_out"), "latents.json"
_BLOCK = 256  # images between two marks of progress, which a kill costs at most
_CONTENT_READ = 2**28  # bytes: files that are smaller are compared with their SHA-256 when they are opened

Data = TypeVar("Data", bound=ImageData)
Encode = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]
DType = Literal["float32", "float16"]


class LatentSet(LabelledImages):
    """Latents of labelled images, for whatever takes an `ImageSet`.

    Args:
        latents: float32 or float16 [N, *shape], a memory map.
        labels: int64 [N].
        fingerprint: a hash of what they were made of.
    """

    def __init__(self, latents: np.ndarray, labels: Tensor, fingerprint: str):
        self.latents, self.labels, self._fingerprint = latents, labels.long(), fingerprint

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The latents at `indices`: float32 [n, *shape]."""
        return torch.from_numpy(self.latents[np.asarray(indices, dtype=np.int64)]).float()

    def fingerprint(self) -> str:
        return self._fingerprint


def cached_latents(
    data: Data, shape: Shape, encode: Encode, key: str, *, dtype: DType = "float32", progress: bool = True
) -> Data:
    """A data set with the latents of its images in the place of these, from cache_folder()/latents.

    Where they are not there yet, they are encoded: once, and after a kill from where it was. Of two processes at once,
    one waits for the other.

    Args:
        data: the images, with labels and whatever else (captions), which stay.
        shape: of what `encode` makes of an image: (c, h, w) of latents, (tokens, width) of features.
        encode: images float32 [n, C, H, W] in -1 … 1 → latents [n, *shape], scaled. It is not called where all are
            there.
        key: a hash of all that decides what `encode` gives, such as `fastdiff.models.autoencoder.fingerprint_of`.
        dtype: how they are stored; float16 takes half the space, and numbers up to 65 504.
        progress: shows a bar while images are encoded.

    Returns:
        The same data: `train` and `held_out` are `LatentSet`s, `image_shape` is `shape`.

    Raises:
        ValueError: latents of another shape, or not finite; damaged files (the message names them).
        PermissionError: the cache cannot be written. OSError: the disk is full; what was done is kept.
        And what `encode` raises.
    """
    marks = {part: _mark(getattr(data, part), shape, key, dtype) for part in _PARTS}
    digest = hashlib.sha256("\n".join(marks.values()).encode()).hexdigest()[:32]
    folder = cache_folder() / "latents" / f"{data.name}-{digest}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        make_folder_once(
            folder, Path.is_dir, lambda into: _fill(into, unfinished, data, shape, dtype, encode, progress)
        )
        shutil.rmtree(unfinished, ignore_errors=True)
    record = _record(folder)
    sets = {}
    for part in _PARTS:
        images = getattr(data, part)
        latents = _open(folder / f"{part}.npy", (len(images), *shape), dtype, record[part])
        sets[part] = LatentSet(latents, images.labels, marks[part])
    return replace(data, **sets, image_shape=shape)


def _mark(images: ImageSet, shape: Shape, key: str, dtype: DType) -> str:
    """A hash of what the latents of a part are made of."""
    facts = [VERSION, key, list(shape), len(images), images.fingerprint()]
    facts += [] if dtype == "float32" else [dtype]  # those of float32 have kept their names
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ writing


def _fill(
    into: Path, unfinished: Path, data: ImageData, shape: Shape, dtype: DType, encode: Encode, progress: bool
) -> None:
    """Ends what lies in the folder `unfinished`, and puts it and a record into another."""
    unfinished.mkdir(exist_ok=True)
    total = sum(len(getattr(data, part)) for part in _PARTS)
    with tqdm(total=total, desc="encoding", unit="image", disable=not progress, dynamic_ncols=True) as bar:
        for part in _PARTS:
            _encode_part(getattr(data, part), unfinished / f"{part}.npy", shape, dtype, encode, bar)
    for part in _PARTS:
        source, target = unfinished / f"{part}.npy", into / f"{part}.npy"
        try:
            os.link(source, target)  # a second name, so that no byte is written twice
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    hashes = {part: sha256_of(into / f"{part}.npy") for part in _PARTS}
    write_atomically(into / _RECORD, json.dumps({"version": VERSION, **hashes}) + "\n")


def _encode_part(images: ImageSet, path: Path, shape: Shape, dtype: DType, encode: Encode, bar: tqdm) -> None:
    """Appends latents to a file until it has those of all images."""
    array = GrowingArray(path, len(images), shape, dtype)
    bar.update(array.done)
    while array.done < array.rows:
        indices = torch.arange(array.done, min(array.done + _BLOCK, array.rows))
        latents = encode(images.images(indices)).float().cpu()
        if tuple(latents.shape) != (len(indices), *shape):
            raise ValueError(f"encode: gave shape {tuple(latents.shape)}; expected {(len(indices), *shape)}")
        _check_numbers(latents, dtype, f"{array.done} … {array.done + len(indices) - 1}")
        array.append(latents.numpy(), {})
        bar.update(len(indices))


def _check_numbers(latents: Tensor, dtype: DType, which: str) -> None:
    """Raises ValueError for numbers that cannot be stored."""
    if not latents.isfinite().all():
        raise ValueError(
            f"encode: gave latents of images {which} that are not finite; the autoencoder or the images are damaged"
        )
    largest = float(latents.abs().max())
    if dtype == "float16" and largest > torch.finfo(torch.float16).max:
        raise ValueError(f"encode: gave {largest:.4g} of images {which}; expected at most 65504; store float32")


# ------------------------------------------------------------------------------------------------ reading


def _record(folder: Path) -> dict[str, str]:
    """The SHA-256 of each part. Raises ValueError, naming the file, where it cannot be read."""
    file = folder / _RECORD
    try:
        content = read_json(file)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}")
        return {part: str(content[part]) for part in _PARTS}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a whole record of latents ({error}); {_advice(folder)}") from None


def _open(path: Path, shape: Shape, dtype: DType, sha256: str) -> np.ndarray:
    """A memory map of a part. Raises ValueError, naming the file, where it is not as it was written."""
    numbers, advice = np.dtype(dtype).newbyteorder("<"), _advice(path.parent)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected latents of {shape[0]} images; {advice}")
    size, expected = path.stat().st_size, len(npy_header(shape, numbers)) + numbers.itemsize * math.prod(shape)
    if size != expected:
        raise ValueError(f"{path}: got {size} bytes; expected {expected}, {list(shape)} numbers; {advice}")
    if size <= _CONTENT_READ and sha256_of(path) != sha256:
        raise ValueError(f"{path}: was changed after it was written (its SHA-256 differs); {advice}")
    with reading(path, ": not a .npy file", f"; {advice}"):
        return np.load(path, mmap_mode="r")


def _advice(folder: Path) -> str:
    return f"delete the folder {folder}, and it is made again"
