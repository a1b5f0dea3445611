"""What the columns of a table are: how values become numbers and ids, and how samples are turned back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers, standardised.

    Attributes:
        name: of the column.
        mean, deviation: of the training part, in the column's units.
        decimals: with which values are written in the source; samples are rounded to as many.
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

    Attributes:
        numbers, categories: the columns, in the order of a batch's "numbers" and "categories".
        names: of all columns in the order of the source.
        target: the column that is predicted from the others when samples are judged; it is one of them.
    """

    numbers: tuple[NumberColumn, ...]
    categories: tuple[CategoryColumn, ...]
    names: tuple[str, ...]
    target: str

    @property
    def target_category(self) -> int | None:
        """Index of the target among the categories; None where it is a number."""
        names = [column.name for column in self.categories]
        return names.index(self.target) if self.target in names else None

    def encode(self, table: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Numbers, standardised, float32 [R, N], and ids of categories, int64 [R, K].

        Raises ValueError for a category that a column does not have.
        """
        rows = len(table[self.names[0]])
        numbers = [(table[c.name].astype(np.float64) - c.mean) / c.deviation for c in self.numbers]
        ids = [_ids(table[column.name], column) for column in self.categories]
        stacked = [np.stack(columns, axis=1) if columns else np.empty((rows, 0)) for columns in (numbers, ids)]
        return torch.from_numpy(stacked[0]).float(), torch.from_numpy(stacked[1]).long()

    def decode(self, numbers: Tensor, categories: Tensor) -> dict[str, np.ndarray]:
        """Columns by name in the order of the source, in their own units: float64 [R], or names of categories [R].

        Numbers are rounded to the decimals of their column, not clipped to the range of the data.

        Args:
            numbers: float [R, N], standardised.
            categories: int [R, K].

        Raises:
            ValueError: shapes that do not fit, ids that a column does not have, numbers that are not finite.
        """
        expected = len(self.numbers), len(self.categories)
        if numbers.ndim != 2 or categories.ndim != 2 or (numbers.shape[1], categories.shape[1]) != expected:
            raise ValueError(
                f"numbers has shape {tuple(numbers.shape)} and categories {tuple(categories.shape)}; expected "
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
            columns[column.name] = np.round(values[:, index] * column.deviation + column.mean, column.decimals)
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
        """What `to_dict` gave, also when it has been through JSON."""
        numbers = tuple(NumberColumn(**column) for column in fields["numbers"])
        categories = tuple(CategoryColumn(c["name"], tuple(c["values"])) for c in fields["categories"])
        return cls(numbers, categories, tuple(fields["names"]), fields["target"])


def _ids(values: np.ndarray, column: CategoryColumn) -> np.ndarray:
    known = {value: index for index, value in enumerate(column.values)}
    unknown = sorted(set(values.tolist()) - set(known))
    if unknown:
        raise ValueError(f"column {column.name!r} has the value {unknown[0]!r}; expected one of {list(column.values)}")
    return np.array([known[value] for value in values.tolist()], dtype=np.int64)
