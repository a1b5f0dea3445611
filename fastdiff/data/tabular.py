"""Tables: scikit-learn's bundled sets and CSV files, as standardised numbers and ids of categories."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.csv_files import column_values, read_csv
from fastdiff.data.labelled import LabelledData
from fastdiff.data.splits import stratified_split
from fastdiff.data.table_schema import TableSchema, checked_columns
from fastdiff.errors import named

Table = Mapping[str, np.ndarray]  # columns by name: numbers [R], or str (dtype object) [R]


@dataclass
class TabularDataConfig:
    """Which table to train on. Every column but those of `drop` is modelled, the target too.

    Columns of text (and of true and false) are categories, columns of numbers are numbers, unless `categories` names
    them: their texts are kept as they are ("01067"), without the spaces around them. Missing values, columns that are
    constant, numbers and texts in one column, and texts such as "1,234" are errors that name the column.

    Attributes:
        name: "iris" (150 flowers, 4 numbers, species), "wine" (178, 13 numbers, cultivar), "breast_cancer" (569, 30
            numbers, diagnosis), "diabetes" (442, 9 numbers, sex; the target, progression, is a number), all four
            bundled with scikit-learn, or "csv" (a file with a line of names, values separated by commas).
        path: the CSV file of csv.
        target: for csv, the column that a classifier predicts when samples are judged; None for the last one.
        categories: for csv, columns that are categories though they have numbers, such as a target of 0 and 1.
        drop: columns left out, such as identifiers.
        held_out_fraction: share of the rows (of each class's, where the target is a category); the split is fixed.
    """

    name: Literal["iris", "wine", "breast_cancer", "diabetes", "csv"] = "wine"
    path: str | None = None
    target: str | None = None
    categories: list[str] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    held_out_fraction: float = 0.25

    def __post_init__(self):
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"{named('held_out_fraction')}: got {self.held_out_fraction}; expected a number between 0 and 1"
            )
        if self.name == "csv" and not self.path:
            raise ValueError(f"{named('path')}: got none; csv needs the file")
        if self.name != "csv" and (self.path or self.target or self.categories):
            given = next(name for name in ("path", "target", "categories") if getattr(self, name))
            raise ValueError(
                f"{named(given)}: got {getattr(self, given)!r} with {self.name}; it is for csv: leave it out"
            )


class TableRows:
    """Rows of a table.

    Args:
        numbers: float32 [R, N], standardised.
        categories: int64 [R, K].
    """

    def __init__(self, numbers: Tensor, categories: Tensor):
        assert numbers.ndim == categories.ndim == 2 and len(numbers) == len(categories)
        self.numbers, self.categories = numbers, categories

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"numbers": float32 [n, N], "categories": int64 [n, K]}."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return {"numbers": self.numbers[indices], "categories": self.categories[indices]}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{tuple(self.numbers.shape)} {tuple(self.categories.shape)}".encode())
        digest.update(self.numbers.numpy().tobytes() + self.categories.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TabularData(LabelledData):
    """A table and its columns; `class_names` are the target's categories, none where it is a number."""

    train: TableRows
    held_out: TableRows
    schema: TableSchema

    def record(self) -> dict[str, Any]:
        kept: dict[str, Any] = {column.name: list(column.values) for column in self.schema.categories}
        # not in the fingerprint: standardised rows of another unit are the same
        kept |= {column.name: f"{column.mean:.6g} ± {column.deviation:.6g}" for column in self.schema.numbers}
        return super().record() | {"columns": {name: kept[name] for name in self.schema.names}}

    def table(self, rows: TableRows) -> dict[str, np.ndarray]:
        """Rows in their columns' units."""
        return self.schema.decode(rows.numbers, rows.categories)


def load_tabular_data(config: TabularDataConfig) -> TabularData:
    """Loads the table that a recipe names.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: a package or file is missing; a column has missing values,
            is constant, or has more than 256 categories; one line that names it.
    """
    if config.name not in _SOURCES:
        raise ValueError(f"{named('name')}: got {config.name!r}; expected one of {', '.join(_SOURCES)}")
    table, target = _SOURCES[config.name](config)
    if len(table) < 2:
        raise ValueError(
            f"{_where(config)} has one column alone, {next(iter(table), '')!r}; expected a target and others, "
            "separated by commas"
        )
    unknown = [name for name in (*config.drop, *config.categories, target) if name not in table]
    if unknown:
        raise ValueError(f"{_where(config)} has no column {unknown[0]!r}; it has {', '.join(table)}")
    if target in config.drop:
        raise ValueError(f"{named('drop')}: got {target!r}, which is the target; name another target")
    table = {name: values for name, values in table.items() if name not in config.drop}
    categories = [name for name in config.categories if name not in config.drop]
    with _naming(_where(config)):
        table = checked_columns(table, categories)  # before the split, which looks at the target's values
    train, held_out = _split(target, table[target], config.held_out_fraction, _where(config))
    with _naming(_where(config)):
        schema = TableSchema.fit(table, target=target, rows=train)
    parts = [TableRows(*schema.encode({n: v[rows] for n, v in table.items()})) for rows in (train, held_out)]
    category = schema.target_category
    class_names = () if category is None else schema.categories[category].values
    return TabularData(config.name, *parts, class_names, schema)


def _where(config: TabularDataConfig) -> str:
    return str(config.path) if config.name == "csv" else config.name


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Adds to what is said of a refused column which table it is in, and how a recipe leaves it out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}: name it in {named('drop')}") from None


def _split(name: str, target: np.ndarray, held_out_fraction: float, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows to train on and held out: of each class, where the target is a category."""
    if target.dtype == object:
        classes, labels = np.unique(target.astype(str), return_inverse=True)
        counts = np.bincount(labels)
        if counts.min() < 2:
            raise ValueError(
                f"{where}: {str(classes[counts.argmin()])!r}, a class of the target {name!r}, has one row alone; "
                f"expected at least 2 (one is held out): set {named('target')} to another column, or remove the row"
            )
    else:
        labels = np.zeros(len(target), dtype=np.int64)
    train, held_out = stratified_split(torch.from_numpy(labels), held_out_fraction)
    return train.numpy(), held_out.numpy()


def _bundled(name: str, target: str, target_names: bool = True) -> Callable[[TabularDataConfig], tuple[Table, str]]:
    def load(config: TabularDataConfig) -> tuple[Table, str]:
        try:
            from sklearn import datasets
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{named('name')}: got {name!r}, whose package scikit-learn is not installed; run: pip install "
                "scikit-learn"
            ) from None
        options = {"scaled": False} if name == "diabetes" else {}
        bunch = getattr(datasets, f"load_{name}")(**options)
        columns = {str(n): bunch.data[:, i].astype(np.float64) for i, n in enumerate(bunch.feature_names)}
        if target_names:
            columns[target] = np.array([str(bunch.target_names[label]) for label in bunch.target], dtype=object)
        else:
            columns[target] = bunch.target.astype(np.float64)
        if "sex" in columns:  # 1 and 2 in diabetes
            columns["sex"] = columns["sex"].astype(int).astype(str).astype(object)
        return columns, target

    return load


def _csv(config: TabularDataConfig) -> tuple[Table, str]:
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{named('path')}: got {config.path!r}, which is not a file; expected a CSV file")
    texts = read_csv(path)
    rows = len(next(iter(texts.values())))
    if rows < 2:
        raise ValueError(f"{path} has {rows} rows; expected a line of names and at least 2 of values")
    kept = {*config.drop, *config.categories}  # of those that are dropped nothing is expected
    with _naming(_where(config)):
        return {name: column_values(name, each, name in kept) for name, each in texts.items()}, (
            config.target or list(texts)[-1]
        )


_SOURCES = {
    "iris": _bundled("iris", "species"),
    "wine": _bundled("wine", "cultivar"),
    "breast_cancer": _bundled("breast_cancer", "diagnosis"),
    "diabetes": _bundled("diabetes", "progression", target_names=False),
    "csv": _csv,
}
