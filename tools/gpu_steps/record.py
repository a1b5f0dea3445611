"""Where the rows of a step go: one line of JSON each, written as it comes.

Rows, by their "kind":
    time      case, contender, seconds, bytes, flops, note
    check     operator, case, contender, error (a share of what is allowed), ok, note
    value     name, value, unit; rate: under which name later steps know it
    failed    case, contender, error: one of fastdiff's backends could not do what it should
    note      text
    missing   text: why the step could not run at all
"""

import json
from typing import Any, TextIO


class Record:
    """Writes rows as they come: what stands in the file stays, whatever happens to the step."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def row(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        self.row("note", text=text)

    def value(self, name: str, value: float, unit: str, rate: str | None = None) -> None:
        self.row("value", name=name, value=value, unit=unit, rate=rate)
