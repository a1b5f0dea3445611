"""A .npy file that is written over a long time: whatever ends the process, the next one goes on where it was."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.files import read_json, write_atomically


class GrowingArray:
    """A .npy file [rows, *shape] that grows by rows.

    A JSON file beside it says how many rows are safely there, with notes on them. What was written after that mark is
    written again. `done` is the number of rows, `notes` what was noted with the last of them; a file that is missing,
    shorter than its mark or of another form begins anew.

    Args:
        path: the file; its folder must exist.
        rows: how many it will have.
        shape: of a row.
        dtype: of the numbers.

    Raises OSError where it cannot be written.
    """

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...], dtype: str):
        self.path, self.rows, self.dtype = path, rows, np.dtype(dtype).newbyteorder("<")
        self._mark = path.with_suffix(".json")
        self._header = npy_header((rows, *shape), self.dtype)
        self._row = self.dtype.itemsize * math.prod(shape)
        self.done, self.notes = self._found()
        with open(path, "r+b" if self.done else "wb") as file:
            if not self.done:
                file.write(self._header)
            file.truncate(len(self._header) + self.done * self._row)  # what was not marked may be half of a block

    def append(self, block: np.ndarray, notes: dict[str, Any]) -> None:
        """Adds rows [n, *shape], and marks them with what is now known of all rows."""
        self._write(block, self.done)
        self._set_mark(self.done + len(block), notes)

    def replace(self, row: int, content: np.ndarray, notes: dict[str, Any]) -> None:
        """Writes a row [*shape] that is there anew."""
        self._write(content[None], row)
        self._set_mark(self.done, notes)

    def _write(self, block: np.ndarray, row: int) -> None:
        with open(self.path, "r+b") as file:
            file.seek(len(self._header) + row * self._row)
            file.write(np.ascontiguousarray(block, self.dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _set_mark(self, done: int, notes: dict[str, Any]) -> None:
        write_atomically(self._mark, json.dumps({"rows": done, "notes": notes}) + "\n")
        self.done, self.notes = done, notes

    def _found(self) -> tuple[int, dict[str, Any]]:
        try:
            mark = read_json(self._mark)
            done, notes = int(mark["rows"]), dict(mark["notes"])
            with open(self.path, "rb") as file:
                begins = file.read(len(self._header)) == self._header
            whole = self.path.stat().st_size >= len(self._header) + done * self._row
        except (OSError, ValueError, KeyError, TypeError):
            return 0, {}
        return (done, notes) if begins and whole and 0 <= done <= self.rows else (0, {})


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The first bytes of the .npy file of an array."""
    content = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, described)
    return content.getvalue()
