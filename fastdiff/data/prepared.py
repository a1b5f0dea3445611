"""Pictures with texts that are drawn or decoded once: what a source names is kept in the cache as one .npy file, and
read through a memory map.

A folder of the cache has pixels.npy, uint8 [N, 3, S, S], and listing.json: files, texts, licences, which are held out,
which are broken. While it is made it grows in a folder beside it, and goes on there after a kill.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.data.captions import CaptionedData, Captions, Part
from fastdiff.data.growing import GrowingArray
from fastdiff.data.images import LabelledImages, to_signed_unit
from fastdiff.errors import one_line, reason_of
from fastdiff.files import cache_folder, make_folder_once, read_json, write_atomically
from fastdiff.reading import reading

if TYPE_CHECKING:
    from PIL import Image

_VERSION = 1  # of how pictures are drawn and listings are written
_BLOCK = 64  # pictures between two marks of progress, which a kill costs at most
_CONTENT_READ = 2**28  # bytes: a smaller file is compared with its hash when it is opened
_LONGEST_REASON = 400  # characters kept of what is wrong with a file
_PIXELS, _LISTING = "pixels.npy", "listing.json"


@dataclass(frozen=True)
class Listing:
    """What a source has, in an order that stays.

    Attributes:
        entries: what each column of texts is; see `Captions`.
        files: N names below the source's folder, with "/".
        texts: N rows of one text an entry, None where there is none.
        held_out: N.
        licenses: N, or [] where the source names none of single pictures.
        left_out: how many pictures of the source are not listed, by reason.
    """

    entries: list[str]
    files: list[str]
    texts: list[list[str | None]]
    held_out: list[bool]
    licenses: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where pictures and their texts come from.

    Attributes:
        name: of the data set.
        folder: where the files lie.
        key: a hash of what decides the listing and the pictures, quickly found.
        listing: reads all texts; ValueError where they cannot be read.
        read: a file → a square RGB picture of a given edge, or None where nothing is seen on it, which is left out.
            ValueError and OSError name a file that cannot be read.
        distinct: a picture that looks as one before it is left out, so that nothing held out was trained on.
    """

    name: str
    folder: Path
    key: str
    listing: Callable[[], Listing]
    read: Callable[[Path, int], "Image.Image | None"]
    distinct: bool = False


class MappedImages(LabelledImages):
    """Rows of a file of pictures.

    Args:
        pixels: uint8 [N, C, H, W], a memory map.
        rows: int64 [n]: which of them these are.
        digest: a hash of `pixels`.
    """

    def __init__(self, pixels: np.ndarray, rows: Tensor, digest: str):
        self.pixels, self.rows, self._digest = pixels, rows, digest
        self.labels = torch.zeros(len(rows), dtype=torch.long)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The pictures at `indices`: float32 [n, C, H, W] in [-1, 1]."""
        rows = self.rows[torch.as_tensor(indices, dtype=torch.long)].numpy()
        return to_signed_unit(torch.from_numpy(self.pixels[rows]))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._digest} {self.rows.tolist()}".encode()).hexdigest()


@dataclass(frozen=True)
class PreparedData(CaptionedData):
    """Pictures with texts, and where each comes from.

    Attributes:
        files: names below the source's folder, by part.
        licenses: of each picture, by part; () where the source names none of single pictures.
        left_out: how many pictures of the source are not here, by reason.
        broken: names of files that could not be read.
        place: the folder in the cache.
    """

    files: dict[Part, tuple[str, ...]] = field(default_factory=dict)
    licenses: dict[Part, tuple[str, ...]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    place: Path = Path()


def prepared(source: Source, image_size: int, *, skip_broken: bool = False, progress: bool = True) -> PreparedData:
    """The pictures of a source from the cache, drawn or decoded first where they are not there yet.

    Of two processes at once one waits for the other. After a kill, work goes on where it was; files that could not be
    read are tried again. Files that change later are noticed as far as `Source.key` tells.

    Args:
        source: what is read.
        image_size: edge in pixels.
        skip_broken: leaves out what cannot be read. Once prepared so, it stays so.
        progress: shows a bar.

    Raises:
        ValueError: files that cannot be read, a listing without enough pictures, or a damaged cache; one line.
        FileNotFoundError, ModuleNotFoundError: what the source raises. PermissionError: the cache cannot be written.
        OSError: the disk is full; what was done is kept.
    """
    key = hashlib.sha256(f"{_VERSION} {image_size} {source.key}".encode()).hexdigest()[:32]
    folder = cache_folder() / "prepared" / f"{source.name}-{key}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        make_folder_once(
            folder, Path.is_dir, lambda into: _fill(into, unfinished, source, image_size, skip_broken, progress)
        )
        shutil.rmtree(unfinished, ignore_errors=True)
    return _opened(folder, source.name, image_size)


# ------------------------------------------------------------------------------------------------ writing


def _fill(into: Path, unfinished: Path, source: Source, size: int, skip_broken: bool, progress: bool) -> None:
    """Ends what lies in the folder `unfinished`, and puts it into another."""
    unfinished.mkdir(exist_ok=True)
    listing = _listing(unfinished, source)
    array = GrowingArray(unfinished / _PIXELS, len(listing.files), (3, size, size), "uint8")
    with tqdm(total=len(listing.files), desc=f"preparing {source.name}", unit=" pictures", disable=not progress,
              dynamic_ncols=True, file=sys.stderr) as bar:  # fmt: skip
        _draw_all(array, source, listing, size, bar)
    broken: dict[str, str] = array.notes.get("broken", {})
    reasons = [reason for reason in broken.values() if reason]
    if reasons and not skip_broken:
        more = f" ({len(reasons) - 1} more of {len(listing.files)} files are broken, too)" if len(reasons) > 1 else ""
        raise ValueError(
            f"{reasons[0]}{more}; to leave such out, run: fastdiff prepare {source.name} --skip-broken, with the "
            "options given here"
        )
    digests = _digests(unfinished / _PIXELS)
    same = _repeated(digests, {int(row) for row in broken}) if source.distinct else []
    kept = Counter(hidden for row, hidden in enumerate(listing.held_out) if str(row) not in broken)
    if min(kept[False], kept[True]) < 1:
        raise ValueError(
            f"{source.folder}: got {kept[False]} pictures to train on and {kept[True]} held out; expected 1 of each at "
            "least"
        )
    record = asdict(listing) | {"broken": broken, "same": same, "digest": _together(digests)}
    try:
        os.link(unfinished / _PIXELS, into / _PIXELS)  # a second name, so that no byte is written twice
    except OSError:  # a file system without links
        shutil.copyfile(unfinished / _PIXELS, into / _PIXELS)
    write_atomically(into / _LISTING, json.dumps(record, ensure_ascii=False) + "\n")


def _listing(unfinished: Path, source: Source) -> Listing:
    """The source's listing; one that a killed process left is not made again."""
    file = unfinished / _LISTING
    try:
        return Listing(**read_json(file))
    except (OSError, ValueError, TypeError):
        listing = source.listing()
        write_atomically(file, json.dumps(asdict(listing), ensure_ascii=False) + "\n")
        return listing


def _draw_all(array: GrowingArray, source: Source, listing: Listing, size: int, bar: tqdm) -> None:
    """Appends pictures until all are there, black ones in the place of those that are broken."""

    def drawn(row: int) -> np.ndarray | str:  # uint8 [3, size, size], or what is wrong, "" where nothing is seen
        try:
            picture = source.read(source.folder / listing.files[row], size)
        except (ValueError, OSError) as error:
            return one_line(error)[:_LONGEST_REASON]
        return "" if picture is None else np.asarray(picture).transpose(2, 0, 1)

    bar.update(array.done)
    broken: dict[str, str] = dict(array.notes.get("broken", {}))
    for row in [row for row, reason in broken.items() if reason]:  # they may have been repaired
        again = drawn(int(row))
        if not isinstance(again, str):
            del broken[row]
            array.replace(int(row), again, {"broken": broken})
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # Pillow releases the interpreter's lock
        while array.done < array.rows:
            rows = range(array.done, min(array.done + _BLOCK, array.rows))
            results = list(pool.map(drawn, rows))
            broken |= {str(row): each for row, each in zip(rows, results, strict=True) if isinstance(each, str)}
            blank = np.zeros((3, size, size), np.uint8)
            array.append(np.stack([blank if isinstance(each, str) else each for each in results]), {"broken": broken})
            bar.update(len(rows))


def _digests(file: Path) -> list[bytes]:
    """The SHA-256 of each picture."""
    return [hashlib.sha256(np.ascontiguousarray(pixels)).digest() for pixels in np.load(file, mmap_mode="r")]


def _together(digests: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _repeated(digests: Sequence[bytes], broken: set[int]) -> list[int]:
    """Rows that look as one before them."""
    known: set[bytes] = set()
    repeated = []
    for row, digest in enumerate(digests):
        if row in broken:
            continue
        if digest in known:
            repeated.append(row)
        known.add(digest)
    return repeated


# ------------------------------------------------------------------------------------------------ reading


def _opened(folder: Path, name: str, size: int) -> PreparedData:
    record = _record(folder)
    listing = Listing(**{key: record[key] for key in Listing.__dataclass_fields__})
    pixels = _pixels(folder / _PIXELS, (len(listing.files), 3, size, size), record["digest"])
    dropped = {int(row) for row in record["broken"]} | set(record["same"])
    rows = {
        part: [row for row, hidden in enumerate(listing.held_out) if hidden == (part == "held_out")
               and row not in dropped]
        for part in ("train", "held_out")
    }  # fmt: skip
    sets = {part: MappedImages(pixels, torch.tensor(each, dtype=torch.long), record["digest"]) for part, each in
            rows.items()}  # fmt: skip
    texts = ([listing.texts[row] for row in each] for each in rows.values())
    empty = sum(not reason for reason in record["broken"].values())
    found_late = {"look as another": len(record["same"]), "draw nothing that is seen on white": empty}

    def of(column: list[str]) -> dict[str, tuple[str, ...]]:
        return {part: tuple(column[row] for row in each) if column else () for part, each in rows.items()}

    return PreparedData(
        name,
        sets["train"],
        sets["held_out"],
        ("picture",),
        (3, size, size),
        Captions.of(listing.entries, *texts),
        {},
        files=of(listing.files),
        licenses=of(listing.licenses),
        left_out=listing.left_out | {reason: count for reason, count in found_late.items() if count},
        broken=tuple(listing.files[int(row)] for row, reason in record["broken"].items() if reason),
        place=folder,
    )


def _record(folder: Path) -> dict[str, Any]:
    """listing.json. Raises ValueError, naming the file, where it is not as it was written."""
    file = folder / _LISTING
    try:
        record = read_json(file)
        counts = {len(record[key]) for key in ("files", "texts", "held_out")}
        if len(counts) != 1 or not isinstance(record["digest"], str):
            raise ValueError("its columns are of unlike lengths")
        _ = record["broken"], record["same"], record["entries"], record["licenses"], record["left_out"]
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a whole listing ({reason_of(error)}); {_advice(folder)}") from None


def _pixels(file: Path, shape: tuple[int, ...], digest: str) -> np.ndarray:
    """A memory map. Raises ValueError, naming the file, where it is not as it was written."""
    advice = _advice(file.parent)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected {shape[0]} pictures; {advice}")
    with reading(file, ": not a .npy file", f"; {advice}"):
        pixels = np.load(file, mmap_mode="r")
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(f"{file}: got {pixels.dtype} {pixels.shape}; expected uint8 {shape}; {advice}")
    if pixels.nbytes <= _CONTENT_READ and _together(_digests(file)) != digest:
        raise ValueError(f"{file}: was changed after it was written (its SHA-256 differs); {advice}")
    return pixels


def _advice(folder: Path) -> str:
    return f"delete the folder {folder}, and it is made again"
