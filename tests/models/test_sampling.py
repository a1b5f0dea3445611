"""Samplers and seeds of `fastdiff.diffusion.sample`, and class labels as its condition (`sample_classes`)."""

import functools

import pytest
import torch
from torch import nn

from fastdiff.diffusion import SAMPLERS, Diffusion, DiffusionConfig, sample, sample_classes, samplers_for
from fastdiff.models import DiT

# diffusers' DPM-Solver++ reads a tensor in a way that NumPy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LEVELS = ("linear", "cosine", "scaled_linear", "uniform", "logit_normal", "beta")
PROCESSES = [
    DiffusionConfig(prediction_type=prediction, noise_levels=levels)
    for levels in LEVELS
    for prediction in ("epsilon", "sample", "v_prediction", "flow")
    if prediction != "flow" or levels in ("uniform", "logit_normal", "beta")
]
FLOW = Diffusion(DiffusionConfig())


class Known(nn.Module):
    """Knows the image of each class: predicts what a perfect network would. Works element by element."""

    class Config:
        num_classes, in_channels, image_size = 3, 2, (4, 4)

    def __init__(self, diffusion, learn_sigma=False):
        super().__init__()
        self.config, self.diffusion, self.learn_sigma = self.Config(), diffusion, learn_sigma
        self.register_buffer("images", torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(9)))
        self.calls = []

    def forward(self, x, time, labels, **conditioning):
        self.calls.append(dict(batch=len(x), time=time[0].item(), training=self.training, **conditioning))
        t = time.long() if self.diffusion.config.is_discrete else time / 1000
        x0 = self.images[labels]
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in self.diffusion.alpha_sigma(t))
        prediction = self.diffusion.target(x0, (x - alpha * x0) / sigma, t)
        return torch.cat([prediction, torch.zeros_like(prediction)], 1) if self.learn_sigma else prediction


@pytest.mark.parametrize("config", PROCESSES, ids=lambda c: f"{c.noise_levels}-{c.prediction_type}")
def test_every_sampler_finds_the_image_of_a_perfect_network(config):
    diffusion, labels = Diffusion(config), torch.tensor([0, 2, 2])
    for sampler in samplers_for(config):
        for steps in (2, 7, 25):
            for learn_sigma in (False, True) if config.is_discrete else (False,):
                model = Known(diffusion, learn_sigma)
                found = sample_classes(model, diffusion, labels, sampler=sampler, num_inference_steps=steps)
                assert len(model.calls) == steps and found.dtype == torch.float32
                error = (found - model.images[labels]).abs().max()
                assert error < 1e-4, (sampler, steps, learn_sigma, float(error))  # seen: 2e-5


def test_every_sampler_is_offered_somewhere_and_the_rest_is_refused():
    assert {name for config in PROCESSES for name in samplers_for(config)} == set(SAMPLERS)
    for config in PROCESSES:
        for sampler in (*set(SAMPLERS) - set(samplers_for(config)), "heun"):
            with pytest.raises(ValueError) as caught:
                sample_classes(Known(Diffusion(config)), Diffusion(config), [0], sampler=sampler)
            text = str(caught.value)
            assert text.startswith(f"sampler: got '{sampler}'") and "\n" not in text
            assert text.endswith("expected one of " + ", ".join(samplers_for(config)))


class Blurred(nn.Module):
    """An imperfect network: what it predicts depends on x, so the path matters."""

    def forward(self, x, time, labels):
        return torch.tanh(x) * (1 + 0.1 * labels.view(-1, 1, 1, 1)) + 0.001 * time.view(-1, 1, 1, 1)


def noise_of(seed, shape=(2, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [4, 25])
def test_ddim_is_its_closed_form(steps):
    diffusion = Diffusion(DiffusionConfig(prediction_type="epsilon", noise_levels="linear"))
    model, x = Blurred(), noise_of(5)[None].double()
    found = sample_classes(
        model, diffusion, [1], seed=5, sampler="ddim", num_inference_steps=steps, sample_size=(2, 4, 4)
    )
    cumulative = (1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)).cumprod(0)
    stride = 1000 // steps
    for t in range(999, -1, -stride):
        now = cumulative[t]
        before = cumulative[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)
        epsilon = model(x, torch.tensor([float(t)]), torch.tensor([1]))
        x0 = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        x = before.sqrt() * x0 + (1 - before).sqrt() * epsilon
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)  # seen: 2e-5


def test_euler_and_renoising_are_their_closed_forms():
    model = Blurred()
    x = noise_of(5)[None]
    for t in torch.linspace(1, 0.1, 10):
        x = x - 0.1 * model(x, 1000 * t[None], torch.tensor([2]))
    found = sample_classes(model, FLOW, [2], seed=5, sampler="euler", num_inference_steps=10, sample_size=(2, 4, 4))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)

    diffusion = Diffusion(DiffusionConfig(prediction_type="sample", noise_levels="beta"))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, 4, 4, generator=generator)
    levels = torch.linspace(0.99, 0.01, 6)
    for index, t in enumerate(levels):
        x0 = model(x, 1000 * t[None], torch.tensor([2]))
        if index < 5:
            fresh = torch.randn(1, 2, 4, 4, generator=generator)
            x = (1 - levels[index + 1]) * x0 + levels[index + 1] * fresh
    options = dict(seed=5, sampler="renoise", num_inference_steps=6, sample_size=(2, 4, 4))
    torch.testing.assert_close(sample_classes(model, diffusion, [2], **options), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config, sampler", [(c, s) for c in PROCESSES[1:14:4] for s in samplers_for(c)], ids=lambda v: str(v)[:40]
)
def test_a_seed_gives_the_same_sample_wherever_it_stands(config, sampler):
    diffusion, model = Diffusion(config), Blurred()
    options = dict(sampler=sampler, num_inference_steps=5, sample_size=(2, 4, 4))
    labels = [0, 1, 2, 1]
    batch = sample_classes(model, diffusion, labels, seed=11, **options)
    assert torch.equal(batch, sample_classes(model, diffusion, labels, seed=11, **options))
    assert torch.equal(batch, sample_classes(model, diffusion, labels, seed=[11, 12, 13, 14], **options))
    reordered = sample_classes(model, diffusion, [1, 2, 0], seed=[14, 13, 11], **options)
    assert torch.equal(reordered, batch[[3, 2, 0]])
    assert torch.equal(sample_classes(model, diffusion, [2], seed=13, **options)[0], batch[2])
    assert not torch.equal(batch, sample_classes(model, diffusion, labels, seed=12, **options))
    assert sample_classes(model, diffusion, [], **options).shape == (0, 2, 4, 4)


def test_any_condition_may_be_bound():
    """Labels, text or images: `sample` knows none of them."""
    words = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))

    def of_text(x, time):  # a network that gets words, [B, M, ...], and predicts their mean
        assert x.shape == (2, 4, 4) and time.shape == (2,) and not torch.is_grad_enabled()
        return words.mean(1).bfloat16()

    diffusion = Diffusion(DiffusionConfig(prediction_type="sample", noise_levels="cosine"))
    found = sample(of_text, diffusion, (2, 4, 4), device="cpu", num_inference_steps=3)
    assert found.dtype == torch.float32 and torch.equal(found, words.mean(1).bfloat16().float())

    model, labels = Known(FLOW).eval(), torch.tensor([1, 0])
    options = dict(num_inference_steps=4, sampler="renoise", seed=[7, 3])
    found = sample(functools.partial(model, labels=labels), FLOW, (2, 2, 4, 4), device="cpu", **options)
    assert torch.equal(found, sample_classes(model, FLOW, labels, **options))


@pytest.mark.parametrize("shape", [(3,), (-1, 2, 4), (1, 0, 4), torch.tensor([207, 360])], ids=str)
def test_a_shape_must_be_one(shape):
    with pytest.raises(ValueError, match=r"shape: got \[.*\]; expected \[B, C, \.\.\.\].*sample_classes"):
        sample(lambda x, time: x, FLOW, shape, device="cpu")


def test_guidance_moves_along_the_difference():
    model = Known(FLOW)
    labels = torch.tensor([0, 1])
    null = model.images[3]
    for scale in (0.0, 1.0, 2.5):
        found = sample_classes(model, FLOW, labels, guidance_scale=scale, num_inference_steps=3)
        torch.testing.assert_close(found, null + scale * (model.images[labels] - null), rtol=0, atol=1e-4)
    first = sample_classes(model, FLOW, labels, guidance_scale=2.5, guidance_channels=1, num_inference_steps=3)
    torch.testing.assert_close(first[:, 0], (null + 2.5 * (model.images[labels] - null))[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(first[:, 1], model.images[labels][:, 1], rtol=0, atol=1e-4)


def test_guidance_runs_both_halves_inside_its_interval_only():
    model = Known(FLOW)
    sample_classes(model, FLOW, [0, 1, 2], guidance_scale=2, guidance_interval=(0.35, 0.85), num_inference_steps=10)
    halves = [(round(call["time"]), call["batch"]) for call in model.calls]
    assert halves == [(t, 6 if 350 <= t <= 850 else 3) for t in range(1000, 0, -100)]
    model.calls.clear()
    sample_classes(model, FLOW, [0, 1, 2], guidance_scale=1, num_inference_steps=4)
    assert [call["batch"] for call in model.calls] == [3] * 4


def test_further_conditioning_and_its_null():
    model = Known(FLOW)
    given = dict(token_conditioning=torch.ones(2, 5))
    sample_classes(model, FLOW, [0, 1], guidance_scale=2, num_inference_steps=1, conditioning=given)
    assert model.calls[-1]["token_conditioning"].sum(1).tolist() == [5, 5, 0, 0]
    null = dict(token_conditioning=torch.full((2, 5), 2.0))
    sample_classes(
        model, FLOW, [0, 1], guidance_scale=2, num_inference_steps=1, conditioning=given, null_conditioning=null
    )
    assert model.calls[-1]["token_conditioning"].sum(1).tolist() == [5, 5, 10, 10]


def test_callback_clipping_and_the_models_mode():
    model, seen = Known(FLOW).train(), []
    found = sample_classes(
        model, FLOW, [0], num_inference_steps=4, clip_sample=0.5, progress=True,
        callback=lambda step, time, x, x0: seen.append((step, round(time, 3), x.shape, float(x0.abs().max()))),
    )  # fmt: skip
    assert [entry[:3] for entry in seen] == [(i, 1 - i / 4, (1, 2, 4, 4)) for i in range(4)]
    assert all(entry[3] <= 0.5 for entry in seen)
    torch.testing.assert_close(found, model.images[:1].clamp(-0.5, 0.5), rtol=0, atol=1e-6)
    assert model.training and not any(call["training"] for call in model.calls)
    with pytest.raises(RuntimeError, match="from the callback"):
        sample_classes(model, FLOW, [0], callback=lambda *_: (_ for _ in ()).throw(RuntimeError("from the callback")))
    assert model.training


def test_a_dit_samples_every_size_and_under_autocast():
    model = DiT.from_preset("DiT-tiny", depth=1, hidden_size=32, class_dropout_prob=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    options = dict(num_inference_steps=2, guidance_scale=1.5)
    found = sample_classes(model, FLOW, [0, 10], **options)
    assert found.shape == (2, 1, 28, 28) and torch.equal(found, sample_classes(model, FLOW, [0, 10], **options))
    assert sample_classes(model, FLOW, [], **options).shape == (0, 1, 28, 28)
    assert sample_classes(model, FLOW, [1], sample_size=(8, 12), **options).shape == (1, 1, 8, 12)
    rounded = sample_classes(model, FLOW, [0, 10], autocast_dtype=torch.bfloat16, **options)
    assert rounded.dtype == torch.float32 and 0 < (rounded - found).norm() / found.norm() < 0.05
    halved = sample_classes(model.to(torch.bfloat16), FLOW, [0, 10], **options)
    assert halved.dtype == torch.float32 and 0 < (halved - found).norm() / found.norm() < 0.05


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(class_labels=[0, 4]), r"class_labels: got values 0..4; expected 0..3 \(3 is the null label\)"),
        (dict(class_labels=[-1]), "class_labels: got values -1..-1"),
        (dict(guidance_scale=float("nan")), "guidance_scale: got nan; expected a finite number"),
        (dict(guidance_scale=float("inf")), "guidance_scale: got inf"),
        (dict(num_inference_steps=0), "num_inference_steps: got 0; expected 1 or more"),
        (dict(seed=[1, 2]), "seed: got 2 seeds; expected one number, or one for each of the 1 samples"),
        (dict(guidance_interval=(0.5, 0.2)), "guidance_interval: got"),
        (dict(sample_size=(1, 2, 3, 4)), "sample_size: got"),
        (dict(sample_size=0), "sample_size: got 0"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(options, match):
    model = Known(FLOW)
    with pytest.raises(ValueError, match=match) as caught:
        sample_classes(model, FLOW, **{"class_labels": [0], **options})
    assert "\n" not in str(caught.value) and not model.calls
    discrete = Diffusion(DiffusionConfig(prediction_type="sample", noise_levels="linear"))
    with pytest.raises(ValueError, match=r"num_inference_steps: got 1001; expected 1\.\.1000"):
        sample_classes(model, discrete, [0], num_inference_steps=1001)
    with pytest.raises(ValueError, match="guidance_scale: got 2"):
        sample_classes(Blurred(), FLOW, [0], guidance_scale=2, sample_size=(2, 4, 4))
    with pytest.raises(ValueError, match="sample_size: got None"):
        sample_classes(Blurred(), FLOW, [0])


@pytest.mark.parametrize("labels", [torch.tensor([1.7]), [1.0], torch.tensor([True])])
def test_labels_must_be_integers(labels):
    model = Known(FLOW)
    with pytest.raises(TypeError, match="class_labels: got dtype .*; expected int64"):
        sample_classes(model, FLOW, labels)
    assert not model.calls
    few = sample_classes(model, FLOW, torch.tensor([1], dtype=torch.int32), num_inference_steps=2)
    assert torch.equal(few, sample_classes(model, FLOW, [1], num_inference_steps=2))
