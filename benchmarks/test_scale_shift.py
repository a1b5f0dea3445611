"""scale_shift against eager PyTorch and torch.compile: forward, forward and backward.

Every case first compares its own results with float64, and fails where they are wrong.
"""

import measure
import pytest
import torch
from torch import Tensor

from fastdiff.ops.scale_shift import scale_shift

SHAPE = (8, 256, 1152)  # [B, N, D]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def plain(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """As DiT's public code has it (`modulate`)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def with_gradients(function, leaves: list[Tensor]):
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_scale_shift(dtype, backward, benchmark, report):
    generator = torch.Generator().manual_seed(0)
    shapes = (SHAPE, SHAPE[::2], SHAPE[::2])
    leaves = [torch.randn(s, generator=generator).to(measure.DEVICE, dtype).requires_grad_(backward) for s in shapes]
    result, exact = scale_shift(*leaves), plain(*(t.double() for t in leaves))
    error = ((result.double() - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"fastdiff's result is wrong (error {error:.3g}): no speed-up is reported")
    functions = {"fastdiff": scale_shift, "eager": plain, "compile": torch.compile(plain, fullgraph=True)}
    calls = {
        name: with_gradients(function, leaves) if backward else lambda f=function: f(*leaves)
        for name, function in functions.items()
    }
    seconds = measure.in_turns(benchmark, calls, rounds=20)
    case = f"scale_shift {'forward+backward' if backward else 'forward'} {NAMES[dtype]} {list(SHAPE)}"
    report(measure.speed_row(case, seconds, {}))
