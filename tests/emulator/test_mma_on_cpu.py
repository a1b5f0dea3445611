"""The twins of mma, ldmatrix and cp.async, against a plain product: the layouts of fragments and the zero fill."""

import ctypes

import pytest
import torch

from emulator import SCHEDULES, pointer

_P = ctypes.c_void_p


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products(emulator, dtype, transposed, schedule):
    """Small integers: every sum is exact, so that one element in a wrong place shows."""
    emulator.configure(schedule)
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (16, 16), generator=g).to(dtype) for _ in range(2))
    c = torch.full((16, 16), float("nan"))
    operands = (_P(pointer(t)) for t in (a, b, c))
    emulator.check(emulator.lib.fd_mma_product(dtype == torch.bfloat16, transposed, *operands))
    assert torch.equal(c, a.float() @ (b.mT if transposed else b).float())


def test_copies_outside_are_zeros(emulator):
    given, out = torch.arange(1.0, 129.0), torch.full((128,), float("nan"))
    emulator.check(emulator.lib.fd_zero_filled(_P(pointer(given)), _P(pointer(out))))
    assert torch.equal(out, given * (torch.arange(128) // 4 % 2))
