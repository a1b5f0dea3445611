"""Fashion-MNIST from its IDX files, which Debian's package dataset-fashion-mnist brings."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch

from fastdiff.data.config import DataConfig
from fastdiff.data.images import ArrayImages, ImageData
from fastdiff.errors import named
from fastdiff.reading import reading

FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_MOST_IDX_BYTES = 2**28  # Fashion-MNIST has 47 million


def load_fashion_mnist(config: DataConfig) -> ImageData:
    """Fashion-MNIST from its four IDX files (gzipped or not); its own split, 60 000 and 10 000."""
    folders = [Path(config.folder)] if config.folder is not None else list(FASHION_FOLDERS)
    folder = next((f for f in folders if _idx_path(f, "train-images-idx3-ubyte") is not None), None)
    if folder is None:
        looked = " and ".join(str(f) for f in folders)
        raise FileNotFoundError(
            f"Fashion-MNIST's files (train-images-idx3-ubyte.gz, …) are not in {looked}; run "
            f"`apt install dataset-fashion-mnist` or set {named('folder')}"
        )
    parts = []
    for part in ("train", "t10k"):
        pixels = read_idx(folder, f"{part}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte", dimensions=1)
        if len(pixels) != len(labels):
            raise ValueError(f"{folder}: {part} has {len(pixels)} images and {len(labels)} labels; expected as many")
        parts.append(ArrayImages(torch.from_numpy(pixels[:, None].copy()), torch.from_numpy(labels.astype(np.int64))))
    return ImageData("fashion_mnist", parts[0], parts[1], FASHION_CLASSES, tuple(parts[0].pixels.shape[1:]))


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """One IDX file of bytes, `name` or `name`.gz in `folder`.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: not an IDX file of bytes with that many dimensions, or cut short.
    """
    path = _idx_path(folder, name)
    if path is None:
        raise FileNotFoundError(f"{folder / name} is missing (.gz too); expected the four IDX files of Fashion-MNIST")
    with (
        reading(path, " is not a whole gzip file", "; copy it again"),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        content = file.read(_MOST_IDX_BYTES + 1)  # a small file may stand for any number of bytes
    if len(content) > _MOST_IDX_BYTES:
        raise ValueError(f"{path} holds more than {_MOST_IDX_BYTES} bytes; expected those of Fashion-MNIST")
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is not an IDX file of bytes with {dimensions} dimensions; copy it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path} holds {len(content) - header} bytes of data; its header says {shape}; copy it again")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
