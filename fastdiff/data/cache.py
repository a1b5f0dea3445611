"""Where what can be made again is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$FASTDIFF_CACHE, or ~/.cache/fastdiff."""
    return Path(os.environ.get("FASTDIFF_CACHE") or Path.home() / ".cache" / "fastdiff")
