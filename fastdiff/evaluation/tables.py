"""What synthetic rows are worth: a model trained on them and tested on real rows, beside one trained on real rows."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.table_schema import TableSchema
from fastdiff.data.tabular import TableRows, TabularData

_LEVEL = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A score and its 95 % bootstrap interval over the rows of the test."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} … {self.high:.3f})"


@dataclass(frozen=True)
class SyntheticReport:
    """Scores on real held-out rows.

    Attributes:
        measure: "accuracy", or "R²" where the target is a number.
        target: the column that is predicted.
        rows_synthetic, rows_real, rows_test: how many.
        synthetic: trained on synthetic rows.
        real: trained on real rows.
        baseline: the score of the real rows' commonest class, or their mean.
        nearest_synthetic, nearest_test: median distance to the nearest row to train on, of synthetic rows and of the
            test's: numbers standardised, a differing category counts 1. Synthetic rows that are much nearer are copies.
    """

    measure: str
    target: str
    rows_synthetic: int
    rows_real: int
    rows_test: int
    synthetic: Score
    real: Score
    baseline: Score
    nearest_synthetic: float
    nearest_test: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        lines = [
            f"| {self.measure} on {self.rows_test} real held-out rows, target {self.target} | rows | 95 % interval |",
            "| --- | ---: | ---: |",
            f"| trained on synthetic | {self.rows_synthetic} | {self.synthetic} |",
            f"| trained on real | {self.rows_real} | {self.real} |",
            f"| {'commonest class' if self.measure == 'accuracy' else 'mean'} of the real ones | | {self.baseline} |",
            "",
            "| median distance to the nearest real row to train on | |",
            "| --- | ---: |",
            f"| synthetic rows | {self.nearest_synthetic:.2f} |",
            f"| real held-out rows | {self.nearest_test:.2f} |",
        ]
        return "\n".join(lines)


def train_on_synthetic_test_on_real(
    numbers: Tensor, categories: Tensor, data: TabularData, *, trees: int = 200, seed: int = 0
) -> SyntheticReport:
    """Trains scikit-learn's random forests on synthetic and on real rows, and tests both on the held-out real rows.

    Intervals come from resampling the rows of the test (2 000 times, percentiles); where all of them are right, theirs
    is a point, though the true accuracy may lie below. What another sample or training would give is not in them.

    Args:
        numbers: float [R, N], standardised, as the model gives them. They are turned back and rounded as in the CSV.
        categories: int [R, K].
        data: the real table.
        trees: trees of a forest.
        seed: seed of forests and resampling.

    Raises:
        ValueError: shapes or values that do not fit the table, no rows, no target, or no column beside it.
    """
    if not len(numbers):
        raise ValueError("numbers: got no rows; expected synthetic ones")
    schema = data.schema
    if schema.target is None:
        raise ValueError("schema: it has no target; expected a column to predict: TableSchema.fit(…, target=…)")
    if len(schema.names) < 2:
        raise ValueError(f"schema: got the column {schema.target!r} alone; expected others to predict it from")
    synthetic = TableRows(*schema.encode(schema.decode(numbers, categories)))
    test, truth = _inputs_and_target(data.held_out, schema)
    predictions = {}
    for name, rows in (("synthetic", synthetic), ("real", data.train)):
        inputs, target = _inputs_and_target(rows, schema)
        predictions[name] = _forest(schema, trees, seed).fit(inputs, target).predict(test)
    real_target = _inputs_and_target(data.train, schema)[1]
    classes = schema.target_category is not None
    constant = np.bincount(real_target).argmax() if classes else real_target.mean()
    predictions["baseline"] = np.full(len(truth), constant)
    scores = {name: _score(truth, predicted, classes, seed) for name, predicted in predictions.items()}
    counts = dict(rows_synthetic=len(numbers), rows_real=len(data.train), rows_test=len(data.held_out))
    nearest = {
        "nearest_synthetic": _nearest(synthetic, data.train),
        "nearest_test": _nearest(data.held_out, data.train),
    }
    return SyntheticReport("accuracy" if classes else "R²", schema.target, **counts, **scores, **nearest)


def _nearest(rows: TableRows, others: TableRows) -> float:
    """The median over `rows` of the distance to the nearest of `others`."""
    squares = torch.cdist(rows.numbers.double(), others.numbers.double()).square()
    squares += (rows.categories[:, None] != others.categories).sum(-1)
    return float(squares.amin(1).sqrt().median())


def _inputs_and_target(rows: TableRows, schema: TableSchema) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and one-hot categories without the target's [R, …], and the target [R]: ids, or standardised numbers."""
    category = schema.target_category
    names = [column.name for column in schema.numbers]
    kept = [index for index, name in enumerate(names) if name != schema.target]
    inputs = [rows.numbers[:, kept]]
    for index, column in enumerate(schema.categories):
        if index != category:
            inputs.append(torch.nn.functional.one_hot(rows.categories[:, index], len(column.values)).float())
    target = rows.numbers[:, names.index(schema.target)].double() if category is None else rows.categories[:, category]
    return torch.cat(inputs, dim=1).numpy(), target.numpy()


def _forest(schema: TableSchema, trees: int, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    kind = RandomForestRegressor if schema.target_category is None else RandomForestClassifier
    return kind(n_estimators=trees, random_state=seed)


def _score(truth: np.ndarray, predicted: np.ndarray, classes: bool, seed: int) -> Score:
    rows = np.random.default_rng(seed).integers(0, len(truth), (_RESAMPLES, len(truth)))
    drawn = _measure(truth[rows], predicted[rows], classes)
    low, high = np.nanquantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Score(float(_measure(truth, predicted, classes)), float(low), float(high))


def _measure(truth: np.ndarray, predicted: np.ndarray, classes: bool) -> np.ndarray:  # [..., R] -> [...]
    if classes:
        return (truth == predicted).mean(-1)
    residual = ((truth - predicted) ** 2).sum(-1)
    spread = ((truth - truth.mean(-1, keepdims=True)) ** 2).sum(-1)
    return 1 - residual / np.where(spread > 0, spread, np.nan)  # a draw of one row over and over has none
