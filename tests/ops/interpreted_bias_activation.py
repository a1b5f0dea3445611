"""The Triton launch functions of bias_activation against fp64, in Triton's interpreter, with memory accesses checked.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_bias_activation.py
"""

import os

import pytest
import torch

from fastdiff.kernels.bias_activation import reference, triton_kernels
from ops.triton_interpreter import checked_memory, mend_bf16_rounding, programs, shuffled

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("interpreted_bias_activation.py needs TRITON_INTERPRET=1: run test_triton_interpreted.py", returncode=2)
mend_bf16_rounding()

TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # ratios of norms
ACTIVATIONS = list(reference.FUNCTIONS)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    ("shape", "activation", "biased", "gated"),
    [((1, 1), 0, True, False), ((37, 77), 1, True, True), ((3, 5, 130), 2, False, True), ((0, 8), 0, True, True)],
)
def test_against_fp64_in_any_order_of_programs(shape, activation, biased, gated, dtype):
    generator = torch.Generator().manual_seed(shape[-1])
    x, up, grad_out = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    bias, up_bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    operands = [x, bias if biased else None, up if gated else None, up_bias if biased and gated else None]

    def run() -> list[torch.Tensor]:
        with checked_memory():
            out = triton_kernels.bias_activation(*operands, activation)
            grads = triton_kernels.bias_activation_backward(grad_out, *operands, activation, True)
        return [out, grads[0], grads[2], grads[1], grads[3]]

    results = run()
    with programs(shuffled(1)):
        assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))
    leaves = [None if t is None else t.double().requires_grad_() for t in operands]
    exact = reference.bias_activation(leaves[0], leaves[1], ACTIVATIONS[activation], *leaves[2:])
    truths = iter(torch.autograd.grad(exact, [t for t in leaves if t is not None], grad_out.double()))
    for result, truth in zip(results, [exact, *(None if t is None else next(truths) for t in leaves)], strict=True):
        if truth is None:
            assert result.numel() == 0
        else:
            limit = TOLERANCE[dtype] if result.dtype == dtype else 1e-6
            assert (result.double() - truth).norm() <= limit * truth.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_are_torchs(activation):
    inf = float("inf")
    x = torch.tensor([inf, -inf, float("nan"), 0.0, -0.0, 100.0, -100.0, 1e30, -1e30])
    out = triton_kernels.bias_activation(x, None, None, None, ACTIVATIONS.index(activation))
    torch.testing.assert_close(out, reference.FUNCTIONS[activation](x.double()).float(), equal_nan=True)
