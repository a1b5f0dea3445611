"""What commands write: evaluation.json, and samples while they are drawn."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdiff.training.run_folder import RunFolder


def results_folder(path: str | Path, folder: RunFolder | None) -> Path:
    """Where a command puts its files when nobody says: with the run or saved model that `path` names.

    For a model on the hub, which is nobody's to write in, the current folder.
    """
    if folder is not None:
        return folder.path
    local = Path(path)
    return local if local.is_dir() else local.parent if local.is_file() else Path()


class AsTheyCome:
    """Writes finished samples while others are drawn, so that a command that is stopped leaves them.

    After each batch, but for batches that follow so soon that writing would take more than a tenth of the time.

    Args:
        write: writes what there is, in the files' place; called with the samples drawn so far.
    """

    def __init__(self, write: Callable[[Any], object]):
        self._write, self._next = write, 0.0

    def __call__(self, drawn: Any) -> None:
        start = time.monotonic()
        if start < self._next:
            return
        self._write(drawn)
        end = time.monotonic()
        self._next = end + 9 * (end - start)


def with_earlier(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """What an earlier call measured of the same weights stays in the file."""
    try:
        earlier = json.loads(output.read_text())
    except (OSError, ValueError):  # there is none, or it is not a result
        return results
    same = isinstance(earlier, dict) and all(
        earlier.get(name) == results.get(name) for name in ("run", "model", "step", "weights")
    )
    return {**earlier, **results} if same else results
