"""COCO captions and Flickr30k from their own files, as published: captions in JSON or lines, photos in folders.

Read are COCO's captions_*.json; the JSON files of Karpathy's splits, of either data set; of Flickr30k results.csv ("|"
between three columns) and results_20130124.token. Nothing is downloaded. The captions are under CC BY 4.0 (COCO) and
for research and education (Flickr30k); the photos are their owners', on Flickr.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastdiff.data.config import DataConfig
from fastdiff.data.file_checks import key_of_files
from fastdiff.data.jsonl import decode_utf8, text_in
from fastdiff.data.pictures import read_picture
from fastdiff.data.prepared import Listing, Source
from fastdiff.data.splits import grouped_split
from fastdiff.errors import named
from fastdiff.files import read_json

if TYPE_CHECKING:
    from PIL import Image

_VERSION = 1  # of how files are read
_MOST_CAPTIONS = 100  # of a picture: as many columns has the table of all
_SPLITS = {"train": False, "restval": False, "test": True}  # of Karpathy; "val" is to choose by
_COCO_FILES = ("dataset_coco.json", "captions_train2017.json", "captions_train2014.json")
_FLICKR_FILES = ("dataset_flickr30k.json", "results.csv", "results_20130124.token")
_FLICKR_PHOTOS = ("flickr30k_images", "flickr30k-images", "images")
_ROW = re.compile(r"([^|]+?)\s*\|\s*(\d+)\s*(?:\|\s*|\s{2,})(.*)")  # one row as published lacks the second "|"
_TOKEN = re.compile(r"(.+)#(\d+)\t(.*)")

Found = dict[str, tuple[bool | None, list[str]]]  # by file: whether it is held out (None: not said), and its captions


def coco_source(config: DataConfig) -> Source:
    """Photos in `config.folder` (or train2017, val2017, … in it) with the captions of `config.captions`.

    None looks for dataset_coco.json, captions_train2017.json or captions_train2014.json in the folder and in its folder
    annotations. Of Karpathy's file "test" is held out, "val" is left out; of COCO's own captions_val*.json is, where it
    lies beside it.

    Raises FileNotFoundError where folder or file is missing; one line.
    """
    return _source("coco", config, _COCO_FILES)


def flickr30k_source(config: DataConfig) -> Source:
    """Photos in `config.folder` (or flickr30k_images in it) with the captions of `config.captions`.

    None looks for dataset_flickr30k.json, results.csv or results_20130124.token in the folder. Of Karpathy's file
    "test" is held out, "val" is left out; the others have no split.

    Raises FileNotFoundError where folder or file is missing; one line.
    """
    return _source("flickr30k", config, _FLICKR_FILES)


def _source(name: str, config: DataConfig, known: Sequence[str]) -> Source:
    if config.folder is None:
        raise ValueError(f"{named('folder')}: got none; {name} needs the folder of its pictures")
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{named('folder')}: got {config.folder!r}, which is not a folder; expected {name}'s pictures in it"
        )
    places = [root / file for file in known] + [root / "annotations" / file for file in known]
    file = next(filter(Path.is_file, places), None) if config.captions is None else Path(config.captions).expanduser()
    if file is None or not file.is_file():
        got = "none, and none in the folder" if file is None else f"{config.captions!r}, which is not a file"
        raise FileNotFoundError(f"{named('captions')}: got {got}; expected one such as {', '.join(known)}")
    files = [file, *filter(None, [_validation(file)])]
    key = f"{_VERSION} {config.held_out_fraction} {root.resolve()} {key_of_files(files)}"
    return Source(name, root, key, lambda: _listing(root, file, config.held_out_fraction), _read)


def _read(path: Path, image_size: int) -> "Image.Image":
    """The centre square of a photo."""
    from PIL import Image, ImageOps

    return ImageOps.fit(read_picture(path, 3), (image_size, image_size), Image.Resampling.BICUBIC)


def _validation(file: Path) -> Path | None:
    """captions_val2017.json beside captions_train2017.json, or None."""
    other = file.with_name(file.name.replace("captions_train", "captions_val"))
    return other if other != file and other.is_file() else None


def _listing(root: Path, file: Path, held_out_fraction: float) -> Listing:
    left_out: Counter[str] = Counter()
    if file.suffix == ".json":
        found = _from_json(root, file, left_out)
    else:
        found = _from_lines(root, file)
    most = max((len(captions) for _, captions in found.values()), default=0)
    if len(found) < 2 or not 1 <= most <= _MOST_CAPTIONS:
        raise ValueError(
            f"{file}: got {len(found)} pictures with up to {most} captions; expected at least 2 pictures with 1 … "
            f"{_MOST_CAPTIONS}"
        )
    held_out = [hidden for hidden, _ in found.values()]
    if None in held_out:
        held_out = grouped_split(list(found), held_out_fraction)
    texts = [[*captions, *[None] * (most - len(captions))] for _, captions in found.values()]
    return Listing(["caption"] * most, list(found), texts, [bool(each) for each in held_out], [], dict(left_out))


def _from_json(root: Path, file: Path, left_out: Counter[str]) -> Found:
    content = read_json(file)
    if "annotations" not in content:
        return _karpathy(root, file, content, left_out)
    other = _validation(file)
    found = _official(root, file, content, None if other is None else False)
    return found if other is None else found | _official(root, other, read_json(other), True)


def _karpathy(root: Path, file: Path, content: dict[str, Any], left_out: Counter[str]) -> Found:
    found: Found = {}
    for where, image in _objects(file, content, "images"):
        split = text_in(image, "split", where)
        if split == "val":
            left_out["of the split val, by which one chooses"] += 1
            continue
        if split not in _SPLITS:
            raise ValueError(f"{where}: split: got {split!r}; expected val, {', '.join(_SPLITS)}")
        folder = text_in(image, "filepath", where) if "filepath" in image else ""
        name = _name(root, folder, text_in(image, "filename", where), where)
        captions = [_caption(text_in(each, "raw", here), here) for here, each in _objects(where, image, "sentences")]
        if not captions:
            raise ValueError(f"{where}: sentences: got none; expected one caption or more")
        found[name] = _SPLITS[split], captions
    return found


def _official(root: Path, file: Path, content: dict[str, Any], held_out: bool | None) -> Found:
    folder = file.stem.removeprefix("captions_")  # train2017
    names: dict[int, str] = {}
    for where, image in _objects(file, content, "images"):
        names[_number(image, "id", where)] = _name(root, folder, text_in(image, "file_name", where), where)
    found: Found = {}
    for where, each in _objects(file, content, "annotations"):
        number = _number(each, "image_id", where)
        if number not in names:
            raise ValueError(f"{where}: image_id: got {number}; expected the id of one of the {len(names)} images")
        captions = found.setdefault(names[number], (held_out, []))[1]
        captions.append(_caption(text_in(each, "caption", where), where))
    return found


def _from_lines(root: Path, file: Path) -> Found:
    """Of results.csv or of a .token file."""
    pattern, expected = (
        (_ROW, "NAME| NUMBER| CAPTION") if file.suffix == ".csv" else (_TOKEN, "NAME#NUMBER<tab>CAPTION")
    )
    folder = next((name for name in _FLICKR_PHOTOS if (root / name).is_dir()), "")
    found: Found = {}
    for number, line in enumerate(decode_utf8(file.read_bytes(), file).split("\n"), 1):
        where, line = f"{file}, line {number}", line.removesuffix("\r")
        if not line.strip() or (number == 1 and line.replace(" ", "").startswith("image_name|")):
            continue
        row = pattern.fullmatch(line)
        if row is None:
            raise ValueError(f"{where}: got {line[:80]!r}; expected {expected}")
        name = _name(root, folder, row[1], where)
        found.setdefault(name, (None, []))[1].append(_caption(row[3], where))
    return found


def _objects(where: Path | str, content: dict[str, Any], field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a list, each with its place."""
    rows = content.get(field)
    if not isinstance(rows, list):
        raise ValueError(f"{where}: {field}: got {type(rows).__name__}; expected a list of objects")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {field}[{index}]: got {type(row).__name__}; expected an object")
        yield f"{where}: {field}[{index}]", row


def _number(row: dict[str, Any], field: str, where: str) -> int:
    value = row.get(field)
    if not isinstance(value, int):
        raise ValueError(f"{where}: {field}: got {value!r}; expected an integer")
    return value


def _name(root: Path, folder: str, name: str, where: str) -> str:
    """A picture's name below the root: in the folder that the file names, where that is there."""
    path = PurePosixPath(folder, name)
    if not name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{where}: got the file {str(path)!r}; expected a name in {str(root)!r}")
    return str(path) if (root / folder).is_dir() else str(PurePosixPath(name))


def _caption(text: str, where: str) -> str:
    words = " ".join(text.split())
    if not words:
        raise ValueError(f"{where}: got an empty caption; expected words")
    return words
