"""Guided sampling of a DiT, in images/s: fastdiff's, the same on reference operators, the usual public way.

The usual way is that of public sampling loops over facebookresearch/DiT: each step calls the model, under an autocast
of its own, on a batch that holds every sample twice, with its label and with the null label.
"""

from collections.abc import Callable

import baselines
import measure
import pytest
import torch
from torch import Tensor, nn

from fastdiff import use_backend
from fastdiff.device import autocast
from fastdiff.diffusion import Diffusion, DiffusionConfig, sample_classes
from fastdiff.models import DiT, DiTConfig, preset_config

DEMO = preset_config("DiT-tiny")
LATENT = preset_config("DiT-S/2")
DTYPES = {"bf16": torch.bfloat16, "fp32": None}


def model_of(kind: type[nn.Module], config: DiTConfig) -> nn.Module:
    """A model with all weights random, so that no branch is gated away."""
    torch.manual_seed(0)
    model = kind(config).to(measure.DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def labels_of(config: DiTConfig, count: int) -> Tensor:
    """As in a grid: ten classes, as many samples of each."""
    return (torch.arange(count) % min(10, config.num_classes)).to(measure.DEVICE)


def with_fastdiff(config: DiTConfig, count: int, steps: int, scale: float, dtype: torch.dtype | None) -> Callable:
    model, diffusion, labels = model_of(DiT, config), Diffusion(DiffusionConfig()), labels_of(config, count)

    def draw() -> Tensor:
        return sample_classes(
            model, diffusion, labels, num_inference_steps=steps, guidance_scale=scale, sampler="euler",
            autocast_dtype=dtype,
        )  # fmt: skip

    return draw


def on_reference(draw: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def in_reference() -> Tensor:
        with use_backend("reference"):
            return draw()

    return in_reference


def public(config: DiTConfig, count: int, steps: int, scale: float, dtype: torch.dtype | None) -> Callable:
    model, labels = model_of(baselines.PlainDiT, config), labels_of(config, count)
    both = torch.cat([labels, torch.full_like(labels, config.num_classes)])

    @torch.no_grad()
    def draw() -> Tensor:
        x = torch.randn(count, config.in_channels, *config.image_size, device=measure.DEVICE)
        for step in range(steps):
            time = torch.full((2 * count,), 1000 * (1 - step / steps), device=measure.DEVICE)
            with autocast(measure.DEVICE, dtype):
                conditional, unconditional = model(torch.cat([x, x]), time, both).float().chunk(2)
            x = x - (unconditional + scale * (conditional - unconditional)) / steps
        return x

    return draw


def check_operators(fused: Callable[[], Tensor], reference: Callable[[], Tensor], rounding: float) -> None:
    """The contenders are what they are called and draw the same: raises otherwise."""
    drawn = []
    for draw, expected in ((fused, True), (reference, False)):
        with torch.profiler.profile() as profile:
            drawn.append(draw())
        found = any(event.name.startswith("fastdiff") for event in profile.events())
        assert found == expected, "the wrong operators ran"
    assert (drawn[0] - drawn[1]).norm() / drawn[1].norm() < rounding


def measured(case: str, dtype: str, rounds: int, benchmark, *sizes) -> measure.Row:
    """A row of `case`; sizes are config, images, steps and guidance scale."""
    fused = with_fastdiff(*sizes, DTYPES[dtype])
    draws = {"fastdiff": fused, "reference": on_reference(fused), "public": public(*sizes, DTYPES[dtype])}
    # bf16: a step's 2^-8, which guidance and 25 steps make larger
    check_operators(draws["fastdiff"], draws["reference"], 1e-4 if dtype == "fp32" else 0.1)
    seconds = measure.in_turns(benchmark, draws, rounds)
    _, images, steps, scale = sizes
    case = f"sampling, {case}, {images} images, {steps} Euler steps, guidance {scale:g}, {dtype}"
    return measure.rate_row(case, seconds, images, {"public": 1.3})


@pytest.mark.parametrize("dtype", DTYPES)
def test_demo_model(dtype, benchmark, report):
    case = f"dim {DEMO.hidden_size}, depth {DEMO.depth}, 28x28x1"
    report(measured(case, dtype, 5, benchmark, DEMO, 20, 25, 1.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dit_s2(dtype, benchmark, report):
    report(measured("DiT-S/2, 32x32x4", dtype, 3, benchmark, LATENT, 2, 10, 4.0))
