"""Sampling a DiT with its modulations made ahead: the same samples, from fewer products."""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.diffusion import Diffusion, DiffusionConfig, modulated, sample, sample_classes
from fastdiff.models import DiT, DiTConfig

FLOW = Diffusion(DiffusionConfig())
LEVELS = Diffusion(DiffusionConfig(prediction_type="epsilon", noise_levels="linear"))
LABELS = [2, 0, 2, 2, 4, 0]


class Recorded(DiT):
    """A DiT that writes down for which times and labels its modulations are asked."""

    def modulations(self, timesteps, class_labels):
        self.asked = [*getattr(self, "asked", ()), (timesteps.tolist(), class_labels.tolist())]
        return super().modulations(timesteps, class_labels)


class AsItIs(nn.Module):
    """A DiT of which the sampler knows nothing but how it is called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, x, time, labels):
        return self.model(x, time, labels)


def small_dit(kind=Recorded, **overrides):
    options = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)
    torch.manual_seed(0)
    model = kind(DiTConfig(**{**options, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def difference(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "overrides, diffusion, options",
    [
        ({}, FLOW, dict(guidance_scale=1.5)),
        ({}, FLOW, dict(guidance_scale=2.0, guidance_interval=(0.3, 0.7), sampler="dpm-solver++")),
        (dict(embedders_per_block=True), FLOW, dict(guidance_scale=1.0)),
        (dict(learn_sigma=True), LEVELS, dict(guidance_scale=3.0, guidance_channels=2, sampler="ddpm")),
        (dict(null_label=False, class_dropout_prob=0.0), FLOW, dict(sampler="renoise")),
    ],
    ids=["guided", "interval", "embedders by block", "learnt variance", "no null label"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_the_samples_are_those_of_the_model_called_as_it_is(overrides, diffusion, options, dtype):
    model = small_dit(**overrides)
    options = dict(num_inference_steps=6, seed=3, autocast_dtype=dtype, **options)
    found = sample_classes(model, diffusion, LABELS, **options)
    expected = sample_classes(AsItIs(model), diffusion, LABELS, **options)
    # float32 seen: 4e-7; bfloat16: 0 where products of few rows round as those of many, else 3e-3
    assert difference(found, expected) < (0.02 if dtype else 1e-5)
    guided = options.get("guidance_scale", 1) != 1
    assert {tuple(labels) for _, labels in model.asked} == {(0, 2, 4, 5) if guided else (0, 2, 4)}


def test_every_step_is_in_one_piece_of_the_table_and_pieces_are_small(monkeypatch):
    model, seen = small_dit(), []
    expected = sample_classes(model, FLOW, LABELS, num_inference_steps=7)
    assert [len(times) for times, _ in model.asked] == [1, 6]  # the first step tells how many fit
    monkeypatch.setattr(modulated, "_MOST_BYTES", 2 * 3 * (6 * 3 + 2) * 32 * 4)  # two steps of three labels
    model.asked = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(float(args[1][0])), with_kwargs=True)
    assert difference(sample_classes(model, FLOW, LABELS, num_inference_steps=7), expected) < 1e-5
    assert not model.asked  # a hook on the model: it is called as it is
    times = [1000 * (1 - step / 7) for step in range(7)]
    assert seen == pytest.approx(times)
    fresh = small_dit()
    sample_classes(fresh, FLOW, LABELS, num_inference_steps=7)
    assert [len(times) for times, _ in fresh.asked] == [1, 2, 2, 2]
    assert sum((times for times, _ in fresh.asked), []) == pytest.approx(times)


def test_a_model_with_hooks_inside_is_called_as_it_is():
    model, calls = small_dit(), []
    expected = sample_classes(model, FLOW, LABELS, num_inference_steps=4, guidance_scale=2)
    model.asked = []
    hook = model.blocks[1].adaLN_modulation.register_forward_hook(lambda _, args, out: calls.append(len(out)))
    found = sample_classes(model, FLOW, LABELS, num_inference_steps=4, guidance_scale=2)
    assert calls == [2 * len(LABELS)] * 4 and not model.asked and difference(found, expected) < 1e-5
    hook.remove()
    doubled = small_dit()
    plain = doubled.y_embedder.forward
    doubled.y_embedder.forward = lambda labels: 2 * plain(labels)  # another forward put in
    changed = sample_classes(doubled, FLOW, LABELS, num_inference_steps=4, guidance_scale=2)
    assert not hasattr(doubled, "asked") and difference(changed, expected) > 1e-3


@pytest.mark.parametrize("embedders_per_block", [False, True])
def test_modulations_are_what_the_layers_make(embedders_per_block):
    model = small_dit(DiT, embedders_per_block=embedders_per_block)
    times, labels = torch.tensor([900.0, 20.0]), torch.tensor([4, 1, 5])
    found = model.modulations(times, labels)
    assert [list(each.shape) for each in found] == [[2, 3, 192]] * 3 + [[2, 3, 64]]
    image, made = torch.randn(3, 3, 8, 8), []
    for layer in (*model.blocks, model.final_layer):
        layer.adaLN_modulation.register_forward_hook(lambda _, args, out: made.append(out.detach()))
    for step, time in enumerate(times):
        made.clear()
        expected = model(image, time, labels)
        for index, each in enumerate(made):
            torch.testing.assert_close(found[index][step], each, rtol=0, atol=1e-5)
        again = model(image, time, labels, modulations=[each[step] for each in found])
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_modulations_that_do_not_fit_are_one_line():
    model = small_dit(DiT)
    image, times, labels = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([0, 1])
    found = [each[0] for each in model.modulations(times[:1], labels)]
    with pytest.raises(ValueError, match="modulations: got 3; expected 4, one a layer"):
        model(image, times, labels, modulations=found[1:])
    for name, shape in (("layer_conditioning", (2, 3, 32)), ("token_conditioning", (2, 4, 32))):
        with pytest.raises(ValueError, match="modulations: got them beside layer_conditioning or token_conditioning"):
            model(image, times, labels, modulations=found, **{name: torch.zeros(shape)})


def test_modulations_carry_gradients_also_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = small_dit(DiT, gradient_checkpointing=checkpointing)
        found = [each[0].requires_grad_() for each in model.modulations(torch.zeros(1), torch.tensor([0, 1]))]
        image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        model(image, torch.zeros(2), torch.tensor([0, 1]), modulations=found).square().sum().backward()
        gradients.append([each.grad for each in found])
    assert all(torch.equal(a, b) and a.norm() > 0 for a, b in zip(*gradients, strict=True))


class Casts(TorchDispatchMode):
    """Counts casts by the shape of what is cast."""

    def __init__(self):
        super().__init__()
        self.shapes = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes[tuple(args[0].shape)] += 1
        return function(*args, **(kwargs or {}))


def test_autocast_casts_weights_once_and_stays_as_it_was():
    layer, seen = nn.Linear(7, 7), []

    def predict(x, time):
        seen.append(torch.is_autocast_enabled("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    options = dict(device="cpu", num_inference_steps=5)
    for outside in (False, True):
        with Casts() as casts, torch.autocast("cpu", torch.bfloat16, enabled=outside):
            sample(predict, FLOW, (3, 2, 7), **options)
            assert torch.is_autocast_enabled("cpu") == outside
        assert casts.shapes[7, 7] == 1 and set(seen) == {outside}
        seen.clear()
    before = sample(predict, FLOW, (3, 2, 7), **options)
    with torch.no_grad():
        layer.weight.mul_(2)  # the next draw sees it
    assert difference(sample(predict, FLOW, (3, 2, 7), **options), before) > 0.1


class Doubled(DiT):
    def forward(self, sample, timestep, class_labels=None):
        return 2 * super().forward(sample, timestep, class_labels)


class NextLabel(DiT):
    def forward(self, sample, timestep, class_labels=None, **more):
        return super().forward(sample, timestep, (class_labels + 1) % 5, **more)


class Through(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return self.block(*inputs)


@pytest.mark.parametrize("kind", [Doubled, NextLabel, "a block"])
def test_a_model_with_a_way_of_its_own_is_called_as_it_is(kind):
    model = small_dit(DiT if kind == "a block" else kind)
    if kind == "a block":
        model.blocks[1] = Through(model.blocks[1])
    options = dict(num_inference_steps=3, seed=3, guidance_scale=1.5)
    found = sample_classes(model, FLOW, LABELS, **options)
    assert torch.equal(found, sample_classes(AsItIs(model), FLOW, LABELS, **options))


@pytest.mark.parametrize(
    ("time", "labels", "error", "message"),
    [
        (torch.rand(2), torch.tensor([0, 6]), ValueError, r"class_labels: got \[0, 6\]; expected 0 to 5"),
        (torch.rand(2), torch.tensor([-1]), ValueError, r"class_labels: got \[-1\]; expected 0 to 5"),
        (torch.rand(2), torch.tensor([1], dtype=torch.int32), TypeError, "class_labels: got torch.int32"),
        (torch.rand(2), torch.rand(1), TypeError, "class_labels: got torch.float32; expected torch.int64"),
        (torch.tensor(0.5), torch.tensor([1]), ValueError, r"timesteps: got shape \[\]; expected one dimension"),
        (torch.rand(2, 2), torch.tensor([1]), ValueError, r"timesteps: got shape \[2, 2\]"),
    ],
)
def test_times_and_labels_that_do_not_fit_are_one_line(time, labels, error, message):
    with pytest.raises(error, match=message):
        small_dit().modulations(time, labels)


def test_a_whole_table_is_no_row_of_it():
    model = small_dit()
    table = model.modulations(torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"modulations: got shape \[2, 2, 192\]; expected a row for each of 2"):
        model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1]), modulations=table)
