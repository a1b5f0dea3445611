"""A look at all files of a data set before training, so that no run ends midway for a broken one; order of names."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from fastdiff.data.pictures import check_picture, picture_size
from fastdiff.errors import named
from fastdiff.files import cache_folder, make_folder_once

Check = Literal["headers", "decode"]
Result = TypeVar("Result")
_VERSION = 1  # of what is checked


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Sorted by name with numbers by their value: frame2 before frame10."""

    def key(path: Path) -> tuple[list[tuple[int, str]], str]:
        parts = re.split(r"([0-9]+)", path.name)  # texts and numbers in turn
        return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], path.name

    return sorted(paths, key=key)


def class_folders(root: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The subfolders of a folder, hidden ones left out: label i is the i-th.

    They come in the natural order of their names, or in the order of `names`. Raises ValueError where these are not
    just the subfolders' names.
    """
    found = natural_order(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if names is None:
        return found
    there = [folder.name for folder in found]
    if sorted(names) != sorted(there):
        unlike = sorted(set(names) ^ set(there))
        raise ValueError(
            f"{named('class_names')}: got {len(names)} names; expected each of the {len(there)} subfolders of "
            f"{str(root)!r} once" + (f", and no other: {', '.join(map(repr, unlike[:3]))}" if unlike else "")
        )
    return [root / name for name in names]


def check_pictures(paths: Sequence[Path], check: Check) -> list[tuple[int, int]]:
    """Width and height of each picture, after a look at all of them.

    Args:
        paths: the files.
        check: "headers" opens each file, "decode" decodes it whole too. Files that were decoded once are known by name,
            size and time in cache_folder()/checked, and not decoded again.

    Raises:
        ValueError: pictures that cannot be read; one line with the first and the number of the others.
    """
    sizes = _each(picture_size, paths, "headers")
    if check == "decode":
        known = cache_folder() / "checked" / key_of_files(paths)
        try:
            make_folder_once(known, Path.is_dir, lambda _: _each(check_picture, paths, "decoding once"))
        except PermissionError:  # a cache that cannot be written: they are decoded each time
            _each(check_picture, paths, "decoding")
    return sizes


def key_of_files(paths: Sequence[Path]) -> str:
    """A hash of files' names, sizes and times, and of Pillow's version: it changes when one of them does."""
    from PIL import __version__

    digest = hashlib.sha256(f"{_VERSION} {__version__}\n".encode())
    for path in paths:
        stat = path.stat()
        digest.update(os.fsencode(path.resolve()) + f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _each(look: Callable[[Path], Result], paths: Sequence[Path], what: str) -> list[Result]:
    """What `look` gives of each file, in threads, with a progress bar on a terminal."""
    from tqdm import tqdm

    def kept(path: Path) -> Result | Exception:
        try:
            return look(path)
        except (ValueError, OSError) as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases the interpreter's lock
        bar = tqdm(pool.map(kept, paths), total=len(paths), desc=what, unit=" files", disable=None, delay=2)
        results = list(bar)
    broken = [result for result in results if isinstance(result, Exception)]
    if len(broken) > 1:
        more = f"so are {len(broken) - 1} more of {len(paths)} files"
        raise ValueError(f"{broken[0]} ({more}, such as {_shortened(broken[1])})") from broken[0]
    if broken:
        raise broken[0]
    return results


def _shortened(error: Exception) -> str:
    return str(error)[:200]
