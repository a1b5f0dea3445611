"""Where what can be made again is kept, and files that outlast a power cut."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


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


def make_folder_once(folder: Path, is_complete: Callable[[Path], bool], fill: Callable[[Path], None]) -> None:
    """Makes a cached folder under another name, and gives it its own when it is whole and on disk.

    Processes that ask for the same folder at once wait for the one that makes it.

    Args:
        folder: in the cache.
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
        if is_complete(folder):
            return  # another process made it while this one waited
        for leftover in (folder, *folder.parent.glob(f".{folder.name}.*.writing")):  # of processes that died
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.writing")
        try:
            temporary.mkdir()
            fill(temporary)
            for path in (*temporary.rglob("*"), temporary):
                flush_to_disk(path)
            os.replace(temporary, folder)
            flush_to_disk(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_output(path: Path, content: str | bytes) -> None:
    """Writes a result whole or not at all: what was there before stays until the new file is on the disk.

    Raises:
        OSError: it cannot be written; the message is one line.
    """
    temporary = path.with_name(f".writing-{path.name}"[:255])
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
