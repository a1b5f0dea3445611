"""What libraries say of files that they cannot read becomes one line of ours, in the place where they are called."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdiff.errors import reason_of

JSON_BYTES = 2**28  # a tokenizer.json of a large vocabulary has some tens of megabytes
_RUST_PANIC = "PanicException"  # of safetensors and tokenizers; no Exception, so that nobody catches it by accident


@contextlib.contextmanager
def reading(where: object, problem: str, advice: str = "") -> Iterator[None]:
    """Within the block, whatever a library raises of a file becomes a ValueError `<where><problem> (<reason>)<advice>`.

    Libraries raise what they like on damaged files: Pillow OSError, SyntaxError, struct.error, TypeError and more;
    Rust's panics are no Exceptions. What the system says of a file, such as that it is missing, stays an OSError.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _RUST_PANIC:
            raise  # Ctrl-C
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        raise ValueError(f"{where}{problem} ({_reason(error)}){advice}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    return reason_of(error)


def read_text(path: Path, most_bytes: int = JSON_BYTES) -> str:
    """A file's text. Raises OSError; ValueError for bytes that are not UTF-8, and for more than `most_bytes`."""
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{path}: got {size} bytes; expected at most {most_bytes} in a file of this kind")
    with reading(path, ": not a text in UTF-8"):
        return path.read_bytes().decode("utf-8")


def parse_json(text: str, where: object) -> Any:
    """The value of a JSON text. Raises ValueError for anything else; one line that begins with `where`."""
    with reading(where, ": not JSON"):
        return json.loads(text)
