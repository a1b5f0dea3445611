"""evaluation.json."""

from pathlib import Path
from typing import Any

from fastdiff.files import read_json


def with_earlier(results: dict[str, Any], output: Path) -> dict[str, Any]:
    """What an earlier call measured of the same weights stays in the file."""
    try:
        earlier = read_json(output)
    except (OSError, ValueError):  # there is none, or it is not a result
        return results
    same = all(earlier.get(name) == results.get(name) for name in ("run", "model", "step", "weights"))
    return {**earlier, **results} if same else results
