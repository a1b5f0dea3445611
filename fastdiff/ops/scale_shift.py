"""scale_shift: x · (1 + scale) + shift, the operator to copy (CONTRIBUTING.md). It is not part of the public API.

Mathematics, rounding order and bytes: kernels/scale_shift/README.md. It is the modulation of DiT (Peebles and Xie 2023)
without the norm; `fastdiff.ops.adaln` has both.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.scale_shift import reference
from fastdiff.ops._checks import check_floats, choose_backend, distinct, wants_grad
from fastdiff.ops._register import implementations, register_backends

# The same schema is written in csrc/scale_shift_cpu.cpp; a test compares them.
SCHEMAS = {"scale_shift": "(Tensor x, Tensor scale, Tensor shift) -> Tensor"}


def _fake(x, scale, shift):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


IMPLEMENTATIONS = implementations(SCHEMAS, {"scale_shift": _fake}, "fastdiff.kernels.scale_shift.triton_kernels")
register_backends("scale_shift")


def scale_shift(
    x: Tensor,  # [B, N, D]
    scale: Tensor,  # [B, D]
    shift: Tensor,  # [B, D]
) -> Tensor:  # [B, N, D]
    """x · (1 + scale) + shift, one scale and one shift per sample and column.

    Args:
        x: the stream, `[B, N, D]`, in float32, bfloat16 or float16 (float64 runs on the reference alone).
        scale, shift: `[B, D]` in x's dtype.

    Returns:
        A tensor of x's shape and dtype. Gradients flow to all three operands, once.

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    _check(x, scale, shift)
    backend = choose_backend("scale_shift", x.device.type, (x.dtype,))
    if backend == "reference":
        return reference.scale_shift(x, scale, shift)
    args = (x.contiguous(), scale.contiguous(), shift.contiguous())
    if wants_grad(*args):
        return _ScaleShift.apply(backend, *distinct(args))
    return IMPLEMENTATIONS[backend].scale_shift(*args)


def _check(x: Tensor, scale: Tensor, shift: Tensor) -> None:
    check_floats("x", x, 3)
    if x.ndim != 3:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [B, N, D]; reshape it")
    expected = [x.shape[0], x.shape[2]]
    for name, t in (("scale", scale), ("shift", shift)):
        check_floats(name, t, 2)
        if list(t.shape) != expected:
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected {expected}, [B, D] of x; reshape it")
        if t.dtype != x.dtype or t.device != x.device:
            raise ValueError(f"{name}: got {t.dtype} on {t.device}; expected {x.dtype} on {x.device} as x; convert it")


class _ScaleShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, scale, shift):
        ctx.save_for_backward(x, scale)
        return IMPLEMENTATIONS[backend].scale_shift(x, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        """In plain PyTorch, with sums in fp32: kernels/scale_shift/README.md says why that will do."""
        x, scale = ctx.saved_tensors
        g, grads = grad_out.float(), [None, None, None]
        if ctx.needs_input_grad[1]:
            grads[0] = (g * (1 + scale.float())[:, None]).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grads[1] = (g * x.float()).sum(1).to(x.dtype)
        if ctx.needs_input_grad[3]:
            grads[2] = g.sum(1).to(x.dtype)
        return None, *grads
