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
