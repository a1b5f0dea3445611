"""Measures of length bounds and their bootstrap intervals, against values worked out by hand and a simulation."""

import dataclasses
import math

import numpy as np
import pytest

from fastdiff.evaluation.length import Interval, bootstrap_ratios, length_measures


def test_by_hand():
    # window 10: right by 1, right by 0, too low by 2, too long and cut, too long and the whole window
    measures = length_measures([4, 5, 4, 9, 10], [3, 5, 6, 10, 25], 10)
    assert measures.rows == 5 and measures.too_long == 2
    assert measures.correctness.value == pytest.approx(3 / 5)
    assert measures.longest_third.value == pytest.approx(1 / 2)  # 10 and 25
    assert measures.slack.value == pytest.approx(1 / 2)
    assert measures.relative_slack.value == pytest.approx((1 / 2) / 4)
    assert measures.difference.value == pytest.approx((1 + 0 - 2) / 3)
    assert measures.rmse.value == pytest.approx(math.sqrt((1 + 0 + 4) / 3))
    assert measures.saved_tokens.value == pytest.approx((5 + 4 + 5 + 0 + 0) / 5)
    assert measures.saved_share.value == pytest.approx((5 + 4 + 5 + 0 + 0) / 50)


def test_ties_in_the_longest_third_count_whole():
    measures = length_measures([0, 7, 7, 0, 7, 0], [1, 7, 7, 7, 7, 2], 8)  # the second longest of six is one of four 7s
    assert measures.longest_third.value == pytest.approx(3 / 4)


def test_what_no_row_tells_is_none():
    nothing = Interval(None, None, None)
    none_correct = length_measures([0, 1], [5, 6], 8)
    assert none_correct.slack == none_correct.relative_slack == nothing
    assert none_correct.difference == Interval(-5, -5, -5) and none_correct.correctness == Interval(0, 0, 0)
    none_fits = length_measures([8, 3], [8, 9], 8)
    assert none_fits.rmse == none_fits.difference == none_fits.slack == nothing
    assert none_fits.correctness.value == 0.5


def test_constant_rows_have_no_width():
    measures = length_measures([6] * 40, [4] * 40, 10)
    for field in dataclasses.fields(measures):
        value = getattr(measures, field.name)
        if isinstance(value, Interval):
            assert value.low == value.value == value.high, field.name
    assert measures.rmse.value == 2 and measures.saved_share.value == pytest.approx(0.3)


def test_the_same_seed_gives_the_same_interval():
    random = np.random.default_rng(0)
    bounds, lengths = random.integers(0, 20, (2, 50))
    first, again, other = (length_measures(bounds, lengths, 20, resamples=200, seed=seed) for seed in (3, 3, 4))
    assert first == again and first.slack != other.slack and first.slack.value == other.slack.value
    assert first.correctness.low < first.correctness.value < first.correctness.high


def test_intervals_cover_the_truth():
    """400 data sets of a known distribution: about 95 % of the intervals have the truth in them."""
    random = np.random.default_rng(1)
    truth, inside = {"correctness": 0.8, "ratio": 2.0}, {"correctness": 0, "ratio": 0}
    for trial in range(400):
        right = (random.random(120) < truth["correctness"]).astype(float)
        size = random.exponential(1.0, 120) + 0.5
        above = np.stack([right, size * random.normal(truth["ratio"], 0.7, 120)])
        below = np.stack([np.ones(120), size])
        for name, interval in zip(truth, bootstrap_ratios(above, below, resamples=200, seed=trial), strict=True):
            inside[name] += interval.low <= truth[name] <= interval.high
    # observed .925 and .9325; one standard error of 400 trials is .011, and percentile intervals run a little short
    for name, count in inside.items():
        assert 0.90 < count / 400 < 0.98, name


def test_an_interval_is_the_binomials():
    """Of a share, the resamples' spread is that of a binomial: √(p (1 - p) / n)."""
    right = np.zeros(1000)
    right[:900] = 1
    (interval,) = bootstrap_ratios(right[None], np.ones((1, 1000)), resamples=4000)
    half = 1.96 * math.sqrt(0.9 * 0.1 / 1000)  # .0186
    assert interval.high - 0.9 == pytest.approx(half, rel=0.08) and 0.9 - interval.low == pytest.approx(half, rel=0.08)


@pytest.mark.parametrize(
    ("bounds", "lengths", "options", "message"),
    [
        ([], [], {}, r"bounds: got shape \[0\] with lengths of shape \[0\]; expected \[N\]"),
        ([1, 2], [1], {}, r"bounds: got shape \[2\] with lengths of shape \[1\]"),
        ([9], [1], {}, "bounds: got 9 to 9 .* expected bounds of 0 to the window, 8"),
        ([-1], [1], {}, "bounds: got -1 to -1"),
        ([1], [-2], {}, "lengths from -2 on"),
        ([1], [2], {"resamples": 0}, "resamples: got 0; expected at least 1"),
    ],
)
def test_bad_input(bounds, lengths, options, message):
    with pytest.raises(ValueError, match=message):
        length_measures(bounds, lengths, 8, **options)
