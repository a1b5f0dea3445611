"""Where what can be made again is kept, and files that outlast a power cut."""

import os
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
