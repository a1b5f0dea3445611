"""Noise levels, targets and losses of `fastdiff.diffusion.Diffusion`."""

import functools
import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastdiff.diffusion import Diffusion, DiffusionConfig

COMBINATIONS = [
    (prediction, levels)
    for levels in ("linear", "cosine", "scaled_linear", "uniform", "logit_normal", "beta")
    for prediction in ("epsilon", "sample", "v_prediction", "flow")
    if prediction != "flow" or levels in ("uniform", "logit_normal", "beta")
]


def diffusion(prediction_type, noise_levels, **options) -> Diffusion:
    return Diffusion(DiffusionConfig(prediction_type=prediction_type, noise_levels=noise_levels, **options))


@given(st.sampled_from(COMBINATIONS), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_the_image_comes_back_from_the_target(combination, seed):
    process = diffusion(*combination)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 4, 3, 5, 5, generator=generator)
    t = process.sample_times(4, generator)
    x_t = process.add_noise(x0, noise, t)
    error = process.predicted_x0(process.target(x0, noise, t), x_t, t) - x0
    alpha, _ = process.alpha_sigma(t)
    # predicted noise says the less of the image the smaller alpha is: rounding is amplified by 1 / alpha
    bound = 1e-5 / alpha if combination[0] == "epsilon" else torch.full((4,), 1e-5)
    assert (error.flatten(1).abs().amax(1) <= bound).all()


@given(st.sampled_from(COMBINATIONS), st.integers(0, 2**31 - 1))
@settings(max_examples=30, deadline=None)
def test_targets_and_noise_are_linear_and_by_their_formula(combination, seed):
    process = diffusion(*combination)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 4, 2, 3, 3, generator=generator)
    t = process.sample_times(4, generator)
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in process.alpha_sigma(t))
    formulas = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}
    torch.testing.assert_close(process.target(x0, noise, t), formulas[combination[0]], rtol=0, atol=1e-6)
    torch.testing.assert_close(process.add_noise(x0, noise, t), alpha * x0 + sigma * noise, rtol=0, atol=1e-6)
    total = alpha.square() + sigma.square() if process.config.is_discrete else alpha + sigma
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    scaled = process.target(2 * x0, 2 * noise, t)
    torch.testing.assert_close(scaled, 2 * process.target(x0, noise, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "levels, schedule", [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_discrete_levels_are_those_of_diffusers(levels, schedule):
    process = diffusion("epsilon", levels)
    start, end = (1e-4, 2e-2) if levels == "linear" else (8.5e-4, 1.2e-2)
    theirs = DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end)
    x0, noise = torch.randn(2, 5, 3, 4, 4)
    t = torch.tensor([0, 1, 100, 500, 999])
    torch.testing.assert_close(process.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=2e-5)
    velocity = diffusion("v_prediction", levels).target(x0, noise, t)
    torch.testing.assert_close(velocity, theirs.get_velocity(x0, noise, t), rtol=0, atol=2e-5)


def test_the_flow_is_that_of_diffusers():
    process = diffusion("flow", "uniform")
    theirs = FlowMatchEulerDiscreteScheduler()
    x0, noise = torch.randn(2, 3, 1, 4, 4)
    t = theirs.timesteps[[0, 400, 999]]
    torch.testing.assert_close(process.model_time(t / 1000), t, rtol=0, atol=1e-4)
    expected = theirs.scale_noise(x0, t, noise)
    torch.testing.assert_close(process.add_noise(x0, noise, t / 1000), expected, rtol=0, atol=1e-6)
    # the velocity is the derivative of x_t along t
    step = torch.full((3,), 1e-3)
    difference = process.add_noise(x0, noise, t / 1000 - step) - process.add_noise(x0, noise, t / 1000)
    torch.testing.assert_close(-difference / 1e-3, process.target(x0, noise, t / 1000), rtol=0, atol=1e-3)


def test_times_have_their_distribution():
    count, generator = 20_000, torch.Generator().manual_seed(0)
    draws = {
        levels: diffusion("sample", levels).sample_times(count, generator)
        for levels in ("uniform", "logit_normal", "beta", "linear")
    }
    deviations = 5 / math.sqrt(count)  # five standard errors of a variable within [0, 1]
    assert abs(draws["uniform"].mean() - 0.5) < deviations * 0.29
    assert abs(torch.logit(draws["logit_normal"]).mean()) < deviations
    assert abs(torch.logit(draws["logit_normal"]).std() - 1) < deviations
    assert abs(draws["beta"].mean() - 1 / 3.5) < deviations * 0.22  # Beta(1, 2.5) has mean a / (a + b)
    below = (draws["beta"] < 0.5).float().mean()
    assert abs(below - (1 - 0.5**2.5)) < deviations * 0.5  # its distribution function is 1 - (1 - t)^b
    assert draws["linear"].dtype == torch.int64 and draws["linear"].unique().numel() == 1000
    for levels in draws:
        process = diffusion("sample", levels)
        again = [process.sample_times(8, torch.Generator().manual_seed(3)) for _ in range(2)]
        assert torch.equal(*again)
        torch.manual_seed(3)
        assert process.sample_times(8).shape == (8,)
    shifted = diffusion("flow", "logit_normal", logit_normal_mean=-1.0, logit_normal_std=0.5)
    assert abs(torch.logit(shifted.sample_times(count, generator)).mean() + 1) < deviations
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    clamped = diffusion("sample", "beta", time_range=(0.01, 0.99)).sample_times(count, seeds[0])
    assert torch.equal(clamped, diffusion("sample", "beta").sample_times(count, seeds[1]).clamp(0.01, 0.99))
    assert clamped.min() == torch.tensor(0.01)  # of 20 000 draws some 500 lie below


def test_model_times():
    assert diffusion("epsilon", "linear").model_time(torch.tensor([0, 999])).tolist() == [0.0, 999.0]
    assert diffusion("flow", "uniform").model_time(torch.tensor([0.0, 0.5])).tolist() == [0.0, 500.0]
    assert diffusion("flow", "uniform", time_scale=100.0).model_time(torch.tensor([0.5])).tolist() == [50.0]


def test_time_at_is_the_inverse_of_noise_share():
    discrete, continuous = diffusion("epsilon", "linear"), diffusion("flow", "uniform")
    levels = torch.arange(1000)
    assert [int(discrete.time_at(float(share))) for share in discrete.noise_share(levels)] == levels.tolist()
    assert discrete.time_at(0.0) == 0 and discrete.time_at(1.0) == 999
    assert continuous.time_at(0.25) == 0.25 and continuous.time_at(0.25).dtype == torch.float32


class Constant(nn.Module):
    """Predicts a given tensor and remembers what it was asked."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, sample, timestep, **condition):
        self.asked = (sample, timestep, condition)
        return self.output


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_loss_is_the_error_of_each_sample(combination):
    process = diffusion(*combination)
    x0, noise = torch.randn(2, 4, 2, 3, 3)
    t, condition = process.sample_times(4), dict(class_labels=torch.arange(4), token_conditioning="handed on")
    target = process.target(x0, noise, t)
    offsets = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1)
    model = Constant(target + offsets)
    loss = process.loss(functools.partial(model, **condition), x0, t, noise)
    torch.testing.assert_close(loss, offsets.flatten().square(), rtol=1e-4, atol=1e-6)
    sample, time, handed_on = model.asked
    assert torch.equal(sample, process.add_noise(x0, noise, t)) and torch.equal(time, process.model_time(t))
    assert handed_on == condition


def test_loss_takes_samples_of_any_shape():
    process = diffusion("epsilon", "cosine")
    x0, noise = torch.randn(2, 3, 5, 7)  # [B, L, D]
    t = torch.tensor([3, 400, 999])
    loss = process.loss(lambda x_t, time: torch.zeros_like(x_t), x0, t, noise)
    torch.testing.assert_close(loss, noise.square().mean((1, 2)))


def test_how_noisy_a_time_is():
    levels, continuous = diffusion("epsilon", "linear", num_train_timesteps=50), diffusion("flow", "uniform")
    assert levels.noise_share(torch.tensor([0, 24, 49])).tolist() == pytest.approx([0.02, 0.5, 1.0])
    assert continuous.noise_share(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0.0, 0.25, 1.0]


def test_loss_is_taken_in_float32():
    process = diffusion("flow", "uniform")
    x0, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.7])
    assert process.loss(Constant(noise.bfloat16()), x0, t, noise).dtype == torch.float32


def variance_loss(process, x0, noise, t, prediction, variance):
    both = Constant(torch.cat([prediction, variance], dim=1))
    error = process.loss(Constant(prediction), x0, t, noise)
    return both, process.loss(both, x0, t, noise) - error


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_learnt_variance_is_trained_towards_the_posterior(prediction_type):
    process = diffusion(prediction_type, "linear")
    x0, noise = torch.randn(2, 5, 2, 3, 3)
    t = torch.tensor([1, 10, 300, 700, 999])
    target = process.target(x0, noise, t)
    _, at_posterior = variance_loss(process, x0, noise, t, target, torch.full_like(target, -1.0))
    torch.testing.assert_close(at_posterior, torch.zeros(5), rtol=0, atol=1e-4)  # KL of equal distributions
    model, elsewhere = variance_loss(process, x0, noise, t, target + 0.1, torch.full_like(target, 0.5))
    assert (elsewhere > 0).all()
    (elsewhere.sum()).backward()
    # the variance is learnt for a given mean: it sends no gradient there
    assert torch.count_nonzero(model.output.grad[:, 2:]) and not torch.count_nonzero(model.output.grad[:, :2]) == 0


def test_variance_loss_is_the_kl_of_two_gaussians():
    process = diffusion("sample", "linear", num_train_timesteps=500)
    x0, noise = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64).float()
    t = torch.tensor([200])
    prediction, variance = torch.randn(1, 1, 2, 2), torch.rand(1, 1, 2, 2) * 2 - 1
    _, found = variance_loss(process, x0, noise, t, prediction, variance)
    betas = torch.linspace(1e-4, 2e-2, 500, dtype=torch.float64)
    now, before = (1 - betas).cumprod(0)[200], (1 - betas).cumprod(0)[199]
    true_variance = betas[200] * (1 - before) / (1 - now)
    log_variance = (variance + 1) / 2 * betas[200].log() + (1 - variance) / 2 * true_variance.log()
    weight = before.sqrt() * betas[200] / (1 - now)
    posterior = torch.distributions.Normal(weight * x0.double(), true_variance.sqrt())
    model = torch.distributions.Normal(weight * prediction.double(), (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, model).mean() / math.log(2) * 500 / 1000
    torch.testing.assert_close(found.double()[0], expected, rtol=1e-3, atol=1e-5)


def test_learnt_variance_needs_discrete_levels():
    process = diffusion("flow", "uniform")
    x0 = torch.randn(2, 1, 2, 2)
    with pytest.raises(ValueError, match="learn_sigma.*expected one of linear, cosine, scaled_linear"):
        process.loss(Constant(torch.zeros(2, 2, 2, 2)), x0, torch.tensor([0.1, 0.2]), x0)
    with pytest.raises(ValueError, match="3 output channels; expected 1 or 2"):
        process.loss(Constant(torch.zeros(2, 3, 2, 2)), x0, torch.tensor([0.1, 0.2]), x0)


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(prediction_type="noise"), "prediction_type: got 'noise'; expected one of epsilon"),
        (dict(noise_levels="sigmoid"), "noise_levels: got 'sigmoid'; expected one of linear"),
        (dict(prediction_type="flow", noise_levels="cosine"), "'cosine' with prediction_type 'flow'; expected one of"),
        (dict(num_train_timesteps=0), "num_train_timesteps: got 0"),
        (dict(noise_levels="beta", beta_b=-1.0), "beta_b: got -1.0"),
        (dict(prediction_type="sample", noise_levels="linear", beta_end=1.5), "beta_start, beta_end: got"),
        (dict(noise_levels="beta", time_range=(0.9, 0.1)), r"time_range: got \(0.9, 0.1\); expected two numbers"),
        (dict(noise_levels="beta", time_range=(0.5,)), "time_range: got"),
        (dict(prediction_type="sample", noise_levels="linear", time_range=(0.0, 0.9)), "with noise_levels 'linear'"),
    ],
)
def test_bad_configurations_are_one_line(options, match):
    with pytest.raises(ValueError, match=match) as caught:
        DiffusionConfig(**options)
    assert "\n" not in str(caught.value)


def test_bad_shapes_are_named():
    process, x0 = diffusion("flow", "uniform"), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=r"noise: got shape \[1, 1, 2, 2\]; expected x0's, \[2, 1, 2, 2\]"):
        process.add_noise(x0, x0[:1], torch.zeros(2))
    with pytest.raises(ValueError, match=r"t: got shape \[3\]; expected \[2\]"):
        process.add_noise(x0, x0, torch.zeros(3))
