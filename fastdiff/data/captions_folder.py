"""Pictures and captions of one's own: a folder of pictures, and a JSONL file that says what is in them."""

from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.captions import CaptionedData, Captions
from fastdiff.data.config import DataConfig
from fastdiff.data.file_checks import check_pictures
from fastdiff.data.images import FileImages
from fastdiff.data.jsonl import read_objects, text_in
from fastdiff.data.pictures import IMAGE_SUFFIXES
from fastdiff.data.splits import stratified_split
from fastdiff.errors import named

CAPTIONS_FILE = "captions.jsonl"
_MOST_CAPTIONS = 100  # of a picture: as many columns has the table of all


def load_captions_folder(config: DataConfig) -> CaptionedData:
    """The pictures that `config.captions` (else captions.jsonl in the folder) names, with one caption or more each.

    Its lines are {"file": "a/b.png", "caption": "…"} or {"file": …, "captions": ["…", …]}; several lines of one file
    give it several captions. Files are read as image_folder's. All are of one class.

    Raises:
        FileNotFoundError: no folder, no captions, or a file that they name is missing.
        ValueError: a line without its fields, an empty caption, fewer than 2 pictures, a broken one; one line.
    """
    if config.folder is None:
        raise ValueError(f"{named('folder')}: got none; captions_folder needs a folder of pictures")
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{named('folder')}: got {config.folder!r}, which is not a folder; expected pictures in it"
        )
    file = root / CAPTIONS_FILE if config.captions is None else Path(config.captions).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f'{named("captions")}: got {str(file)!r}, which is not a file; expected JSONL with "file" and "caption" '
            '(or "captions") on each line'
        )
    captions = _read_captions(file, root)
    if len(captions) < 2:
        raise ValueError(f"{file} names {len(captions)} pictures; expected at least 2 (one is held out)")
    paths = [root / name for name in captions]
    check_pictures(paths, config.check)
    most = max(map(len, captions.values()))
    rows = [[*texts, *[None] * (most - len(texts))] for texts in captions.values()]
    parts = stratified_split(torch.zeros(len(paths), dtype=torch.long), config.held_out_fraction)

    def images(indices: Tensor) -> FileImages:
        labels = torch.zeros(len(indices), dtype=torch.long)
        return FileImages([paths[i] for i in indices.tolist()], labels, config.image_size, config.channels)

    return CaptionedData(
        "captions_folder",
        *map(images, parts),
        ("picture",),
        (config.channels, config.image_size, config.image_size),
        Captions.of(("caption",) * most, *([rows[i] for i in part.tolist()] for part in parts)),
        {},
    )


def _read_captions(file: Path, root: Path) -> dict[str, list[str]]:
    """Captions by the picture's path in the folder, in the order of the lines."""
    found: dict[str, list[str]] = {}
    for where, row in read_objects(file):
        name = str(PurePosixPath(text_in(row, "file", where)))
        if name not in found:
            _check_file(name, root, where)
        texts = found.setdefault(name, [])
        texts += [text for text in _captions_of(row, where) if text not in texts]
        if len(texts) > _MOST_CAPTIONS:
            raise ValueError(f"{where}: got more than {_MOST_CAPTIONS} captions of {name}; expected at most that many")
    return found


def _check_file(name: str, root: Path, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: file: got {name!r}; expected a path in the folder {str(root)!r}")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{where}: file: got {name!r}; suffixes read: {', '.join(sorted(IMAGE_SUFFIXES))}")
    if not (root / path).is_file():
        raise FileNotFoundError(f"{where}: file: got {name!r}, which is not in {str(root)!r}; expected a picture there")


def _captions_of(row: dict[str, Any], where: str) -> list[str]:
    if ("caption" in row) == ("captions" in row):
        raise ValueError(f'{where}: got {", ".join(row)}; expected "file" and either "caption" or "captions"')
    several = row.get("captions", [row.get("caption")])
    if not isinstance(several, list) or not several:
        raise ValueError(f"{where}: captions: got {several!r}; expected a list of texts")
    texts = [text_in({"caption": text}, "caption", where).strip() for text in several]
    if not all(texts):
        raise ValueError(f"{where}: caption: got an empty one; expected words, or leave the line out")
    return texts
