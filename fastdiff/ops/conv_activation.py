"""conv_activation: a depthwise 3×3 convolution over a grid of tokens with its activation, in one pass each way.

Mathematics, rounding and bytes: kernels/conv_activation/README.md. It is what LocalViT (Li et al. 2021) puts between
the two layers of an MLP.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.backends import Backend, register
from fastdiff.kernels.conv_activation import reference
from fastdiff.ops import _native
from fastdiff.ops._checks import check_floats, choose_backend, distinct, wants_grad
from fastdiff.ops._register import register_fake
from fastdiff.ops.bias_activation import ACTIVATIONS

OPERATOR = "conv_activation"
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_OPERANDS = "Tensor x, Tensor weight, Tensor? bias, Tensor? x_bias, int activation"
# The same schemas are written in csrc/conv_activation_cpu.cpp; a test compares them.
SCHEMAS = {
    "conv_activation": f"({_OPERANDS}) -> Tensor",
    "conv_activation_backward": f"(Tensor grad_out, {_OPERANDS}, bool need_parameters) -> (Tensor, Tensor)",
}
_MOST_TOKENS = 2**20  # of a grid: a thread of the CPU kernel keeps up to three grids, of 128 bytes a token each
_SUMS = 11  # rows of the parameters' gradients: nine of weight, bias, x_bias


def _fake(x, weight, bias, x_bias, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad_out, x, weight, bias, x_bias, activation, need_parameters):
    grads = x.new_empty((_SUMS if need_parameters else 0, x.shape[-1]), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), grads


_missing = _native.why_no_operator(OPERATOR)
if _missing is None:
    for _name, _function in zip(SCHEMAS, (_fake, _fake_backward), strict=True):
        register_fake(f"fastdiff::{_name}", _function)
register(OPERATOR, "reference", Backend(None, _native.refuses_nothing))
register(OPERATOR, "cpu", Backend(_missing, _native.refuses_cpu_float64))


def conv_activation(
    x: Tensor,  # [B, H, W, C]
    weight: Tensor,  # [C, 1, 3, 3]
    bias: Tensor | None = None,  # [C]
    activation: str = "gelu",
    *,
    x_bias: Tensor | None = None,  # [C]
) -> Tensor:  # like x
    """act(conv(x + x_bias) + bias): each channel with its own 3×3 kernel, zeros around the grid.

    Args:
        x: a grid of tokens, channels last, `[B, H, W, C]`, in float32, bfloat16 or float16 (float64, and grids of more
            than 2^20 tokens, run on the reference alone).
        weight: `[C, 1, 3, 3]`, as nn.Conv2d has it with groups = C. Parameters may have another dtype than x.
        bias: `[C]` or None.
        activation: "gelu" (exact), "gelu_tanh" or "silu".
        x_bias: `[C]` or None: what the linear layer before should have added; the zeros around stay zeros.

    Returns:
        A tensor of x's shape and dtype. Gradients flow to all operands, once; the parameters' are sums in float32, in
        an order that does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    _check(x, weight, bias, x_bias, activation)
    refuses = _refuses_large if x.shape[1] * x.shape[2] > _MOST_TOKENS else None  # None is the faster way
    if choose_backend(OPERATOR, x.device.type, (x.dtype,), refuses) == "reference":
        return reference.conv_activation(x, weight, bias, activation, x_bias)
    x, taps = x.contiguous(), weight.flatten(1).t().float().contiguous()  # [9, C]
    bias, x_bias = (None if t is None else t.float().contiguous() for t in (bias, x_bias))
    args = (x, taps, bias, x_bias, _NUMBERS[activation])
    if wants_grad(x, weight, bias, x_bias):
        return _ConvActivation.apply(*distinct(args))
    return torch.ops.fastdiff.conv_activation.default(*args)


def _refuses_large(backend: str) -> str | None:
    return f"it takes grids of at most {_MOST_TOKENS} tokens" if backend == "cpu" else None


class _ConvActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps, bias, x_bias, activation):
        ctx.save_for_backward(x, taps, bias, x_bias)
        ctx.activation = activation
        return torch.ops.fastdiff.conv_activation.default(x, taps, bias, x_bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        need = ctx.needs_input_grad
        run = torch.ops.fastdiff.conv_activation_backward.default
        grad_x, grads = run(grad_out.contiguous(), *ctx.saved_tensors, ctx.activation, any(need[1:4]))
        return (
            grad_x if need[0] else None,
            grads[:9] if need[1] else None,
            grads[9] if need[2] else None,
            grads[10] if need[3] else None,
            None,
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, x_bias: Tensor | None, activation: str) -> None:
    check_floats("x", x, 4)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {list(x.shape)}; expected [B, H, W, C]; reshape it")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    channels = x.shape[3]
    for name, t, shape in (("weight", weight, (channels, 1, 3, 3)), ("bias", bias, (channels,)),
                           ("x_bias", x_bias, (channels,))):  # fmt: skip
        if t is None and name != "weight":
            continue
        check_floats(name, t, 1)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected {list(shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: got one on {t.device}, x on {x.device}; expected one device: move one of them")
