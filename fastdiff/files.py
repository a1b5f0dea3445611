"""Files that are whole or not there, and where what can be made again is kept."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff.reading import read_text, reading


def cache_folder() -> Path:
    """$FASTDIFF_CACHE, or ~/.cache/fastdiff."""
    return Path(os.environ.get("FASTDIFF_CACHE") or Path.home() / ".cache" / "fastdiff")


def flush_to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | os.PathLike, content: bytes | str | Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: what was there before stays until the new file is on the disk.

    Args:
        path: the file; its folder must exist.
        content: bytes, text (written as UTF-8), or a function that writes the file whose path it is given.

    Raises:
        OSError: it cannot be written; the message names `path`. And what the function raises; nothing is left behind.
    """
    path = Path(os.path.realpath(path))  # what a link names is written, the link stays
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file, so that it cannot be replaced by one", str(path))
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.writing")
    try:
        if callable(content):
            _fill(temporary, content)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)  # the new name, too
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _fill(path: Path, write: Callable[[Path], object]) -> None:
    """Lets a function write a file, with the mode that the user's umask gives: safetensors makes files of mode 0600."""
    path.touch()
    mode = path.stat().st_mode
    write(path)
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError; ValueError for anything else in it, the message names the file."""
    text = read_text(path)
    with reading(path, ": not a JSON file"):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}; expected an object")
    return content


def write_folder_atomically(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder whole or not at all: under another name, until all of its files are on the disk.

    Args:
        folder: must not exist.
        fill: writes the files into the folder that it is given.

    Raises OSError and what `fill` raises; nothing is left behind then.
    """
    temporary = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        readable = temporary.stat().st_mode & 0o666
        fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(readable)  # as in `_fill`
            flush_to_disk(path)
        os.rename(temporary, folder)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder_once(folder: Path, is_complete: Callable[[Path], bool], fill: Callable[[Path], None]) -> None:
    """Makes a cached folder; processes that ask for the same one at once wait for the one that makes it.

    Args:
        folder: a folder in the cache.
        is_complete: whether `folder` is there and whole.
        fill: writes the files into the folder that it is given.

    Raises:
        PermissionError: the cache cannot be written; one line. And what `fill` raises: nothing is left behind then.
    """
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise PermissionError(
            f"the cache {folder.parent} cannot be written ({error.strerror or error}); set FASTDIFF_CACHE to a folder "
            "that can"
        ) from None
    with lock:
        if not is_complete(folder):  # no other process made it while this one waited
            shutil.rmtree(folder, ignore_errors=True)
            write_folder_atomically(folder, fill)


def output_path(given: str | None, default: Path) -> Path:
    """Where a command writes its result, after a try to open it: before work that would be lost.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be written; the message says how to mend it.
    """
    path = Path(given or default)
    name, existed = f"--output {str(path)!r}", os.path.exists(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder; expected the name of a file")
    if existed and not path.is_file():
        raise PermissionError(f"{name} is a device or a pipe; expected the name of a file")
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f"{name} lies in a folder that does not exist; make it first")
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise PermissionError(f"{name} cannot be written ({error.strerror}); pass another file") from None
    return path
