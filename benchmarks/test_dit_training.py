"""Training steps of whole models, in images/s: fastdiff's DiT, the same on reference operators, the usual public way.

A step is what a trainer does: noise, autocast where it is in bf16, forward, mean squared error, backward, AdamW, a
moving average of the weights. Each contender is measured in float32 and in bf16, and its faster one counts. Beside the
rate stands the share of fastdiff's step that its matrix products alone would take (products.py).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import baselines
import measure
import products
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastdiff import use_backend
from fastdiff.models import DiT, DiTConfig, preset_config
from fastdiff.training.ema import Ema
from fastdiff.training.setup import parameter_groups
from fastdiff.training.update import WeightUpdate

DEMO = preset_config("DiT-tiny")
LATENT = preset_config("DiT-S/2")
SHARE = "products' share of the step"
PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Training:
    """A model and how it is trained: `step` is one optimizer step of a rectified flow on fixed images."""

    model: nn.Module
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    update: Callable[[int], object]  # takes the gradients into weights and average
    config: DiTConfig
    batch: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator, config = torch.Generator().manual_seed(0), self.config
        images = torch.randn(self.batch, config.in_channels, *config.image_size, generator=generator)
        labels = torch.randint(config.num_classes, (self.batch,), generator=generator)
        self.images, self.labels = images.to(measure.DEVICE), labels.to(measure.DEVICE)
        self.done = 0

    def predict(self) -> tuple[Tensor, Tensor]:
        """The prediction and what it should be."""
        images = self.images
        noise, time = torch.randn_like(images), torch.rand(self.batch, device=measure.DEVICE)
        level = time[:, None, None, None]
        with torch.autocast(measure.DEVICE, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = self.forward((1 - level) * images + level * noise, 1000 * time, self.labels)
        return predicted, noise - images

    def step(self) -> float:
        predicted, target = self.predict()
        loss = (predicted.float() - target).square().mean()
        loss.backward()
        self.update(self.done)
        self.done += 1
        return loss.item()


def model_of(kind: type[nn.Module], config: DiTConfig) -> nn.Module:
    torch.manual_seed(0)
    return kind(config).to(measure.DEVICE).train()


def as_trainers_do(model: nn.Module) -> WeightUpdate:
    """The end of a step of fastdiff's trainer."""
    accelerator = Accelerator(cpu=measure.DEVICE == "cpu")
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=1e-4, fused=True)
    return WeightUpdate(accelerator, model, accelerator.prepare(optimizer), Ema(model, 0.999), 0.0)


def with_fused(config: DiTConfig, batch: int, dtype: torch.dtype, compiled: bool = False) -> Training:
    """fastdiff's model on the backend it picks by itself."""
    model = model_of(DiT, config)

    def fused_forward(sample: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return model(sample, time, labels)

    forward = torch.compile(fused_forward) if compiled else fused_forward
    return Training(model, forward, as_trainers_do(model), config, batch, dtype)


def with_reference(config: DiTConfig, batch: int, dtype: torch.dtype, compiled: bool = False) -> Callable[[], float]:
    """The same model on reference operators. A function of its own, so that compiled code is never shared."""
    model = model_of(DiT, config)

    def reference_forward(sample: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return model(sample, time, labels)

    forward = torch.compile(reference_forward) if compiled else reference_forward
    training = Training(model, forward, as_trainers_do(model), config, batch, dtype)

    def in_reference() -> float:
        with use_backend("reference"):
            return training.step()

    return in_reference


def public(config: DiTConfig, batch: int, dtype: torch.dtype) -> Callable[[], float]:
    """As facebookresearch/DiT trains: torch's AdamW as it comes, and the average a parameter at a time."""
    model = model_of(baselines.PlainDiT, config)
    average = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    @torch.no_grad()
    def update(step: int) -> None:
        optimizer.step()
        optimizer.zero_grad()
        for kept, parameter in zip(average, model.parameters(), strict=True):
            kept.mul_(0.999).add_(parameter, alpha=0.001)

    return Training(model, model, update, config, batch, dtype).step


def faster(seconds: dict[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """Each contender's time in its faster precision, and which that is, of times named "contender precision"."""
    best: dict[str, float] = {}
    chosen: dict[str, str] = {}
    for name, value in seconds.items():
        contender, precision = name.split()
        if value < best.get(contender, float("inf")):
            best[contender], chosen[contender] = value, precision
    return best, chosen


def products_alone(training: Training) -> Callable[[], None]:
    """The matrix products of one step of it, and nothing else."""
    found = products.products_of(training.model, lambda: training.predict()[0])
    return products.multiply_all(found, training.dtype)


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
    ours = {name: with_fused(DEMO, batch, dtype) for name, dtype in PRECISIONS.items()}
    steps = {}
    for name, dtype in PRECISIONS.items():
        steps[f"fastdiff {name}"] = ours[name].step
        steps[f"reference {name}"] = with_reference(DEMO, batch, dtype)
        steps[f"public {name}"] = public(DEMO, batch, dtype)
        steps[f"products {name}"] = products_alone(ours[name])
    check_operators(steps["fastdiff bf16"], steps["reference bf16"])
    with denormals_flushed():
        measured = measure.in_turns(benchmark, steps, rounds=20)
    seconds, chosen = faster({name: value for name, value in measured.items() if not name.startswith("products")})
    precisions = ", ".join(f"{name} {precision}" for name, precision in chosen.items())
    case = f"training step, dim {DEMO.hidden_size}, depth {DEMO.depth}, 28x28x1, batch {batch} ({precisions})"
    row = measure.rate_row(case, seconds, batch, {"public": 2.0, "reference": 1.08, SHARE: 0.75})
    row.shares[SHARE] = measured[f"products {chosen['fastdiff']}"] / seconds["fastdiff"]
    report(row)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dit_s2(compiled, benchmark, report):
    batch = 8
    ours = with_fused(LATENT, batch, torch.bfloat16, compiled)
    steps = {"fastdiff": ours.step, "reference": with_reference(LATENT, batch, torch.bfloat16, compiled)}
    check_operators(steps["fastdiff"], steps["reference"])
    alone = products_alone(with_fused(LATENT, batch, torch.bfloat16))  # read from the model before it is compiled
    with denormals_flushed():
        seconds = measure.in_turns(benchmark, steps | {"products": alone}, rounds=10)
    share = seconds.pop("products") / seconds["fastdiff"]
    case = f"training step, DiT-S/2, 32x32x4, batch {batch}, bf16{', torch.compile' if compiled else ''}"
    row = measure.rate_row(case, seconds, batch, {"reference": 1.03 if compiled else 1.1})
    row.shares[SHARE] = share
    report(row)
