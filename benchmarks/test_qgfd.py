"""QGFD attention, forward and backward, against its definition, a chain of torch's fused attention, and the matrix kept
in memory; and its memory.

Every case first compares its own results with the same computation in float64, and fails where they are wrong.
"""

import baselines
import measure
import memory
import pytest
import qgfd_baselines
import torch
from torch import Tensor

from fastdiff import ops

F32, BF16 = torch.float32, torch.bfloat16
NAMES = {F32: "f32", BF16: "bf16"}
TOLERANCE = {F32: 2e-6, BF16: 3e-2}  # bf16: 1.7e-2 seen at L 4096 and 5 hops, which leave means close to 0
HEADS, DIM, ALPHA = 8, 64, 0.5
BATCH = {64: 16, 256: 4, 1024: 1, 4096: 1}  # of each length
LEAST = {F32: 1.3, BF16: 1.1}  # over the best of the other ways
LONGEST = 16384
SDPA_CALLS = 1.7  # what steps = 1 may cost of one of them

on_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)


def operands(length: int, dtype: torch.dtype, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (BATCH[length], length, HEADS, DIM)  # as a projection leaves them
    made = (torch.randn(shape, generator=generator).to(measure.DEVICE, dtype).transpose(1, 2) for _ in range(3))
    return [t.detach().requires_grad_(requires_grad) for t in made]


def ours(query: Tensor, key: Tensor, value: Tensor, steps: int, alpha: float) -> Tensor:
    return ops.qgfd_attention(query, key, value, steps=steps, alpha=alpha)


def check(inputs: list[Tensor], steps: int, gradients: bool = False) -> None:
    """Raises where the result, or a gradient, of one head is not what float64 gives."""
    dtype = inputs[0].dtype
    one = [t.detach()[:1, :1].requires_grad_(gradients) for t in inputs]
    doubles = [t.detach().double().requires_grad_(gradients) for t in one]
    results = [ours(*one, steps, ALPHA)]
    exact = [qgfd_baselines.kept(*doubles, steps, ALPHA)]
    if gradients:
        grad = torch.randn_like(results[0])
        results += torch.autograd.grad(results[0], one, grad)
        exact += torch.autograd.grad(exact[0], doubles, grad.double())
    for result, truth in zip(results, exact, strict=True):
        error = ((result.double() - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"fastdiff's result is wrong (error {error:.3g}): nothing is reported")


@torch.no_grad()
@on_dtype
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("length", list(BATCH))
def test_forward(length, steps, dtype, benchmark, report):
    inputs = operands(length, dtype)
    check(inputs, steps)
    compiled = baselines.compiled(qgfd_baselines.kept)
    ways = {"fastdiff": ours, "chain": qgfd_baselines.chain, "kept": qgfd_baselines.kept, "kept, compiled": compiled}
    if length < 4096:
        ways["dense"] = qgfd_baselines.dense
    calls = {name: lambda way=way: way(*inputs, steps, ALPHA) for name, way in ways.items()}
    calls["one SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(*inputs)
    seconds = measure.in_turns(benchmark, calls, rounds=3 if length == 4096 else 9)
    least = 1.0 if length == 64 else LEAST[dtype]
    targets = {"chain": least, "kept": least}
    if length < 4096:
        targets["dense"] = 8.0 if (length, dtype) == (1024, F32) else least
    if (length, steps, dtype) == (1024, 1, F32):
        targets["one SDPA"] = 1 / SDPA_CALLS
    case = f"qgfd forward {NAMES[dtype]} {BATCH[length]} x {HEADS} x {length} x {DIM}, steps {steps}"
    report(measure.speed_row(case, seconds, targets))


@torch.no_grad()
@pytest.mark.parametrize(("steps", "least"), [(1, 30.0), (4, 40.0)])
def test_definition_of_long_sequences(steps, least, benchmark, report):
    """The definition takes 10 seconds per step here, so that it has fewer rounds."""
    inputs = operands(4096, F32)
    check(inputs, steps)
    ways = {"fastdiff": ours, "dense": qgfd_baselines.dense}
    calls = {name: lambda way=way: way(*inputs, steps, ALPHA) for name, way in ways.items()}
    seconds = measure.in_turns(benchmark, calls, rounds=2)
    case = f"qgfd forward f32 1 x {HEADS} x 4096 x {DIM}, steps {steps}, definition"
    report(measure.speed_row(case, seconds, {"dense": least}))


@on_dtype
@pytest.mark.parametrize(("length", "steps"), [(256, 2), (1024, 1), (1024, 2)])
def test_forward_and_backward(length, steps, dtype, benchmark, report):
    inputs = operands(length, dtype, requires_grad=True)
    check(inputs, steps, gradients=True)
    grad = torch.randn(inputs[0].shape).to(measure.DEVICE, dtype)
    ways = {"fastdiff": ours, "chain": qgfd_baselines.chain, "kept": qgfd_baselines.kept}

    def step(way):
        return lambda: torch.autograd.grad(way(*inputs, steps, ALPHA), inputs, grad)

    seconds = measure.in_turns(benchmark, {name: step(way) for name, way in ways.items()}, rounds=8)
    case = f"qgfd forward+backward {NAMES[dtype]} {BATCH[length]} x {HEADS} x {length} x {DIM}, steps {steps}"
    report(measure.speed_row(case, seconds, {"chain": 1.3} if (length, steps, dtype) == (1024, 2, F32) else {}))


SETUP = """
import qgfd_baselines
from fastdiff import ops
torch.manual_seed(0)
q, k, v = (torch.randn(1, {length}, 8, 64).transpose(1, 2).detach().requires_grad_({grad}) for _ in range(3))
def ours(): return ops.qgfd_attention(q, k, v, steps={steps})
def chain(): return qgfd_baselines.chain(q, k, v, {steps}, 0.5)
small = [t[..., :128, :] for t in (q, k, v)]
ops.qgfd_attention(*small), qgfd_baselines.chain(*small, 1, 0.5)  # what the libraries keep for good
"""


@pytest.mark.skipif(measure.DEVICE != "cpu", reason="peak memory is that of a process")
@pytest.mark.parametrize("steps", [1, 4])
def test_memory_of_long_sequences(steps, report):
    """Beyond inputs and output."""
    setup = SETUP.format(length=LONGEST, steps=steps, grad=False)
    output = LONGEST * HEADS * DIM * 4
    values = {
        name: (memory.peak_bytes(setup, f"out = {call}()", measure.THREADS) - output) / (LONGEST * LONGEST * 4)
        for name, call in (("fastdiff", "ours"), ("chain", "chain"))
    }
    row = measure.Row(f"qgfd memory f32 L {LONGEST}, steps {steps}", "of one L x L matrix", values)
    row.targets["fastdiff"] = 0.02
    report(row)


@pytest.mark.skipif(measure.DEVICE != "cpu", reason="peak memory is that of a process")
def test_memory_forward_and_backward(report):
    setup = SETUP.format(length=1024, steps=2, grad=True)
    call = "grads = torch.autograd.grad({way}(), (q, k, v), torch.ones(1, 8, 1024, 64))"
    values = {
        name: memory.peak_bytes(setup, call.format(way=way), measure.THREADS) / 2**20
        for name, way in (("fastdiff", "ours"), ("chain", "chain"))
    }
    less = {"chain": values["chain"] / values["fastdiff"]}
    report(measure.Row("qgfd memory forward+backward f32 L 1024, steps 2", "MiB", values, less, {"chain": 1.0}))
