"""Trained on synthetic rows, tested on real ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdiff.data import TabularDataConfig, load_tabular_data
from fastdiff.evaluation import train_on_synthetic_test_on_real
from fastdiff.evaluation.tables import _measure, _score


@pytest.fixture(scope="module")
def iris():
    return load_tabular_data(TabularDataConfig(name="iris"))


def judge(data, numbers=None, categories=None):
    numbers = data.train.numbers if numbers is None else numbers
    categories = data.train.categories if categories is None else categories
    return train_on_synthetic_test_on_real(numbers, categories, data, trees=20)


def test_real_rows_as_samples_score_as_real_rows(iris):
    report = judge(iris)
    assert report.measure == "accuracy" and report.target == "species"
    assert (report.rows_synthetic, report.rows_real, report.rows_test) == (114, 114, 36)
    assert report.synthetic == report.real and report.real.value > 0.85
    assert report.real.low <= report.real.value <= report.real.high <= 1
    assert report.baseline.value == pytest.approx(1 / 3)
    assert judge(iris) == report
    assert "| trained on synthetic | 114 |" in report.to_markdown() and report.to_dict()["real"]["value"] > 0.85


def test_copies_are_nearer_than_held_out_rows(iris):
    copies, other_class = judge(iris), judge(iris, categories=(iris.train.categories + 1) % 3)
    assert copies.nearest_synthetic < 1e-4 < 0.1 < copies.nearest_test < 1
    # seen: 1 exactly; a flower of the other species may lie nearer
    assert 0.5 < other_class.nearest_synthetic <= 1 + 1e-6 and other_class.nearest_test == copies.nearest_test
    assert f"| real held-out rows | {copies.nearest_test:.2f} |" in copies.to_markdown()


def test_worthless_rows_score_as_chance(iris):
    """Labels that say nothing of the numbers, and labels that say the wrong thing."""
    generator = torch.Generator().manual_seed(0)
    shuffled = iris.train.categories[torch.randperm(114, generator=generator)]
    assert judge(iris, categories=shuffled).synthetic.value < 0.7
    assert judge(iris, categories=(iris.train.categories + 1) % 3).synthetic.value < 0.1
    one_class = judge(iris, categories=torch.zeros_like(iris.train.categories))
    assert one_class.synthetic == one_class.baseline


def test_a_target_that_is_a_number():
    diabetes = load_tabular_data(TabularDataConfig(name="diabetes"))
    report = judge(diabetes)
    assert report.measure == "R²" and report.synthetic == report.real and 0.25 < report.real.value < 0.7
    assert abs(report.baseline.value) < 0.05
    noise = torch.randn(332, 10, generator=torch.Generator().manual_seed(0))
    assert judge(diabetes, numbers=noise).synthetic.value < 0.1


def test_the_interval_covers_the_true_accuracy():
    """200 tests of 80 rows by a classifier that is right 4 times in 5; 0.8 was seen in 190 of the intervals."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        right = generator.random(80) < 0.8
        score = _score(np.ones(80), right.astype(float), True, seed)
        assert score.value == pytest.approx(right.mean())
        covered += score.low <= 0.8 <= score.high
    assert 175 <= covered <= 199


def test_measures():
    truth, predicted = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 1.0])
    assert _measure(truth, predicted, True) == 0.75
    assert _measure(truth, predicted, False) == pytest.approx(1 - 4 / 5)  # spread about 1.5 is 5
    assert np.isnan(_measure(np.ones(3), np.ones(3), False))


def test_rows_that_are_refused(iris):
    with pytest.raises(ValueError, match="got no rows"):
        judge(iris, iris.train.numbers[:0], iris.train.categories[:0])
    with pytest.raises(ValueError, match=r"expected \[R, 4\] and \[R, 1\]"):
        judge(iris, iris.train.numbers[:, :2])
    with pytest.raises(ValueError, match="are not all finite; the model has diverged"):
        judge(iris, iris.train.numbers * torch.nan)
    with pytest.raises(ValueError, match="schema: it has no target; expected a column to predict"):
        judge(replace(iris, schema=replace(iris.schema, target=None)))
    table = load_tabular_data(TabularDataConfig(name="iris", drop=[c.name for c in iris.schema.numbers]))
    with pytest.raises(ValueError, match="schema: got the column 'species' alone"):
        judge(table)
