"""Recipes as plain values."""

from typing import Any


def plain(value: Any) -> Any:
    """Dicts, lists and scalars alone: tuples become lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
