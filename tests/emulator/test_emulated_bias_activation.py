"""The CUDA kernels of bias_activation, executed on the CPU, against the reference in float64.

Every case runs under three schedules of threads and blocks, which must agree to the bit.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from emulator import DTYPES, SCHEDULES, Emulator, pointer
from fastdiff.kernels.bias_activation import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 3e-7, BF16: 4e-3, F16: 5e-4}  # ratios of norms; seen: 7.7e-8, 1.8e-3, 2.2e-4
SUMS = 1e-6  # the biases' gradients are in fp32, of operands rounded to 16 bits as well; seen: 1.3e-7
ROWS_PER_SEGMENT = 16
NUMBERS = {name: number for number, name in enumerate(reference.FUNCTIONS)}


class Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "up", "up_bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "dim")),
        *((name, ctypes.c_int32) for name in ("activation", "dtype")),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_out", "x", "bias", "up", "up_bias")),
        *((name, ctypes.c_void_p) for name in ("grad_x", "grad_up", "grad_bias", "grad_up_bias", "workspace")),
        *((name, ctypes.c_int64) for name in ("rows", "dim", "rows_per_segment")),
        *((name, ctypes.c_int32) for name in ("activation", "dtype")),
    ]


def launch(emulator: Emulator, x, bias, up, up_bias, activation: str, out: Tensor | None = None) -> Tensor:
    assert ctypes.sizeof(Params) == emulator.lib.fd_size_of_bias_activation_params()
    out = torch.full_like(x, float("nan")) if out is None else out
    p = Params(*map(pointer, (x, bias, up, up_bias, out)), *x.shape, NUMBERS[activation], DTYPES[x.dtype])
    emulator.check(emulator.lib.fd_bias_activation(ctypes.byref(p)))
    return out


def launch_backward(emulator: Emulator, grad_out, x, bias, up, up_bias, activation: str) -> list[Tensor | None]:
    """Gradients of x, bias, up and up_bias."""
    assert ctypes.sizeof(BackwardParams) == emulator.lib.fd_size_of_bias_activation_backward_params()
    grads = [None if t is None else torch.full_like(t, float("nan")) for t in (x, up, bias, up_bias)]
    rows, dim = x.shape
    workspace = torch.full((-(-rows // ROWS_PER_SEGMENT), 1 if up is None else 2, dim), float("nan"))
    p = BackwardParams(
        *map(pointer, (grad_out, x, bias, up, up_bias, *grads, workspace)), rows, dim, ROWS_PER_SEGMENT,
        NUMBERS[activation], DTYPES[x.dtype],
    )  # fmt: skip
    emulator.check(emulator.lib.fd_bias_activation_backward(ctypes.byref(p)))
    return [grads[0], grads[2], grads[1], grads[3]]


def error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("rows", "dim", "skip", "activation", "biased", "gated"),
    [
        (1, 1, 0, "gelu", True, False),
        (37, 77, 0, "gelu_tanh", True, True),
        (50, 64, 0, "gelu", True, True),
        (35, 64, 1, "silu", False, True),
        (3, 328, 0, "gelu", True, False),
    ],
)
def test_against_the_reference(emulator, rows, dim, skip, activation, biased, gated, dtype):
    """Single elements and 16 bytes at a time; one segment of rows and several; one tile of columns and several."""
    generator = torch.Generator().manual_seed(dim)
    flat = torch.randn(skip + rows * dim, generator=generator).mul(2).to(dtype)
    x, grad_out = flat[skip:].view(rows, dim), torch.randn(rows, dim, generator=generator).to(dtype)
    up = torch.randn(rows, dim, generator=generator).to(dtype) if gated else None
    bias, up_bias = (torch.randn(dim, generator=generator) for _ in range(2))
    operands = (x, bias if biased else None, up, up_bias if biased and gated else None)
    leaves = [None if t is None else t.double().requires_grad_() for t in operands]
    exact = reference.bias_activation(leaves[0], leaves[1], activation, *leaves[2:])
    truths = iter(torch.autograd.grad(exact, [t for t in leaves if t is not None], grad_out.double()))
    truth = [None if t is None else next(truths) for t in leaves]
    results = []
    for schedule in SCHEDULES:
        emulator.configure(schedule, max_grid=3)  # a block takes more than one share
        results.append(
            [launch(emulator, *operands, activation), *launch_backward(emulator, grad_out, *operands, activation)]
        )
    names = ("out", "x", "bias", "up", "up_bias")
    for name, result, expected in zip(names, results[0], (exact.detach(), *(truth[i] for i in range(4))), strict=True):
        if expected is not None:
            assert error(result, expected) <= (SUMS if name.endswith("bias") else ROUNDING[dtype]), name
    for other in results[1:]:
        assert all(a is None or torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_special_values(emulator):
    inf = float("inf")
    x = torch.tensor([[inf, -inf, float("nan"), 0.0, -0.0, 1e30, -1e30, 100.0, -100.0, 1e-40]])
    emulator.configure(0)
    for activation, function in reference.FUNCTIONS.items():
        out, plain = launch(emulator, x, None, None, None, activation), function(x.double()).float()
        torch.testing.assert_close(out, plain, equal_nan=True)
        zero = out == 0
        assert torch.equal(torch.signbit(out)[zero], torch.signbit(plain)[zero])
        grad, *_ = launch_backward(emulator, torch.ones_like(x), x, None, None, None, activation)
        assert torch.equal(grad.isnan(), x.isinf() | x.isnan()), "as torch's: inf times 0"


def test_in_place_empty_and_what_does_not_fit(emulator):
    x, bias = torch.randn(5, 8), torch.randn(8)
    expected = launch(emulator, x, bias, None, None, "gelu")
    assert torch.equal(launch(emulator, x, bias, None, None, "gelu", out=x), expected)
    empty = x[:0]
    assert launch(emulator, empty, bias, None, None, "gelu").shape == (0, 8)
    assert launch_backward(emulator, empty, empty, bias, None, None, "gelu")[0].shape == (0, 8)
    with pytest.raises(ValueError, match="cudaError 1"):
        launch(emulator, x.double(), None, None, None, "gelu")
    with pytest.raises(ValueError, match="cudaError 1"):
        launch(emulator, x, None, None, bias, "gelu")
