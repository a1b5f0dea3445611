"""Pictures of length prediction: what is drawn, sizes, refusals."""

import numpy as np
import pytest
from PIL import Image

from fastdiff.visualization.lengths import BoundsOfRule, RuleTradeoff, save_length_predictions, save_length_tradeoff

BLUE, VERMILLION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
LIGHT_BLUE = tuple(round(0.55 * c + 0.45 * 255) for c in BLUE)  # a dot on white


def _count(path, colour, within=60):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(-1) < within).sum())


def _predictions(path, bounds, lengths):
    return save_length_predictions([BoundsOfRule("cdf", bounds, lengths)], 40, path)


def test_bounds_too_low_have_a_colour_of_their_own(tmp_path):
    lengths = list(range(10, 30))
    right = _predictions(tmp_path / "right.png", [length + 5 for length in lengths], lengths)
    cut = _predictions(tmp_path / "cut.png", [length - 5 for length in lengths], lengths)
    whole = _predictions(tmp_path / "whole.png", [40] * 20, [50] * 20)  # nothing is cropped, nothing is cut
    dots = {path: (_count(path, LIGHT_BLUE), _count(path, VERMILLION)) for path in (right, cut, whole)}
    # pixels (blue, vermillion): (4489, 0), (585, 3684) and (801, 36) seen; the legend has some of both
    assert dots[right][0] > 3000 and dots[right][1] < 100
    assert dots[cut][0] < 1000 and dots[cut][1] > 2500
    assert dots[whole][1] < 100


def test_many_rules_and_answers_stay_small(tmp_path):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 200, 2000)
    rules = [BoundsOfRule(f"rule {i}", lengths + random.integers(-20, 50, 2000), lengths, "a note") for i in range(9)]
    path = save_length_predictions(rules, 256, tmp_path / "nine.png", title="nine rules")
    assert path.stat().st_size < 300_000  # 178 kB seen
    curves = [
        RuleTradeoff(f"rule {i}", [(0.9 - i / 20 - c / 10, c) for c in (0.5, 0.7, 0.9)], (0.5, 0.9), (0.4, 0.8))
        for i in range(9)
    ]
    path = save_length_tradeoff(curves, tmp_path / "tradeoff.png", coverage=0.9, exact=0.95, title="nine rules")
    assert path.stat().st_size < 300_000
    one = save_length_tradeoff(curves[:1], tmp_path / "one.png", coverage=0.9)
    with Image.open(path) as first, Image.open(one) as second:
        assert first.size == second.size == (1092, 650)


def test_points_without_a_curve(tmp_path):
    """Too few pairs for any coverage of a curve, and no published number."""
    points = [RuleTradeoff("cdf", [], published=(0.3, 0.9)), RuleTradeoff("constant", [], chosen=(0.3, 0.9))]
    path = save_length_tradeoff(points, tmp_path / "points.png", coverage=0.9)
    assert _count(path, BLUE) > 100 and _count(path, VERMILLION) > 50


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
