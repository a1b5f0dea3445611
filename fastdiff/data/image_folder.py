"""Images of one's own, in a subfolder per class."""

from pathlib import Path

import torch
from torch import Tensor

from fastdiff.data.config import DataConfig
from fastdiff.data.file_checks import check_pictures, class_folders
from fastdiff.data.images import FileImages, ImageData
from fastdiff.data.pictures import IMAGE_SUFFIXES
from fastdiff.data.splits import stratified_split
from fastdiff.errors import named


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
