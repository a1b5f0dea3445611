"""Mask rates, times, corruption and exact counts of `fastdiff.diffusion.MaskedDiffusion`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.diffusion import MaskedDiffusion, MaskedDiffusionConfig, maskable_tokens

MASK = 99
SCHEDULES = [dict(schedule=name) for name in ("linear", "cosine", "maskgit_cosine")]
SCHEDULES += [dict(schedule="polynomial", exponent=2.5)]
schedules = pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options["schedule"])


def process(**options):
    return MaskedDiffusion(MaskedDiffusionConfig(**options), MASK)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@schedules
def test_mask_rates_and_their_inverse(options):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = {
        "linear": t,
        "cosine": 1 - (math.pi * t / 2).cos(),  # MDLM
        "maskgit_cosine": (math.pi * (1 - t) / 2).cos(),  # MaskGIT's mask ratio after a share 1 - t of the steps
        "polynomial": t**2.5,
    }[options["schedule"]]
    rate = process(**options).mask_rate(t)
    torch.testing.assert_close(rate, expected, rtol=0, atol=1e-14)  # seen: 2e-16
    torch.testing.assert_close(process(**options).time_of(rate), t, rtol=0, atol=1e-14)  # seen: 2e-16


@schedules
def test_weight_is_the_rates_logarithmic_derivative(options):
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    rate = process(**options).mask_rate(t)
    (slope,) = torch.autograd.grad(rate.sum(), t)
    torch.testing.assert_close(process(**options).weight(t), slope / rate, rtol=1e-14, atol=0)  # seen: 4e-16
    if options["schedule"] == "linear":
        torch.testing.assert_close(process().weight(t), 1 / t)
    bounded = process(t_min=0.05, **options)
    assert torch.equal(bounded.weight(torch.tensor([0.0, 0.01])), bounded.weight(torch.tensor([0.05, 0.05])))
    assert torch.equal(process(weighting="none", **options).weight(t), torch.ones_like(t))


@schedules
def test_weights_integrate_to_one_count_of_every_token(options):
    """The integral of w(t)·r(t) is 1 - r(t_min): weighted, each token is masked once on average."""
    p = process(t_min=1e-3, **options)
    t = torch.linspace(1e-3, 1, 20001, dtype=torch.float64)
    integral = torch.trapezoid(p.weight(t) * p.mask_rate(t), t)
    torch.testing.assert_close(integral, 1 - p.mask_rate(t[0]), rtol=0, atol=1e-8)  # seen: 8e-10 (cosine, polynomial)


@pytest.mark.parametrize("sampling", ["iid", "antithetic", "low_discrepancy"])
def test_times_are_uniform_and_in_bounds(sampling):
    p = process(time_sampling=sampling, t_min=0.1)
    generator = seeded(3)
    times = torch.stack([p.sample_times(7, generator) for _ in range(3000)])
    assert times.dtype == torch.float32 and times.min() >= 0.1 and times.max() <= 1
    # mean of uniform(0.1, 1): 0.55, standard deviation 0.26: 5 standard errors of 3000 draws are 0.024; each row alone
    assert (times.mean(0) - 0.55).abs().max() < 0.024
    assert (times.std(0) - 0.9 / 12**0.5).abs().max() < 0.015
    assert torch.equal(p.sample_times(7, seeded(1)), p.sample_times(7, seeded(1)))


def test_dependent_times_spread_better_than_independent_ones():
    def spread(sampling):
        p, generator = process(time_sampling=sampling), seeded()
        return torch.stack([p.sample_times(8, generator).mean() for _ in range(300)]).std()

    assert spread("low_discrepancy") < spread("iid") / 2.5 and spread("antithetic") < 1e-6 < spread("iid")
    t = process(time_sampling="low_discrepancy", t_min=1e-6).sample_times(10, seeded()).sort().values
    assert (t.diff() - 0.1).abs().max() < 1e-5  # evenly spaced


@given(st.integers(0, 2**31 - 1), st.sampled_from(SCHEDULES), st.integers(1, 5), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_protected_tokens_are_never_masked(seed, options, batch, length):
    generator = seeded(seed)
    p = process(**options)
    ids = torch.randint(0, MASK, (batch, length), generator=generator)
    prompts = torch.randint(0, length + 1, (batch,), generator=generator)
    maskable = maskable_tokens(ids, pad_token_id=0, prompt_lengths=prompts)
    protected = (ids == 0) | (torch.arange(length) < prompts[:, None])
    assert torch.equal(maskable, ~protected)
    whole = p.corrupt(ids, torch.ones(batch), maskable, generator)
    assert torch.equal(whole.mask, maskable)  # t = 1 masks all that may be
    assert not p.corrupt(ids, torch.zeros(batch), maskable, generator).mask.any()
    some = p.corrupt(ids, p.sample_times(batch, generator), maskable, generator)
    likelihood = p.mask_for_likelihood(ids, maskable, generator)
    for masked in (whole, some, likelihood):
        assert not (masked.mask & protected).any()
        assert torch.equal(masked.input_ids, torch.where(masked.mask, MASK, ids))
    count = likelihood.mask.sum(1)
    total = maskable.sum(1)
    assert ((count >= 1) | (total == 0)).all() and (count <= total).all()
    expected = torch.where(total > 0, total / count.clamp(min=1), 0)
    torch.testing.assert_close(likelihood.weight, expected.float())


@schedules
def test_tokens_are_masked_at_their_rate_and_by_the_seed(options):
    p, t = process(**options), torch.tensor([0.2, 0.5, 0.9])
    ids = torch.zeros(3, 40000, dtype=torch.int64)
    masked = p.corrupt(ids, t, generator=seeded(5))
    # 5 standard deviations of 40 000 draws: 0.0125
    assert (masked.mask.float().mean(1) - p.mask_rate(t)).abs().max() < 0.0125
    assert torch.equal(masked.weight, p.weight(t))
    assert torch.equal(masked.mask, p.corrupt(ids, t, generator=seeded(5)).mask)
    assert not torch.equal(masked.mask, p.corrupt(ids, t, generator=seeded(6)).mask)


def test_exact_counts_choose_every_subset_equally_often():
    ids = torch.zeros(6000, 5, dtype=torch.int64)
    maskable = torch.tensor([True, True, False, True, True]).expand(6000, 5)
    _, mask = process().mask_exactly(ids, torch.full((6000,), 2), maskable, seeded(1))
    assert (mask.sum(1) == 2).all()
    codes, counts = (mask.long() @ (2 ** torch.arange(5))).unique(return_counts=True)
    assert len(codes) == 6
    chi_square = float(((counts - 1000.0) ** 2 / 1000).sum())
    assert chi_square < 20.5  # 5 degrees of freedom: p = 0.001


def test_likelihood_draws_are_unbiased():
    """A position's expected weight is 1 however many tokens there are: sum of losses times weight estimates the sum."""
    ids = torch.zeros(20000, 6, dtype=torch.int64)
    maskable = torch.tensor([True, True, True, True, True, False]).expand(20000, 6)
    masked = process().mask_for_likelihood(ids, maskable, seeded(2))
    mean = (masked.mask * masked.weight[:, None]).mean(0)
    # Var of weight·mask = E[5/k] - 1 = 1.28: 5 standard errors are 0.04
    assert (mean[:5] - 1).abs().max() < 0.04 and mean[5] == 0
    counts = masked.mask.sum(1).bincount(minlength=6)[1:]
    assert (counts - 4000).abs().max() <= 1  # spread evenly over 1 … 5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: process(schedule="sine"), "schedule: got 'sine'; expected one of linear, cosine, maskgit_cosine"),
        (lambda: process(t_min=0.0), "t_min: got 0.0"),
        (lambda: process(exponent=-1.0), "exponent: got -1.0"),
        (lambda: MaskedDiffusion(MaskedDiffusionConfig(), -1), "mask_token_id: got -1"),
        (lambda: process().corrupt(torch.zeros(2, 3).long(), torch.zeros(3)), r"t: got shape \[3\]; expected \[2\]"),
        (lambda: process().corrupt(torch.zeros(2, 3), torch.zeros(2)), "expected an int64 tensor"),
        (lambda: process().corrupt(torch.tensor([[1, MASK]]), torch.zeros(1)), r"ids\[0, 1\]: got the mask token"),
        (lambda: process().mask_exactly(torch.zeros(1, 3).long(), torch.tensor([4])), r"counts\[0\]: got 4; .* 0 to 3"),
        (lambda: maskable_tokens(torch.zeros(2, 3), prompt_lengths=torch.tensor([1])), "prompt_lengths"),
        (
            lambda: process().corrupt(torch.zeros(1, 3).long(), torch.zeros(1), torch.ones(1, 2, dtype=torch.bool)),
            "maskable: got torch.bool of shape",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
