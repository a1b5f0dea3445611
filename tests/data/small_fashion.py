"""IDX files of a few garments, in the form of Fashion-MNIST's: what tests of colored_fashion are made of."""

import struct

import numpy as np

GARMENTS_A_CLASS = 24


def garment(label: int, turn: int) -> np.ndarray:
    """uint8 [28, 28]: a bright shape on black whose width and height tell its class, with a dark print inside."""
    image = np.zeros((28, 28), np.uint8)
    height, width = 12 + label, 22 - label
    top, left = (28 - height) // 2, (28 - width) // 2
    image[top : top + height, left : left + width] = 150 + turn % 100
    image[top + 4 : top + 7, left + 4 : left + 8] = 0  # enclosed by the garment
    image[top, left : left + width] //= 2  # a dim edge
    return image


def write_fashion(folder, garments: int = GARMENTS_A_CLASS) -> None:
    """The four files, with as many garments of each of the ten classes in both parts."""
    labels = np.arange(10 * garments, dtype=np.uint8) % 10
    pixels = np.stack([garment(int(label), index // 10) for index, label in enumerate(labels)])
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name).write_bytes(header + array.tobytes())
