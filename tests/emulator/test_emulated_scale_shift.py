"""The CUDA kernel of scale_shift, executed on the CPU, against the reference in float64.

Every case runs under three schedules of threads and blocks, which must agree to the bit.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from emulator import DTYPES, SCHEDULES, Emulator
from fastdiff.kernels.scale_shift import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 2e-7, BF16: 4e-3, F16: 5e-4}  # ratios of norms; seen: 4.4e-8, 1.8e-3, 2.2e-4


class ScaleShiftParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "scale", "shift", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "dim")),
        ("dtype", ctypes.c_int32),
    ]


def launch(emulator: Emulator, x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
    assert ctypes.sizeof(ScaleShiftParams) == emulator.lib.fd_size_of_scale_shift_params()
    out = torch.full(x.shape, float("nan"), dtype=x.dtype) if out is None else out
    pointers = (t.data_ptr() for t in (x, scale, shift, out))
    emulator.check(emulator.lib.fd_scale_shift(ctypes.byref(ScaleShiftParams(*pointers, *x.shape, DTYPES[x.dtype]))))
    return out


def operands(batch: int, tokens: int, dim: int, dtype: torch.dtype, skip: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    flat = torch.randn(skip + batch * tokens * dim, generator=generator).to(dtype)
    scale, shift = (torch.randn(batch, dim, generator=generator).to(dtype) for _ in range(2))
    return flat[skip:].view(batch, tokens, dim), scale, shift


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("dim", "skip"), [(1, 0), (77, 0), (64, 0), (64, 1), (2056, 0)])
def test_against_the_reference(emulator, dim, skip, dtype):
    """Single elements and 16 bytes at a time, rows of fewer columns than threads and of more."""
    inputs, results = operands(2, 3, dim, dtype, skip), []
    for schedule in SCHEDULES:
        emulator.configure(schedule, max_grid=4)  # a block takes more than one row
        results.append(launch(emulator, *inputs))
    exact = reference.scale_shift(*(t.double() for t in inputs))
    assert ((results[0].double() - exact).norm() / exact.norm()).item() <= ROUNDING[dtype]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_empty_input_and_input_that_does_not_fit(emulator):
    assert launch(emulator, *operands(2, 0, 8, F32)).shape == (2, 0, 8)
    with pytest.raises(ValueError, match="cudaError 1"):
        launch(emulator, *operands(2, 3, 8, torch.float64))
    with pytest.raises(ValueError, match="cudaError 1"):
        launch(emulator, *operands(2, 3, 0, F32))
