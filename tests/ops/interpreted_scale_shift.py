"""The Triton launch function of scale_shift against fp64, in Triton's interpreter, with memory accesses checked.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_scale_shift.py
"""

import os

import pytest
import torch

from fastdiff.kernels.scale_shift import reference, triton_kernels
from ops.triton_interpreter import checked_memory, mend_bf16_rounding, programs, shuffled

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("interpreted_scale_shift.py needs TRITON_INTERPRET=1: run test_triton_interpreted.py", returncode=2)
mend_bf16_rounding()

# Ratios of norms; seen: 4.3e-8, 1.7e-3, 2.2e-4.
TOLERANCE = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 77), (2, 2, 128), (1, 2, 1500), (2, 0, 8)], ids=str)
def test_against_fp64_in_any_order_of_programs(shape, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    batch, _, dim = shape
    x, scale, shift = (torch.randn(s, generator=generator).to(dtype) for s in (shape, (batch, dim), (batch, dim)))
    with checked_memory():
        out = triton_kernels.scale_shift(x, scale, shift)
        with programs(shuffled(1)):
            again = triton_kernels.scale_shift(x, scale, shift)
    exact = reference.scale_shift(x.double(), scale.double(), shift.double())
    assert out.dtype == dtype and (out.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    assert torch.equal(out, again)
