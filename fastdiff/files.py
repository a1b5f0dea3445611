"""Files that are whole or not there, and where what can be made again is kept."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.reading import read_text, reading

_JSON_LEVELS = 64  # of objects and lists in one another: what walks them does so by calling itself
_CONTENT_READ = 2**28  # bytes: files that are larger together are told by their sizes alone
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder() -> Path:
    """$FASTDIFF_CACHE, or ~/.cache/fastdiff."""
    return Path(os.environ.get("FASTDIFF_CACHE") or Path.home() / ".cache" / "fastdiff")


def check_cache_folder() -> None:
    """Makes the cache folder where there is none, and tries to write in it: before work that would be lost.

    Raises:
        PermissionError: it cannot be written; one line.
    """
    with _naming_cache(cache_folder()):
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache_folder(), prefix=".probe-"):
            pass


@contextlib.contextmanager
def _naming_cache(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PermissionError(
            f"the cache {folder} cannot be written ({error.strerror or error}); set FASTDIFF_CACHE to a folder that can"
        ) from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of_files(files: Sequence[Path], most_bytes: int | None = None) -> str:
    """A hash of files in their order, cheap for folders of any size.

    It is of their sizes, and of their contents where they are `most_bytes` (None: 256 MiB) together, or less. Of more,
    a file whose content was replaced by another of the same size is not noticed. Names and times are not looked at.
    Raises OSError.
    """
    sizes = [path.stat().st_size for path in files]
    digest = hashlib.sha256(str(sizes).encode())
    if sum(sizes) <= (_CONTENT_READ if most_bytes is None else most_bytes):
        for path in files:
            digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM wait until it ends: what it does is done whole.

    Only the main thread may set handlers; elsewhere it changes nothing, as signals do not come there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {each: signal.signal(each, lambda number, frame: received.append(number))
              for each in (signal.SIGINT, signal.SIGTERM)}  # fmt: skip
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
        for number in dict.fromkeys(received):
            signal.raise_signal(number)


@contextlib.contextmanager
def errors_of_the_disk(path: Path) -> Iterator[None]:
    """What Rust libraries (safetensors, tokenizers) say of a full disk becomes an OSError that names `path`."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


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
    with errors_of_the_disk(path):
        write(path)
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError; ValueError for anything else in it, the message names the file."""
    text = read_text(path)
    with reading(path, ": not a JSON file"):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}; expected an object")
    level = [content]
    for _ in range(_JSON_LEVELS):
        level = [entry for value in level for entry in (value.values() if isinstance(value, dict) else value)
                 if isinstance(entry, dict | list)]  # fmt: skip
    if level:
        raise ValueError(f"{path}: not a JSON file of ours: nested more than {_JSON_LEVELS} deep")
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
        with errors_of_the_disk(folder):
            fill(temporary)
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(readable)  # as in `_fill`
            flush_to_disk(path)
        os.rename(temporary, folder)
        flush_to_disk(folder.parent)
    finally:
        with uninterrupted():
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder_once(folder: Path, is_complete: Callable[[Path], bool], fill: Callable[[Path], None]) -> None:
    """Makes a cached folder; processes that ask for the same one at once wait for the one that makes it.

    Args:
        folder: a folder in the cache.
        is_complete: whether `folder` is there and whole.
        fill: writes the files into the folder that it is given.

    Raises:
        PermissionError: the cache cannot be written; one line.
        OSError: the disk is full; the message names the cache. And what `fill` raises. Nothing is left behind then.
    """
    from filelock import FileLock

    with contextlib.ExitStack() as held:
        with _naming_cache(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder.with_name(f".{folder.name}.lock")))
        if is_complete(folder):  # another process made it while this one waited
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write_folder_atomically(folder, fill)
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise
            advice = "free some space, or set FASTDIFF_CACHE to a folder of another disk"
            raise OSError(error.errno, f"{error.strerror}; {advice}", str(folder.parent)) from None


class RecordFile:
    """A JSONL file to which records are added as they come: whatever ends the process, it has each of them whole.

    The first record replaces the file that was there; until then that one stays. `count` is the number of records.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path, self.count = Path(os.path.realpath(path)), 0

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds records, all of them or none. Raises OSError, naming the file, where it cannot be written."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        content = lines.encode("utf-8", "backslashreplace")  # \ud800 is JSON's own way to write half of a pair
        if not self.count:
            write_atomically(self.path, content)
        else:
            self._append(content)
        self.count += len(records)

    def _append(self, content: bytes) -> None:
        size, done = self.path.stat().st_size, False
        try:
            with open(self.path, "ab") as file:
                file.write(content)
            flush_to_disk(self.path)
            done = True
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        finally:
            if not done:  # the disk is full, or Ctrl-C
                os.truncate(self.path, size)


def output_path(given: str | None, default: Path, suffixes: Collection[str] | None = None) -> Path:
    """Where a command writes its result, after a try to open it: before work that would be lost.

    `suffixes` are those of what is written; None is the default's alone.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be written; the message says how to mend it.
        ValueError: its name says that it is of another format than what is written.
    """
    path = Path(given or default)
    name, existed = f"--output {str(path)!r}", os.path.exists(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder; expected the name of a file")
    if existed and not path.is_file():
        raise PermissionError(f"{name} is a device or a pipe; expected the name of a file")
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f"{name} lies in a folder that does not exist; make it first")
    written = {Path(default).suffix} if suffixes is None else set(suffixes)
    if path.suffix and path.suffix.lower() not in written:
        raise ValueError(f"{name} is of another format; expected a name that ends in {' or '.join(sorted(written))}")
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise PermissionError(f"{name} cannot be written ({error.strerror}); pass another file") from None
    return path
