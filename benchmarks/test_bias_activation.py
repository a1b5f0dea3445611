"""bias_activation against eager PyTorch and torch.compile: alone, and behind the matrix product whose bias it takes.

Every case first compares its own results with float64, and fails where they are wrong. `of copy` is the share of the
bandwidth of a copy of the same tensor that the forward pass with `out=` reaches.
"""

import measure
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import bias_activation
from fastdiff.ops.bias_activation import ACTIVATIONS

SHAPES = [(1568, 128, 512), (2048, 384, 1536), (512, 768, 3072)]  # rows, width, hidden width
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def check(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    error = ((result.double() - exact).norm() / exact.norm()).item()
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"fastdiff's result is wrong (error {error:.3g}): no speed-up is reported")


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(measure.DEVICE, dtype)


def contenders(functions: dict, leaves: list[Tensor], backward: bool) -> dict:
    if not backward:
        return {name: lambda f=function: f(*leaves) for name, function in functions.items()}
    grad = torch.ones_like(functions["fastdiff"](*leaves))
    return {
        name: lambda f=function: torch.autograd.grad(f(*leaves), leaves, grad) for name, function in functions.items()
    }


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_alone(dtype, activation, backward, benchmark, report):
    rows, _, dim = SHAPES[1]
    leaves = [normal(rows, dim, dtype=dtype), normal(dim, dtype=dtype)]
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return ACTIVATIONS[activation](x + bias)

    functions = {
        "fastdiff": lambda x, bias: bias_activation(x, bias, activation),
        "eager": plain,
        "compile": torch.compile(plain, fullgraph=True),
    }
    check(functions["fastdiff"](*leaves), plain(*(leaf.double() for leaf in leaves)), dtype)
    seconds = measure.in_turns(benchmark, contenders(functions, leaves, backward), rounds=15)
    case = f"{activation} {'forward+backward' if backward else 'forward'} {NAMES[dtype]} [{rows}, {dim}]"
    report(measure.speed_row(case, seconds, {"eager": 1.0}))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_share_of_copy(dtype, benchmark, report):
    x, bias = normal(4096, 6144, dtype=dtype), normal(6144, dtype=torch.float32)
    out = torch.empty_like(x)
    calls = {"fastdiff": lambda: bias_activation(x, bias, "gelu_tanh", out=out), "copy": lambda: out.copy_(x)}
    seconds = measure.in_turns(benchmark, calls, rounds=15)
    share = seconds["copy"] / seconds["fastdiff"]
    report(measure.Row(f"gelu_tanh out= {NAMES[dtype]} [4096, 6144]", "of copy", {"fastdiff": share}))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_behind_its_product(shape, dtype, activation, backward, benchmark, report):
    """The usual way lets the product add the bias, which costs it nothing."""
    rows, dim, hidden = shape
    leaves = [normal(rows, dim, dtype=dtype), normal(hidden, dim, dtype=dtype) / dim**0.5, normal(hidden, dtype=dtype)]
    leaves = [leaf.requires_grad_(backward) for leaf in leaves]
    functions = {
        "fastdiff": lambda x, weight, bias: bias_activation(F.linear(x, weight), bias, activation),
        "eager": lambda x, weight, bias: ACTIVATIONS[activation](F.linear(x, weight, bias)),
    }
    check(functions["fastdiff"](*leaves), functions["eager"](*(leaf.double() for leaf in leaves)), dtype)
    seconds = measure.in_turns(benchmark, contenders(functions, leaves, backward), rounds=15)
    case = f"linear + {activation} {'forward+backward' if backward else 'forward'} {NAMES[dtype]} {list(shape)}"
    report(measure.speed_row(case, seconds, {"eager": 1.0}))
