"""AdaLN against eager PyTorch and torch.compile: forward, forward and backward, reused outputs, call overhead.

Every case first compares its own results with the same computation in float64, and fails where they are wrong:
no speed-up of a wrong result is ever shown.
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
ROUNDS = 40
BATCH, TOKENS = 8, 256
FORWARD_TARGETS = {
    ("adaln", F32): {"eager": 5.0, "compile": 2.0},
    ("adaln", BF16): {"eager": 4.0, "compile": 2.0},
    ("gated", F32): {"eager": 5.0, "compile": 2.0},
    ("gated", BF16): {"eager": 5.0, "compile": 2.0},
}
TRAINING_TARGETS = {"eager": 3.0, "compile": 1.5}

on_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
on_operator = pytest.mark.parametrize("operator", ["adaln", "gated"])


def tensors(count: int, *shape: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(measure.DEVICE, dtype) for _ in range(count)]


def operands(operator: str, dim: int, dtype: torch.dtype, batch: int = BATCH, tokens: int = TOKENS) -> list[Tensor]:
    """(x, shift, scale), or (residual, branch, gate, shift, scale); modulations are chunks of one projection."""
    modulations = tensors(1, batch, 6 * dim, dtype=dtype, seed=1)[0].chunk(6, dim=1)
    streams = tensors(1 if operator == "adaln" else 2, batch, tokens, dim, dtype=dtype)
    return [*streams, *modulations[: 2 if operator == "adaln" else 3]]


OURS = {"adaln": ops.adaln, "gated": ops.gated_residual_adaln}
PLAIN = {"adaln": baselines.adaln, "gated": baselines.gated_residual_adaln}


def as_tuple(results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def check(results, exact, dtype: torch.dtype) -> None:
    """Raises where a result is not what float64 gives."""
    for result, truth in zip(as_tuple(results), as_tuple(exact), strict=True):
        error = ((result.double() - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"fastdiff's result is wrong (error {error:.3g}): no speed-up is reported")


def training_step(function, leaves: list[Tensor], cotangents: list[Tensor]):
    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(as_tuple(function(*leaves)), leaves, cotangents)

    return step


@on_dtype
@pytest.mark.parametrize("dim", [384, 768, 1152, 3072])
@on_operator
def test_forward(operator, dim, dtype, benchmark, report):
    inputs = operands(operator, dim, dtype)
    contenders = {"fastdiff": OURS[operator], "eager": PLAIN[operator], "compile": baselines.compiled(PLAIN[operator])}
    with torch.no_grad():
        check(OURS[operator](*inputs), PLAIN[operator](*(t.double() for t in inputs)), dtype)
        calls = {name: lambda f=function: f(*inputs) for name, function in contenders.items()}
        seconds = measure.in_turns(benchmark, calls, ROUNDS)
    case = f"{operator} forward {NAMES[dtype]} [{BATCH}, {TOKENS}, {dim}]"
    report(measure.speed_row(case, seconds, FORWARD_TARGETS[operator, dtype]))


@on_dtype
@pytest.mark.parametrize("dim", [384, 1152])
@on_operator
def test_forward_and_backward(operator, dim, dtype, benchmark, report):
    leaves = [t.detach().requires_grad_() for t in operands(operator, dim, dtype)]
    outputs = 1 if operator == "adaln" else 2
    cotangents = tensors(outputs, BATCH, TOKENS, dim, dtype=dtype, seed=2)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = training_step(PLAIN[operator], doubles, [t.double() for t in cotangents])()
    functions = {"fastdiff": OURS[operator], "eager": PLAIN[operator], "compile": baselines.compiled(PLAIN[operator])}
    calls = {name: training_step(function, leaves, cotangents) for name, function in functions.items()}
    check(calls["fastdiff"](), exact, dtype)
    seconds = measure.in_turns(benchmark, calls, ROUNDS)
    case = f"{operator} forward+backward {NAMES[dtype]} [{BATCH}, {TOKENS}, {dim}]"
    report(measure.speed_row(case, seconds, TRAINING_TARGETS))


@on_dtype
def test_reused_output_beyond_the_cache(dtype, benchmark, report):
    """Share of the machine's copy bandwidth: adaln reads and writes as many bytes as copy_."""
    batch, tokens, dim = (32, 4096, 1152) if measure.DEVICE == "cuda" else (8, 8192 // dtype.itemsize, 1152)
    x, shift, scale = operands("adaln", dim, dtype, batch, tokens)
    out = torch.empty_like(x)
    with torch.no_grad():
        check(ops.adaln(x, shift, scale, out=out)[:1], baselines.adaln(x[:1].double(), shift[:1], scale[:1]), dtype)
        calls = {"fastdiff": lambda: ops.adaln(x, shift, scale, out=out), "copy": lambda: out.copy_(x)}
        seconds = measure.in_turns(benchmark, calls, rounds=15)
    share = seconds["copy"] / seconds["fastdiff"]
    gigabytes = 2 * x.nbytes / seconds["copy"] / 1e9
    case = f"adaln out= reused {NAMES[dtype]} {list(x.shape)} ({x.nbytes >> 20} MiB, copy {gigabytes:.1f} GB/s)"
    report(measure.Row(case, "of copy", {"fastdiff": share}, targets={"fastdiff": 0.9}))


@on_operator
def test_call_overhead(operator, benchmark, report):
    """A call on [1, 16, 64], of which next to nothing is arithmetic."""
    inputs = operands(operator, 64, F32, batch=1, tokens=16)
    with torch.no_grad():
        check(OURS[operator](*inputs), PLAIN[operator](*(t.double() for t in inputs)), F32)
        calls = {"fastdiff": lambda: OURS[operator](*inputs), "eager": lambda: PLAIN[operator](*inputs)}
        seconds = measure.in_turns(benchmark, calls, rounds=200)
    targets = {"fastdiff": 10.0} if measure.DEVICE == "cpu" else {}
    report(measure.speed_row(f"{operator} call f32 [1, 16, 64]", seconds, targets))
