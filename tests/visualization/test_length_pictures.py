"""Pictures of length prediction: what is drawn, and what is refused."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from fastdiff.visualization.lengths import BoundsOfRule, RuleTradeoff, save_length_predictions, save_length_tradeoff

BLUE, VERMILLION = "#0072b2", "#d55e00"


def _predictions(path, bounds, lengths):
    return save_length_predictions([BoundsOfRule("cdf", bounds, lengths)], 40, path)


def _dots(axes):
    """{colour: [(length, bound), …]} of a panel."""
    return {
        to_hex(dots.get_facecolor()[0]): [tuple(xy) for xy in dots.get_offsets().tolist()]
        for dots in axes.collections
        if len(dots.get_offsets())
    }


def test_bounds_too_low_have_a_colour_of_their_own(tmp_path, figures):
    lengths = list(range(10, 30))
    for bounds, true in (
        ([n + 5 for n in lengths], lengths),
        ([n - 5 for n in lengths], lengths),
        ([40] * 20, [50] * 20),
    ):
        _predictions(tmp_path / "p.png", bounds, true)
    right, cut, whole = (_dots(figure.axes[0]) for figure in figures)
    assert right == {BLUE: [(n, n + 5) for n in lengths]}
    assert cut == {VERMILLION: [(n, n - 5) for n in lengths]}
    assert whole == {BLUE: [(50, 40)]}  # nothing is cropped, nothing is cut


def test_equal_answers_share_a_dot(tmp_path, figures):
    _predictions(tmp_path / "p.png", [9, 9, 9, 5], [8, 8, 8, 4])
    (dots,) = (dots for dots in figures[0].axes[0].collections if len(dots.get_offsets()))
    areas = dict(zip(map(tuple, dots.get_offsets().tolist()), dots.get_sizes(), strict=True))
    assert areas[8, 9] - 4 == pytest.approx(3 * (areas[4, 5] - 4))


def test_bounds_far_above_are_counted(tmp_path, figures):
    _predictions(tmp_path / "p.png", [9, 9, 9, 30], [8, 8, 8, 8])
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["↑ 25% above"]


def test_nine_rules_have_nine_panels_and_lines(tmp_path, figures):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 2000)
    rules = [BoundsOfRule(f"rule {i}", lengths + random.integers(-20, 50, 2000), lengths, "a note") for i in range(9)]
    path = save_length_predictions(rules, 256, tmp_path / "nine.png", title="nine rules")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "P"  # 128 colours: a third of the bytes
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == [f"rule {i}\na note" for i in range(9)]
    for axes, rule in zip(panels, rules, strict=True):
        drawn = sorted(dot for dots in _dots(axes).values() for dot in dots)
        assert drawn == sorted(set(zip(rule.lengths.tolist(), rule.bounds.tolist(), strict=True)))
    curves = [
        RuleTradeoff(f"rule {i}", [(0.9 - i / 20 - c / 10, c) for c in (0.5, 0.7, 0.9)], (0.5, 0.9), (0.4, 0.8))
        for i in range(9)
    ]
    save_length_tradeoff(curves, tmp_path / "tradeoff.png", coverage=0.9, exact=0.95, title="nine rules")
    (axes,) = figures[1].axes
    assert axes.get_title() == "nine rules" and axes.get_xlabel() == "saved tokens, share of the window"
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(zip(*line.get_data(), strict=True)) for line in lines] == [curve.calibrated for curve in curves]
    assert len({line.get_color() for line in lines}) == 9


def test_points_without_a_curve(tmp_path, figures):
    """Too few pairs for any coverage of a curve, and no published number."""
    points = [RuleTradeoff("cdf", [], published=(0.3, 0.9)), RuleTradeoff("constant", [], chosen=(0.4, 0.8))]
    save_length_tradeoff(points, tmp_path / "points.png", coverage=0.9)
    markers = {
        (line.get_xdata()[0], line.get_ydata()[0]): (to_hex(line.get_color()), to_hex(line.get_markerfacecolor()))
        for line in figures[0].axes[0].lines
        if line.get_marker() not in ("None", None)
    }
    assert markers == {(0.3, 0.9): (BLUE, "#ffffff"), (0.4, 0.8): (VERMILLION, VERMILLION)}


def test_the_old_picture_survives_a_full_disk(tmp_path, monkeypatch):
    path = _predictions(tmp_path / "p.png", [3], [2])
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.files.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*p\.png"):
        _predictions(path, [9], [5])
    assert path.read_bytes() == old and [each.name for each in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize("rules", [[], [BoundsOfRule("cdf", [], [])], [BoundsOfRule("cdf", [1, 2], [1])]])
def test_nothing_to_draw(rules, tmp_path):
    with pytest.raises(ValueError, match="expected at least one, each with a bound for each length"):
        save_length_predictions(rules, 10, tmp_path / "p.png")


def test_no_rules_to_trade_off(tmp_path):
    with pytest.raises(ValueError, match="rules: got none"):
        save_length_tradeoff([], tmp_path / "t.png", coverage=0.9)
