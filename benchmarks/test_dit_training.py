"""Training steps of whole models, in images/s: fastdiff's DiT, the same on reference operators, the usual public way.

A step is what a trainer does: noise, bf16 autocast, forward, mean squared error, backward, AdamW. All contenders have
the same sizes, batches and optimizer.
"""

import contextlib
from collections.abc import Callable

import baselines
import measure
import pytest
import torch
from torch import Tensor, nn

from fastdiff import use_backend
from fastdiff.models import DiT, DiTConfig, preset_config

DEMO = preset_config("DiT-tiny")
LATENT = preset_config("DiT-S/2")


def training_step(model: nn.Module, forward: Callable, config: DiTConfig, batch: int) -> Callable[[], float]:
    """One optimizer step of a rectified flow on fixed images."""
    device = measure.DEVICE
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, config.in_channels, *config.image_size, generator=generator).to(device)
    labels = torch.randint(config.num_classes, (batch,), generator=generator).to(device)

    def step() -> float:
        noise, time = torch.randn_like(images), torch.rand(batch, device=device)
        level = time[:, None, None, None]
        with torch.autocast(device, torch.bfloat16):
            predicted = forward((1 - level) * images + level * noise, 1000 * time, labels)
        loss = (predicted.float() - (noise - images)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def model_of(kind: type[nn.Module], config: DiTConfig) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).to(measure.DEVICE).train()


def with_fused(config: DiTConfig, batch: int, compiled: bool) -> Callable[[], float]:
    """fastdiff's model on the backend it picks by itself."""
    model = model_of(DiT, config)

    def fused_forward(sample: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return model(sample, time, labels)

    return training_step(model, torch.compile(fused_forward) if compiled else fused_forward, config, batch)


def with_reference(config: DiTConfig, batch: int, compiled: bool) -> Callable[[], float]:
    """The same model on reference operators. A function of its own, so that compiled code is never shared."""
    model = model_of(DiT, config)

    def reference_forward(sample: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return model(sample, time, labels)

    step = training_step(model, torch.compile(reference_forward) if compiled else reference_forward, config, batch)

    def in_reference() -> float:
        with use_backend("reference"):
            return step()

    return in_reference


def public(config: DiTConfig, batch: int) -> Callable[[], float]:
    model = model_of(baselines.PlainDiT, config)
    return training_step(model, model, config, batch)


def check_operators(fused: Callable[[], float], reference: Callable[[], float]) -> None:
    """The contenders are what they are called, and both learn: raises otherwise."""
    for step, expected in ((fused, True), (reference, False)):
        step()
        with torch.profiler.profile() as profile:
            loss = step()
        found = any(event.name.startswith("fastdiff") for event in profile.events())
        assert found == expected, "the wrong operators ran"
        assert loss < 3.0, f"loss {loss}: expected about 2, that of a model that predicts zero"


@contextlib.contextmanager
def denormals_flushed():
    """As trainers on a CPU do: Adam's moments of what never moves would otherwise be denormal, and slow."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_demo_model(benchmark, report):
    batch = 32
    steps = {
        "fastdiff": with_fused(DEMO, batch, compiled=False),
        "reference": with_reference(DEMO, batch, compiled=False),
        "public": public(DEMO, batch),
    }
    check_operators(steps["fastdiff"], steps["reference"])
    with denormals_flushed():
        seconds = measure.in_turns(benchmark, steps, rounds=20)
    case = f"training step, dim {DEMO.hidden_size}, depth {DEMO.depth}, 28x28x1, batch {batch}, bf16"
    report(measure.rate_row(case, seconds, batch, {"public": 2.0, "reference": 1.08}))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dit_s2(compiled, benchmark, report):
    batch = 8
    steps = {
        "fastdiff": with_fused(LATENT, batch, compiled),
        "reference": with_reference(LATENT, batch, compiled),
    }
    check_operators(steps["fastdiff"], steps["reference"])
    with denormals_flushed():
        seconds = measure.in_turns(benchmark, steps, rounds=10)
    case = f"training step, DiT-S/2, 32x32x4, batch {batch}, bf16{', torch.compile' if compiled else ''}"
    report(measure.rate_row(case, seconds, batch, {"reference": 1.0 if compiled else 1.02}))
