"""What the columns of a table are: how values become numbers and ids, and how samples are turned back."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import reason_of
from fastdiff.files import read_json, write_atomically

FILE_NAME = "table_schema.json"
MAX_CATEGORIES = 256  # of a column: with more it is a text or an identifier
_LARGEST = float(np.finfo(np.float32).max)
_DIGITS = 6  # after the point, or of a deviation below 1: float32 carries no more


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers, standardised.

    Attributes:
        name: the column's name.
        mean, deviation: mean and standard deviation in the training part, in the column's units.
        decimals: number of decimals of the values in the source, as far as float32 can carry them; samples are rounded
            to as many.
    """

    name: str
    mean: float
    deviation: float
    decimals: int


@dataclass(frozen=True)
class CategoryColumn:
    """A column of categories: id i stands for values[i]."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class TableSchema:
    """The columns of a table.

    Made by `fit` from the rows to train on. Called with a table it gives a batch; `decode` turns batches and samples
    back: `schema.decode(**model.sample(count=8))`.

    Attributes:
        numbers, categories: the columns, in the order of a batch's "numbers" and "categories".
        names: all columns' names in the order of the source.
        target: the column that is predicted from the others when samples are judged; None where there is none.
    """

    numbers: tuple[NumberColumn, ...]
    categories: tuple[CategoryColumn, ...]
    names: tuple[str, ...]
    target: str | None = None

    @classmethod
    def fit(
        cls,
        table: Mapping[str, Sequence[Any]],
        *,
        categories: Sequence[str] = (),
        target: str | None = None,
        rows: Sequence[int] | None = None,
    ) -> "TableSchema":
        """Learns the columns of a table.

        Args:
            table: values by column name, of one length.
            categories: columns of numbers that are categories; those of texts, and of true and false, are.
            target: see the class.
            rows: those that means and deviations are of; None for all. Categories are those of all rows.

        Raises:
            ValueError: a column is not there, or is refused (see `checked_columns`), or varies in other rows alone.
        """
        columns = checked_columns(table, categories)
        if target is not None and target not in columns:
            raise ValueError(f"the table has no column {target!r}, the target; it has {', '.join(map(str, columns))}")
        if rows is not None and not len(rows):
            raise ValueError("rows: got none; expected those to take means and deviations of")
        chosen = slice(None) if rows is None else np.asarray(rows)
        of_numbers, of_categories = [], []
        for name, values in columns.items():
            if values.dtype == object:
                of_categories.append(CategoryColumn(name, tuple(sorted(set(values.tolist()), key=_natural))))
                continue
            mean, deviation = float(values[chosen].mean()), float(values[chosen].std())
            if deviation <= 1e-12 * np.abs(values[chosen]).max():  # the mean of equal values may differ in its last bit
                raise ValueError(f"column {name!r} is constant in the rows to train on; leave it out")
            of_numbers.append(NumberColumn(name, mean, deviation, _decimals(values, deviation)))
        return cls(tuple(of_numbers), tuple(of_categories), tuple(columns), target)

    @property
    def target_category(self) -> int | None:
        """Index of the target among the categories; None where it is a number, or there is none."""
        names = [column.name for column in self.categories]
        return names.index(self.target) if self.target in names else None

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """How many values each column of categories has."""
        return tuple(len(column.values) for column in self.categories)

    def __call__(self, table: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """{"numbers": float32 [R, N], "categories": int64 [R, K]}; see `encode`."""
        numbers, categories = self.encode(table)
        return {"numbers": numbers, "categories": categories}

    def encode(self, table: Mapping[str, Sequence[Any]]) -> tuple[Tensor, Tensor]:
        """Numbers, standardised, float32 [R, N], and ids of categories, int64 [R, K]. Further columns are not read.

        Raises ValueError for a column that is missing, misses values or has another length than the others, for a
        category that a column does not have, and for texts or infinite values among numbers.
        """
        of_categories = {column.name for column in self.categories}
        for name in self.names:
            if name not in table:
                raise ValueError(f"the table has no column {name!r}; expected {', '.join(map(str, self.names))}")
        columns = {name: _column(name, table[name], name in of_categories) for name in self.names}
        rows = _length(columns)
        for column in self.numbers:
            if columns[column.name].dtype == object:
                raise ValueError(f"column {column.name!r} has texts, or true and false; expected numbers")
        numbers = [(columns[c.name] - c.mean) / c.deviation for c in self.numbers]
        ids = [_ids(columns[column.name], column) for column in self.categories]
        stacked = [np.stack(parts, axis=1) if parts else np.empty((rows, 0)) for parts in (numbers, ids)]
        return torch.from_numpy(stacked[0]).float(), torch.from_numpy(stacked[1]).long()

    def decode(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> dict[str, np.ndarray]:
        """Columns by name in the order of the source, in their own units: float64 [R], or names of categories [R].

        Numbers are rounded to the decimals of their column, not clipped to the range of the data.

        Args:
            numbers: float [R, N], standardised; may be left out where the table has none.
            categories: int [R, K]; likewise.

        Raises:
            ValueError: shapes that do not fit, ids that a column does not have, numbers that are not finite.
        """
        rows = next((given.shape[0] for given in (numbers, categories) if given is not None and given.ndim), 0)
        numbers = torch.empty(rows, 0) if numbers is None else numbers
        categories = torch.empty(rows, 0, dtype=torch.long) if categories is None else categories
        expected = len(self.numbers), len(self.categories)
        if numbers.ndim != 2 or categories.ndim != 2 or (numbers.shape[1], categories.shape[1]) != expected:
            raise ValueError(
                f"numbers: got shape {tuple(numbers.shape)} and categories {tuple(categories.shape)}; expected "
                f"[R, {expected[0]}] and [R, {expected[1]}]"
            )
        if len(numbers) != len(categories):
            raise ValueError(
                f"got {len(numbers)} rows of numbers and {len(categories)} of categories; expected as many"
            )
        columns = {}
        values, ids = numbers.detach().cpu().double().numpy(), categories.detach().cpu().numpy()
        for index, column in enumerate(self.numbers):
            if not np.isfinite(values[:, index]).all():
                raise ValueError(f"numbers of column {column.name!r} are not all finite; the model has diverged")
            in_units = values[:, index] * column.deviation + column.mean
            columns[column.name] = np.round(in_units, column.decimals) + 0.0  # -0.0 becomes 0.0
        for index, column in enumerate(self.categories):
            of_column = ids[:, index]
            if len(of_column) and not 0 <= of_column.min() <= of_column.max() < len(column.values):
                raise ValueError(
                    f"column {column.name!r} got ids {of_column.min()} … {of_column.max()}; expected 0 … "
                    f"{len(column.values) - 1}"
                )
            columns[column.name] = np.array(column.values, dtype=object)[of_column]
        return {name: columns[name] for name in self.names}

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TableSchema":
        """What `to_dict` gave, also when it has been through JSON. Raises KeyError, TypeError or ValueError."""
        numbers = tuple(
            NumberColumn(c["name"], float(c["mean"]), float(c["deviation"]), int(c["decimals"]))
            for c in fields["numbers"]
        )
        categories = tuple(CategoryColumn(c["name"], tuple(map(str, c["values"]))) for c in fields["categories"])
        names, target = tuple(fields["names"]), fields["target"]
        columns = [column.name for column in (*numbers, *categories)]
        if len(columns) != len(names) or set(columns) != set(names) or target not in (None, *names):
            raise ValueError(f"names: got {list(names)} with target {target!r}; expected the columns {columns}")
        return cls(numbers, categories, names, target)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes table_schema.json, whole or not at all."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / FILE_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "TableSchema":
        """Reads it. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected what TableSchema.save_pretrained wrote")
        try:
            return cls.from_dict(read_json(path))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path}: no TableSchema's file, or damaged ({reason_of(error)}); write it again"
            ) from None


def checked_columns(table: Mapping[str, Sequence[Any]], categories: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The columns that something can be learnt from: float64 [R], or names of categories, dtype object [R].

    Columns of texts, and of true and false, are categories. Of a table that it gave it gives the same.

    Args:
        table: values by column name.
        categories: columns of numbers that are categories, too.

    Raises:
        ValueError: no columns, or other lengths; a name that is not there; values that are missing, infinite, all
            the same or of another type; more than 256 categories. One line: what a column has, then what to do, of
            which "leave it out" comes last, so that callers can add how.
    """
    if not len(table):
        raise ValueError("the table has no columns; expected values by column name")
    for name in categories:
        if name not in table:
            raise ValueError(f"the table has no column {name!r}, of categories; it has {', '.join(map(str, table))}")
    columns = {name: _column(name, table[name], name in categories) for name in table}
    if not _length(columns):
        raise ValueError("the table has no rows; expected some to learn from")
    for name, values in columns.items():
        distinct = len(set(values.tolist()))
        if distinct < 2:
            raise ValueError(f"column {name!r} is constant, so there is nothing to learn; leave it out")
        if values.dtype == object and distinct > MAX_CATEGORIES:
            raise ValueError(
                f"column {name!r} has {distinct} categories in {len(values)} rows; expected at most "
                f"{MAX_CATEGORIES}: leave it out"
            )
    return columns


def _column(name: str, values: Sequence[Any], category: bool) -> np.ndarray:
    """float64 [R], or names of categories, dtype object [R], where they are asked for or the values are not numbers."""
    plain = isinstance(values, np.ndarray) and values.dtype.kind in "iuf"
    values = values if plain else np.asarray(values, dtype=object)
    if values.ndim != 1:
        raise ValueError(f"column {name!r} has shape {list(values.shape)}; expected a value per row, or leave it out")
    missing = np.isnan(values) if plain else np.array([_is_missing(value) for value in values], dtype=bool)
    if missing.any():
        raise ValueError(
            f"column {name!r} has {int(missing.sum())} missing values, the first in row {int(missing.argmax()) + 1} "
            f"of {len(values)}; fill them in, remove these rows, or leave it out"
        )
    infinite = np.isinf(values) if plain else np.array([_is_infinite(value) for value in values], dtype=bool)
    if infinite.any():
        raise ValueError(f"column {name!r} has infinite values; remove these rows, or leave it out")
    if category or (not plain and any(isinstance(value, (str, bool, np.bool_)) for value in values)):
        return np.array([_category(value) for value in values.tolist()], dtype=object)
    try:
        numbers = values.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise ValueError(
            f"column {name!r} has values of type {kinds}; expected numbers or texts: convert them, or leave it out"
        ) from None
    large = np.abs(numbers) > _LARGEST
    if large.any():
        row = int(large.argmax())
        raise ValueError(
            f"column {name!r} has {numbers[row]:g} in row {row + 1} of {len(numbers)}; expected at most "
            f"{_LARGEST:.1e}, as float32 has: remove the row, change the unit, or leave it out"
        )
    return numbers


def _is_missing(value: Any) -> bool:
    try:
        return bool(value is None or value == "" or value != value)
    except TypeError:  # pandas' NA, which is neither true nor false
        return True


def _is_infinite(value: Any) -> bool:
    return isinstance(value, (float, np.floating)) and math.isinf(value)


def _category(value: Any) -> str:
    """The name of a category, 1.0 as "1"."""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _length(columns: Mapping[str, np.ndarray]) -> int:
    lengths = {name: len(values) for name, values in columns.items()}
    most = max(lengths.values())
    for name, length in lengths.items():
        if length != most:
            raise ValueError(f"column {name!r} has {length} rows; expected {most} as the longest: make them one length")
    return most


def _natural(value: str) -> tuple[int, float, str]:
    """Categories that are numbers by their value, then the others by the alphabet."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    return (1, 0.0, value) if math.isnan(number) else (0, number, value)  # "nan" compares with nothing


def _decimals(values: np.ndarray, deviation: float) -> int:
    """With how many decimals all values are written, at most 6, or as many as a column of small numbers needs."""
    most = max(_DIGITS, _DIGITS - math.floor(math.log10(deviation)))
    return next((d for d in range(most) if np.allclose(np.round(values, d), values, 1e-12, 0)), most)


def _ids(values: np.ndarray, column: CategoryColumn) -> np.ndarray:
    known = {value: index for index, value in enumerate(column.values)}
    unknown = sorted(set(values.tolist()) - set(known))
    if unknown:
        raise ValueError(f"column {column.name!r} has the value {unknown[0]!r}; expected one of {list(column.values)}")
    return np.array([known[value] for value in values.tolist()], dtype=np.int64)
