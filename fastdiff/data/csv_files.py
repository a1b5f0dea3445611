"""The one reader of CSV files: columns of texts, then of numbers where all of a column's texts are numbers."""

import csv
import re
from pathlib import Path

import numpy as np

from fastdiff.reading import reading

MAX_BYTES = 2**29
# what pandas, R and spreadsheets write where a value is missing
_MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
     "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
_NUMBER = re.compile(r"[+-]?(?!0[0-9])([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf(inity)?", re.IGNORECASE)
_ALMOST = re.compile(r"[+-]?[0-9.,'’%$€£_\s]*[0-9][0-9.,'’%$€£_\s]*")  # "1,234", "01067", "12 %"


def read_csv(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file by name, as texts without the spaces around them.

    The file is UTF-8: a line of names, then rows of as many values, separated by commas, perhaps quoted.

    Raises:
        ValueError: not such a file, names that are missing, numbers, or there twice, or more than 512 MiB; one line.
        OSError: it is missing.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path}: got {path.stat().st_size} bytes; expected at most {MAX_BYTES}: take part of its rows"
        )
    with reading(path, " cannot be read as CSV", "; repair it"), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True, strict=True)
        names = [name.strip() for name in next(reader, [])]
        _check_names(names)
        columns: list[list[str]] = [[] for _ in names]
        known: dict[str, str] = {}  # a text that comes again is kept once
        for row in reader:
            if len(row) != len(names):
                if len(row) < 2 and not "".join(row).strip():
                    continue  # an empty line
                raise ValueError(f"line {reader.line_num} has {len(row)} values; the line of names has {len(names)}")
            for column, text in zip(columns, row, strict=True):
                text = text.strip()
                column.append(known.setdefault(text, text))
    return dict(zip(names, columns, strict=True))


def _check_names(names: list[str]) -> None:
    if not names:
        raise ValueError("it is empty; expected a line of names")
    known: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"column {number} has no name; expected a line of names first")
        if not name.isprintable():
            raise ValueError(f"column {number} has the name {name!r}; expected characters that can be printed")
        if name in known:
            raise ValueError(f"its first line has {name!r} twice; expected a line of names")
        known.add(name)
        if _NUMBER.fullmatch(name) or _ALMOST.fullmatch(name):
            raise ValueError(
                f"its first line has the number {name!r}; expected a line of names: add one, with letters in each"
            )


def column_values(name: str, texts: list[str], category: bool) -> np.ndarray:
    """A column as float64 [R], NaN where a value is missing, or as texts, dtype object [R], None where it is.

    Args:
        name: of the column, for messages.
        texts: its values.
        category: keeps the texts, "01067" too; else they are numbers where all are.

    Raises ValueError for numbers and texts in one column, and for texts that are almost numbers, such as "1,234" and
    "01067"; it names column, row and text, and says what to do, of which "leave it out" comes last.
    """
    present = [text for text in texts if text not in _MISSING]
    numbers = 0 if category else sum(_NUMBER.fullmatch(text) is not None for text in present)
    if present and numbers == len(present):
        return np.array([np.nan if text in _MISSING else float(text) for text in texts])
    if not category and any(_ALMOST.fullmatch(text) for text in present):
        numeric = 2 * sum(_ALMOST.fullmatch(text) is not None for text in present) >= len(present)
        odd = next(
            (each for each in enumerate(texts, 1) if each[1] not in _MISSING
             and (not _NUMBER.fullmatch(each[1]) if numeric else _ALMOST.fullmatch(each[1]))),
        )  # fmt: skip
        among = "a number such as 1234.5" if numeric else "a text, as in its other rows"
        raise ValueError(
            f"column {name!r} has {odd[1]!r} in row {odd[0]} of {len(texts)}; expected {among}: repair it, name the "
            "column in categories to keep its texts as they are, or leave it out"
        )
    return np.array([None if text in _MISSING else text for text in texts], dtype=object)
