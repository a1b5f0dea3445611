"""The masked diffusion loss, forward and backward, and its peak memory, against plain PyTorch and torch.compile.

Every case first compares its own results with the same computation in float64, and fails where they are wrong.
"""

import baselines
import measure
import pytest
import torch
from torch import Tensor

from fastdiff import ops

F32, BF16 = torch.float32, torch.bfloat16
NAMES = {F32: "f32", BF16: "bf16"}
TOLERANCE = {F32: 2e-6, BF16: 1e-2}
ROWS, DIM, VOCAB, MASKED = 4096, 768, 50257, 0.3  # GPT-2's head
SPEED = {F32: {"all rows": 3.0, "gathered": 1.05}, BF16: {}}
MEMORY = {F32: {"gathered": 5.0}, BF16: {}}

on_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)


def operands(dtype: torch.dtype) -> list[Tensor]:
    """hidden and weight as leaves, targets, mask, row weights of 1/t."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(ROWS, DIM, generator=generator), 0.02 * torch.randn(VOCAB, DIM, generator=generator)
    targets = torch.randint(VOCAB - 1, (ROWS,), generator=generator)  # the last one is the mask token
    mask = torch.rand(ROWS, generator=generator) < MASKED
    rows = [targets, mask, torch.full((ROWS,), 1 / MASKED)]
    leaves = [t.to(measure.DEVICE, dtype).requires_grad_() for t in (hidden, weight)]
    return [*leaves, *(t.to(measure.DEVICE) for t in rows)]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, row_weight: Tensor) -> Tensor:
    return ops.masked_linear_cross_entropy(hidden, weight, targets, mask, row_weight=row_weight)[0]


def training_step(loss, inputs: list[Tensor]):
    """The gradients of the mean over masked tokens."""
    normaliser = int(inputs[3].sum())
    return lambda: torch.autograd.grad(loss(*inputs) / normaliser, inputs[:2])


def check(inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Raises where loss or gradients are not what float64 gives."""
    doubles = [t.detach().double().requires_grad_() for t in inputs[:2]] + inputs[2:]
    exact = training_step(baselines.masked_loss_of_gathered_rows, doubles)()
    for grad, truth in zip(training_step(ours, inputs)(), exact, strict=True):
        error = ((grad.double() - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"fastdiff's result is wrong (error {error:.3g}): nothing is reported")


@on_dtype
def test_forward_and_backward(dtype, benchmark, report):
    inputs = operands(dtype)
    check(inputs, dtype)
    fused = baselines.compiled(baselines.loss_of_rows)
    losses = {
        "fastdiff": ours,
        "all rows": baselines.masked_loss_of_all_rows,
        "gathered": baselines.masked_loss_of_gathered_rows,
        "compile": lambda *inputs: baselines.masked_loss_of_gathered_rows(*inputs, loss=fused),
    }
    steps = {name: training_step(loss, inputs) for name, loss in losses.items()}
    masked = int(inputs[3].sum())
    seconds = measure.in_turns(benchmark, steps, rounds=8)
    case = f"masked loss forward+backward {NAMES[dtype]}, {masked} of {ROWS} rows, D {DIM}, V {VOCAB}"
    report(measure.speed_row(case, seconds, SPEED[dtype]))
    # beyond the weight's gradient, which everyone must hold
    memory = {name: (measure.peak_bytes(step) - inputs[1].nbytes) / 2**20 for name, step in steps.items()}
    less = {name: value / memory["fastdiff"] for name, value in memory.items() if name != "fastdiff"}
    report(measure.Row(f"masked loss peak memory {NAMES[dtype]}", "MiB", memory, less, MEMORY[dtype]))
