"""Fréchet distances in an encoder's space, beside those of real examples."""

import pytest
import torch

from fastdiff.data import DataConfig, load_data
from fastdiff.evaluation import batches_of, compare_with_real, encode_batches, frechet_distance


def draw(count, seed, mean=0.0, deviation=1.0, width=8):
    return mean + deviation * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_states_are_averaged_over_tokens():
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    expected = torch.stack([states[0, :2].mean(0), states[1].mean(0), states[2, 4]])
    states[0, 3] = torch.nan  # padding may be anything
    batches = [{"i": torch.tensor([0, 1])}, {"i": torch.tensor([2])}]
    features = encode_batches(lambda batch: (states[batch["i"]], mask[batch["i"]]), batches)
    assert torch.allclose(features, expected, atol=1e-6)
    whole = encode_batches(lambda batch: (states[batch["i"]], None), batches[1:])
    assert torch.allclose(whole, states[2:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("states", "mask", "message"),
    [
        (torch.zeros(2, 3), None, r"states of shape \(2, 3\) and a mask of None"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), r"a mask of \(2, 4\); expected \[B, L, D\]"),
        (torch.zeros(2, 3, 4), torch.tensor([[True] * 3, [False] * 3]), "a row of False alone"),
        (torch.full((2, 3, 4), torch.inf), None, "states that are not finite"),
    ],
)
def test_encoders_that_are_refused(states, mask, message):
    with pytest.raises(ValueError, match=message):
        encode_batches(lambda batch: (states, mask), [{}])
    with pytest.raises(ValueError, match="got none"):
        encode_batches(lambda batch: (states, mask), [])


def test_batches_are_spread_over_the_set():
    digits = load_data(DataConfig(name="digits"))
    batches = list(batches_of(digits.train, 10, batch_size=4))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    expected = digits.train.images([i * 1618 // 10 for i in range(10)])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)
    assert sum(len(batch["labels"]) for batch in batches_of(digits.held_out)) == 179
    assert sum(len(batch["labels"]) for batch in batches_of(digits.held_out, 1000)) == 179


def test_good_samples_are_at_the_floor_and_others_above():
    train, held_out = draw(1000, 0), draw(300, 1)
    good = compare_with_real(draw(400, 2), train, held_out)
    assert (good.count, good.features, good.draws) == (300, 8, 8)
    # 300 against 300 of one normal distribution: 0.21, 0.16 and 0.17 were seen, single draws 0.11 … 0.26
    assert abs(good.samples - good.floor) < 0.1 and abs(good.held_out - good.floor) < 0.1
    shifted = compare_with_real(draw(400, 2, mean=1.0), train, held_out)
    assert shifted.samples == pytest.approx(8 + good.floor, rel=0.15)  # 8 coordinates, each off by 1
    assert (shifted.floor, shifted.held_out) == (good.floor, good.held_out)
    collapsed = compare_with_real(draw(1, 2).expand(400, 8), train, held_out)
    assert collapsed.samples > 8 > 10 * collapsed.floor  # no spread: trace of the identity, and the offset
    for name in ("samples", "held_out", "floor"):
        low, high = getattr(good, f"{name}_range")
        assert low < getattr(good, name) < high
    assert "real, the other half" in good.to_markdown() and good.to_dict()["floor"] == good.floor


def test_one_draw_of_everything_is_the_plain_distance():
    """With as many samples as held-out examples and one draw, samples and held_out differ from the plain distance to
    the drawn half by nothing but the order of the sums."""
    train, samples = draw(80, 0), draw(40, 2)
    same = compare_with_real(samples, train, samples, draws=1)
    assert same.samples == pytest.approx(same.held_out, rel=1e-6)
    twins = compare_with_real(samples, samples.repeat(2, 1), samples, draws=1)
    assert twins.count == 40
    exact = compare_with_real(train, torch.cat([train[:1]] * 160), train, draws=1)  # a reference without spread
    assert exact.samples == pytest.approx(frechet_distance(train, train[:1].expand(80, 8)), rel=1e-6)


@pytest.mark.parametrize("sizes", [(1, 10, 10), (10, 3, 10), (10, 10, 1)])
def test_too_few_examples(sizes):
    with pytest.raises(ValueError, match="expected at least 2, 4, 2 and 1"):
        compare_with_real(*(draw(size, 0) for size in sizes))
