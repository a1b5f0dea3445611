"""The length rules on curves that are computed by hand, and bounds against scores."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.generation.length import rules

FORMATS = ("eos_fill", "pad_fill", "eos_only")


def end_log_probs(pmf):
    """What an exact model says with everything masked, by format, for lengths 0 … W - 1 of these probabilities."""
    pmf = torch.as_tensor(pmf, dtype=torch.float64)
    cdf = pmf.cumsum(0).clamp(max=1)
    survival = pmf.flip(0).cumsum(0).flip(0)  # P(length >= i)
    hazard = torch.where(survival > 0, pmf / survival, 1)
    return {"eos_fill": cdf.log()[None], "pad_fill": cdf.log()[None], "eos_only": hazard.clamp(max=1).log()[None]}


def bound_of(end_log_prob, length_format, tau):
    levels = rules.cdf_levels(end_log_prob, length_format)
    return int(rules.curve_bounds(levels, rules.level_of(tau)))


@pytest.mark.parametrize("length_format", FORMATS)
def test_each_format_gives_the_same_distribution(length_format):
    """P(length) = .1, .2, .4, .2, .1: F = .1, .3, .7, .9, 1."""
    ends = end_log_probs([0.1, 0.2, 0.4, 0.2, 0.1])[length_format]
    levels = rules.cdf_levels(ends, length_format)
    assert torch.allclose(1 - torch.exp(-levels), torch.tensor([[0.1, 0.3, 0.7, 0.9, 1.0]], dtype=torch.float64))
    assert [bound_of(ends, length_format, tau) for tau in (0.5, 0.69, 0.71, 0.89, 0.91, 0.999)] == [2, 2, 3, 3, 4, 4]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=20).filter(sum), st.floats(0.5, 0.999))
def test_formats_agree_on_any_distribution(weights, tau):
    pmf = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    cdf = pmf.cumsum(0)
    if bool(((cdf - tau).abs() < 1e-9).any()):
        return  # a tie, which rounding decides
    expected = int((cdf > tau).nonzero()[0])
    assert {bound_of(ends, name, tau) for name, ends in end_log_probs(pmf).items()} == {expected}


def test_the_wrong_format_bounds_a_uniform_length_at_38_instead_of_244():
    """Lengths uniform on 1 … 256, coverage .95: P(EoS at i) = P(length <= i) read as a hazard."""
    pmf = torch.full((257,), 1 / 256, dtype=torch.float64)
    pmf[0] = 0
    ends = end_log_probs(pmf)
    assert [bound_of(ends[name], name, 0.95) for name in FORMATS] == [244, 244, 244]
    assert bound_of(ends["eos_fill"], "eos_only", 0.95) == 38


def test_a_curve_that_falls_is_taken_by_its_running_maximum():
    ends = torch.tensor([[0.1, 0.7, 0.6, 0.9]]).log()
    levels = rules.cdf_levels(ends, "eos_fill")
    assert torch.allclose(1 - torch.exp(-levels), torch.tensor([[0.1, 0.7, 0.7, 0.9]]).double(), atol=1e-7)
    assert rules.curve_scores(levels, torch.tensor([3])) == levels[0, 1]


def test_levels_order_what_is_one_in_float32():
    log_prob = torch.tensor([-1e-9, -1e-12, -1e-15, 0.0, 1e-8])  # the last: rounding of a sum of end tokens
    assert bool((log_prob.exp() == 1).all())
    levels = rules.level(log_prob)
    assert bool((levels[1:4] > levels[:3]).all())
    assert levels[3] == levels[4] == math.inf
    assert rules.level(torch.tensor([-math.inf])) == 0
    assert rules.level(torch.tensor([math.log(0.5)])) == pytest.approx(rules.LOWEST_THRESHOLD, rel=1e-7)


@pytest.mark.parametrize("window", [1, 5, 8, 21])
def test_crossing_is_the_mean_over_the_next_positions(window):
    torch.manual_seed(window)
    probability = torch.rand(3, window, dtype=torch.float64)
    levels = rules.crossing_levels(probability.log())
    for row in range(3):
        means = [probability[row, j : j + 8].mean() for j in range(window)]
        assert torch.allclose(1 - torch.exp(-levels[row]), torch.stack(means), rtol=0, atol=1e-14)
    first = [next((j for j in range(window) if probability[row, j : j + 8].mean() > 0.5), window) for row in range(3)]
    assert rules.curve_bounds(levels, 0.0).tolist() == first


def test_the_quantile_rule_returns_the_quantile_of_the_window_whatever_the_curve():
    position = torch.arange(1.0, 101)
    slow, fast = (position / 101).log(), (1 - 0.8**position).log()
    got = rules.quantile_lengths(torch.stack([slow, fast])[:, :40], 0.75)
    assert got.tolist() == [30, 30]  # 39 · .75 = 29.25: the first position at or above it
    assert rules.quantile_lengths(torch.tensor([[0.2, 0.9, 0.1, 0.8]]).log(), 0.5).tolist() == [1]


def test_argmax_and_regression():
    assert rules.argmax_lengths(torch.tensor([[0.0, 3.0, 2.0], [4.0, 1.0, 2.0]])).tolist() == [1, 0]
    assert rules.regression_lengths(torch.tensor([-3.0, 2.0, 2.1, 99.0]), 8).tolist() == [0, 2, 3, 8]


def test_classifier_levels_are_those_of_its_probabilities():
    logits = torch.tensor([[-1.0, 2.0, 0.5, 40.0]])
    expected = -torch.log1p(-torch.sigmoid(torch.tensor([[-1.0, 2.0, 2.0]]).double()))
    levels = rules.classifier_levels(logits)
    assert torch.allclose(levels[:, :3], expected)
    assert levels[0, 3] == pytest.approx(40, rel=1e-12)  # the probability is 1 in float64


def test_daedals_confidence_is_of_the_last_positions_that_say_end():
    likeliest = torch.zeros(4, 50, dtype=torch.bool)
    probability = torch.full((4, 50), 0.5)
    likeliest[0], probability[0, :18] = True, 0.0  # the first 18 of 50 don't count: 32 do
    likeliest[1, [3, 20, 45]], probability[1, [3, 20, 45]] = True, torch.tensor([0.9, 0.6, 0.3])  # gaps between them
    likeliest[2, 49], probability[2, 49] = True, 0.7
    confidence = rules.daedal_confidence(probability.log(), likeliest)
    expected = torch.tensor([16 / 32, 1.8 / 32, 0.7 / 32, 0.0]).double()  # by 32, however few they are
    assert torch.allclose(confidence, expected, rtol=0, atol=1e-7)
    assert rules.daedal_steps(probability.log(), likeliest, 0.05).tolist() == [0, 0, 1, 1]
    one = torch.arange(64)[None] == 40
    assert float(rules.daedal_confidence(torch.where(one, 0.93, 0.01).log(), one)) == pytest.approx(0.93 / 32)


def test_rho_leaves_a_window_of_which_four_to_six_tenths_end_as_it_is():
    likeliest = torch.arange(10) >= torch.tensor([[10], [7], [6], [4], [3], [0]])
    assert rules.rho_steps(likeliest).tolist() == [1, 1, 0, 0, -1, -1]


@given(st.integers(1, 200), st.lists(st.sampled_from([-1, 0, 1]), min_size=30, max_size=30))
def test_any_search_for_a_window_ends_within_it(longest, steps):
    window, direction, asked = min(rules.EXPANSION_START, longest), 0, 0
    for step in steps:
        after = rules.next_window(window, step, direction, longest)
        direction = direction or step
        asked += 1
        assert min(8, longest) <= after <= longest
        if after == window:
            break
        window = after
    assert asked <= 18  # from 64 to 200, and the one that stays


def test_next_window():
    assert [rules.next_window(64, step, 0, 100) for step in (-1, 0, 1)] == [56, 64, 72]
    assert rules.next_window(96, 1, 1, 100) == 100 and rules.next_window(100, 1, 1, 100) == 100
    assert rules.next_window(72, -1, 1, 100) == 72  # it grew up to here
    assert rules.next_window(12, -1, -1, 100) == 8 and rules.next_window(8, -1, -1, 100) == 8
    assert rules.next_window(5, -1, 0, 5) == 5


LEVELS = st.floats(0, 6) | st.just(math.inf)


@settings(deadline=None, max_examples=200)
@given(st.lists(LEVELS, min_size=1, max_size=12), st.integers(0, 14), LEVELS)
def test_a_curves_bound_is_right_exactly_where_the_score_is_within_the_threshold(levels, length, threshold):
    levels, window = torch.tensor([levels], dtype=torch.float64), len(levels)
    score = float(rules.curve_scores(levels, torch.tensor([length])))
    bound = int(rules.curve_bounds(levels, threshold))
    assert 0 <= bound <= window
    if length >= window:
        assert score == math.inf and bound <= length
    else:
        assert (bound >= length) == (score <= max(threshold, rules.LOWEST_THRESHOLD))


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 12), st.data(), st.integers(-15, 15) | st.just(math.inf))
def test_a_predictions_bound_is_right_exactly_where_the_score_is_within_the_threshold(window, data, threshold):
    prediction = torch.tensor([data.draw(st.integers(0, window))], dtype=torch.float64)
    length = data.draw(st.integers(0, window - 1))
    score = float(rules.length_scores(prediction, torch.tensor([length]), window))
    bound = int(rules.length_bounds(prediction, float(threshold), window))
    assert 0 <= bound <= window
    assert (bound >= length) == (score <= threshold or length == 0)
    assert rules.length_scores(prediction, torch.tensor([window]), window) == math.inf


def test_lengths_are_checked():
    assert rules.as_lengths([3, 0], 2, torch.device("cpu")).tolist() == [3, 0]
    for wrong in ([1], [1, -1], [1.0, 2.0]):
        with pytest.raises(ValueError, match="lengths: got .* expected 2 integers"):
            rules.as_lengths(wrong, 2, torch.device("cpu"))
