"""`fastdiff.diffusion.Guided`: one classifier-free guidance for every condition."""

import pytest
import torch

from fastdiff.diffusion import Diffusion, DiffusionConfig, Guided, sample
from fastdiff.diffusion.guidance import guide

FLOW = Diffusion(DiffusionConfig())
LEVELS = Diffusion(DiffusionConfig(prediction_type="epsilon", noise_levels="linear"))
WORDS, NO_WORDS = torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.zeros(2, 2)


def network(calls, variance=False):
    """Predicts the mean of its words; a learnt variance is their sum."""

    def predict(x, time, words, mask=None):
        calls.append(dict(batch=len(x), time=time.tolist(), words=words.tolist(), mask=mask, dtype=x.dtype))
        prediction = words.mean(1).view(-1, 1, 1).expand(len(x), *x.shape[1:])
        return torch.cat([prediction, 2 * prediction], dim=1) if variance else prediction

    return predict


def guided(calls, scale=2.5, diffusion=FLOW, variance=False, **options):
    conditional, null = dict(words=WORDS, mask=None), dict(words=NO_WORDS, mask=None)
    return Guided(network(calls, variance), conditional, null, diffusion, guidance_scale=scale, **options)


def at(share, diffusion=FLOW):
    """The time [2], as networks get it, at which this share of the noise is there."""
    if diffusion.config.is_discrete:
        return diffusion.model_time(torch.full((2,), round(share * 1000) - 1))
    return diffusion.model_time(torch.full((2,), share))


def test_both_halves_are_one_batch():
    calls, x = [], torch.randn(2, 3, 4)
    found = guided(calls)(x, at(0.5))
    assert len(calls) == 1 and calls[0]["batch"] == 4 and calls[0]["time"] == [500.0] * 4 and calls[0]["mask"] is None
    assert calls[0]["words"] == [*WORDS.tolist(), *NO_WORDS.tolist()]
    assert found[:, 0, 0].tolist() == [5.0, 10.0] and found.shape == x.shape  # 2.5 · the means, 2 and 4


@pytest.mark.parametrize("diffusion", [FLOW, LEVELS], ids=["continuous", "levels"])
def test_it_acts_inside_its_interval_with_both_ends(diffusion):
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        calls = []
        found = guided(calls, diffusion=diffusion, guidance_interval=(0.25, 0.75))(
            torch.randn(2, 3, 4), at(share, diffusion)
        )
        acts = 0.25 <= share <= 0.75
        assert calls[0]["batch"] == (4 if acts else 2)
        assert found[:, 0, 0].tolist() == ([5.0, 10.0] if acts else [2.0, 4.0])


def test_scale_1_needs_no_null():
    calls = []
    plain = Guided(network(calls), dict(words=WORDS), None, FLOW)
    assert plain(torch.randn(2, 3, 4), at(0.5))[:, 0, 0].tolist() == [2.0, 4.0] and calls[0]["batch"] == 2


def test_a_learnt_variance_and_further_channels_are_not_guided():
    x = torch.randn(2, 3, 4)
    found = guided([], variance=True)(x, at(0.5))
    assert found.shape == (2, 6, 4)
    assert found[0, :, 0].tolist() == [5.0] * 3 + [4.0] * 3
    found = guided([], variance=True, guidance_channels=1)(x, at(0.5))
    assert found[0, :, 0].tolist() == [5.0, 2.0, 2.0] + [4.0] * 3
    assert torch.equal(guided([], guidance_channels=7)(x, at(0.5)), guided([])(x, at(0.5)))


def test_autocast_reaches_the_network_and_its_result_is_float32():
    seen = []

    def predict(x, time, words):
        product = words @ words.T
        seen.append(product.dtype)
        return product[:, :1, None].expand(len(x), *x.shape[1:])

    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        made = Guided(
            predict, dict(words=WORDS), dict(words=NO_WORDS), FLOW, guidance_scale=2.0, autocast_dtype=dtype
        )  # fmt: skip
        assert made(torch.randn(2, 3, 4), at(0.5)).dtype == torch.float32
        assert seen.pop() == expected and not torch.is_autocast_enabled("cpu")


def test_conditions_of_two_lengths_are_joined_by_the_caller():
    calls = []

    def join(conditional, null):  # one null word is repeated
        return dict(words=torch.cat([conditional["words"], null["words"].expand(2, 2)]))

    made = Guided(network(calls), dict(words=WORDS), dict(words=NO_WORDS[:, :1]), FLOW, guidance_scale=3.0, join=join)
    assert made(torch.randn(2, 3, 4), at(1.0))[:, 0, 0].tolist() == [6.0, 12.0]


def test_it_is_what_sample_takes():
    diffusion, calls = Diffusion(DiffusionConfig(prediction_type="sample", noise_levels="beta")), []
    made = guided(calls, diffusion=diffusion, guidance_interval=(0.0, 0.5))
    found = sample(made, diffusion, (2, 3, 4), device="cpu", num_inference_steps=4)
    assert [call["batch"] for call in calls] == [2, 2, 4, 4]  # at 1, 0.75, 0.5, 0.25
    torch.testing.assert_close(found, torch.tensor([5.0, 10.0]).view(2, 1, 1).expand(2, 3, 4))


def test_the_formula():
    conditional, unconditional = torch.randn(2, 5)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), 3 * conditional - 2 * unconditional)


@pytest.mark.parametrize(
    "null, options, match",
    [
        (None, {}, r"null: got None with guidance_scale 2.5; expected"),
        ({}, {}, "null: got nothing; expected the names of conditional, words"),
        (dict(text=NO_WORDS), {}, "null: got text; expected the names of conditional, words"),
        (dict(words=NO_WORDS[:, :1]), {}, r"null: got words of shape \[2, 1\]; expected conditional's, \[2, 2\]"),
        (dict(words=None), {}, r"null: got words of shape None; expected conditional's, \[2, 2\]"),
        (dict(words=NO_WORDS), dict(guidance_scale=float("nan")), "guidance_scale: got nan; expected a finite number"),
        (dict(words=NO_WORDS), dict(guidance_interval=(0.5, 1.5)), r"guidance_interval: got \(0.5, 1.5\); expected 0"),
        (dict(words=NO_WORDS), dict(guidance_interval=(0.5,)), r"guidance_interval: got \(0.5,\); expected 0 <= low"),
    ],
)
def test_bad_arguments_are_one_line(null, options, match):
    with pytest.raises(ValueError, match=match) as caught:
        Guided(network([]), dict(words=WORDS), null, FLOW, **{"guidance_scale": 2.5, **options})
    assert "\n" not in str(caught.value)
