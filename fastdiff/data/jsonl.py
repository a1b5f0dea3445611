"""JSONL files: an object on each line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdiff.reading import reading


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place ("file, line 3") and object; empty lines are left out.

    Raises:
        ValueError: a line that is not UTF-8, or no JSON object; one line with its place. OSError.
    """
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = decode_utf8(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            with reading(where, " is not JSON", "; expected one object per line"):
                row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"{where} is a JSON {type(row).__name__}; expected an object per line")
            yield where, row


def text_in(row: Mapping[str, Any], field: str, where: str) -> str:
    """A field that is a text. Raises ValueError where it is missing, or is none; the message begins with `where`."""
    if field not in row:
        raise ValueError(f"{where} has no field {field!r}; it has {', '.join(row) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} is {type(value).__name__}; expected a string")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{where}: field {field!r} has half of a surrogate pair, which is not a character; repair it")
    return value


def decode_utf8(content: bytes, path: Path | str, offset: int = 0) -> str:
    """Text of a file's bytes, which begin `offset` bytes into it. Raises ValueError with file and byte."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {offset + error.start} (0x{content[error.start]:02x}) is not UTF-8; convert the file, such "
            "as with iconv -f latin1 -t utf-8"
        ) from None
