"""bias_activation: an MLP's bias and activation in one read and one write, forward and backward.

Mathematics, rounding order and bytes: kernels/bias_activation/README.md. The activations are GELU (Hendrycks and Gimpel
2016), exact or in its tanh form, and SiLU; with `up` they gate as in SwiGLU (Shazeer 2020).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.bias_activation import reference
from fastdiff.ops._checks import choose_backend, distinct, wants_grad
from fastdiff.ops._outputs import check_apart, check_out, written
from fastdiff.ops._register import implementations, register_backends

ACTIVATIONS = reference.FUNCTIONS  # by name: "gelu", "gelu_tanh", "silu"
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}  # enum Activation of bias_activation.h
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_OPERANDS = "Tensor x, Tensor? bias, Tensor? up, Tensor? up_bias, int activation"
# The same schemas are written in csrc/bias_activation_cpu.cpp; a test compares them.
SCHEMAS = {
    "bias_activation": f"({_OPERANDS}) -> Tensor",
    "bias_activation_out": f"({_OPERANDS}, Tensor(a!) out) -> ()",
    "bias_activation_backward": f"(Tensor grad_out, {_OPERANDS}, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _fake(x, bias, up, up_bias, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_out(x, bias, up, up_bias, activation, out):
    return None


def _fake_backward(grad_out, x, bias, up, up_bias, activation, need_bias):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    biases = (
        x.new_empty(x.shape[-1] if b is not None and need_bias else 0, dtype=_compute_dtype(x)) for b in (bias, up_bias)
    )
    return grad_x, x.new_empty(0) if up is None else torch.empty_like(grad_x), *biases


_FAKES = {"bias_activation": _fake, "bias_activation_out": _fake_out, "bias_activation_backward": _fake_backward}
IMPLEMENTATIONS = implementations(SCHEMAS, _FAKES, "fastdiff.kernels.bias_activation.triton_kernels")
register_backends("bias_activation", cpu_takes_float64=True)


def bias_activation(
    x: Tensor,  # [..., D]
    bias: Tensor | None,  # [D]
    activation: str = "gelu",
    *,
    up: Tensor | None = None,  # like x
    up_bias: Tensor | None = None,  # [D]
    out: Tensor | None = None,  # like x
) -> Tensor:  # like x
    """act(x + bias), or act(x + bias) · (up + up_bias), in one pass; so are its gradients.

    Args:
        x: what a linear layer without its bias returned, `[..., D]`, in float32, bfloat16 or float16 (float64 on the
            CPU, for gradient checks).
        bias: `[D]` or None. Its dtype may differ from x's: under autocast x is in bfloat16 and the bias in float32.
        activation: "gelu" (exact), "gelu_tanh" or "silu".
        up: of x's shape and dtype: what the activation gates. SwiGLU is "silu" of the gate's product, and the up
            projection's. None leaves it out.
        up_bias: `[D]` or None, as bias.
        out: written instead of a new tensor; it may be x (in place) or up. No gradient flows then.

    Returns:
        A tensor of x's shape and dtype. Gradients flow to all operands, once; the biases' are sums in float32, in an
        order that does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    _check(x, bias, activation, up, up_bias)
    grad = wants_grad(x, bias, up, up_bias)
    if out is not None:
        check_out("out", out, x, x.dtype, grad)
    backend = choose_backend("bias_activation", x.device.type, (x.dtype,))
    if backend == "reference":
        result = reference.bias_activation(x, bias, activation, up, up_bias)
        return result if out is None else out.copy_(result)
    args = (
        x.contiguous(),
        _compute(bias, x),
        None if up is None else up.contiguous(),
        _compute(up_bias, x),
        _NUMBERS[activation],
    )
    if out is not None:
        check_apart((("out", out),), (x, up), (bias, up_bias))
        IMPLEMENTATIONS[backend].bias_activation_out(*args, out)
        written(out)
        return out
    return _BiasActivation.apply(backend, *distinct(args)) if grad else IMPLEMENTATIONS[backend].bias_activation(*args)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, bias, up, up_bias, activation):
        ctx.save_for_backward(x, bias, up, up_bias)
        ctx.backend, ctx.activation = backend, activation
        return IMPLEMENTATIONS[backend].bias_activation(x, bias, up, up_bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        need = ctx.needs_input_grad
        grad_x, grad_up, grad_bias, grad_up_bias = IMPLEMENTATIONS[ctx.backend].bias_activation_backward(
            grad_out.contiguous(), *ctx.saved_tensors, ctx.activation, need[2] or need[4]
        )
        grads = (grad_x, grad_bias, grad_up, grad_up_bias)
        return None, *(grad if wanted else None for grad, wanted in zip(grads, need[1:5], strict=True)), None


def _check(x: Tensor, bias: Tensor | None, activation: str, up: Tensor | None, up_bias: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got a {type(x).__name__}; expected a torch.Tensor of shape [..., D]")
    if x.layout != torch.strided:
        raise TypeError(f"x: got layout {x.layout}; expected a dense tensor: call to_dense()")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: got {x.dtype}; expected float32, bfloat16, float16 or float64: cast it")
    if x.ndim == 0:
        raise ValueError("x: got shape []; expected [..., D]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    if up is None and up_bias is not None:
        raise ValueError("up_bias: got one without up; pass up, or leave it out")
    for name, t in (("bias", bias), ("up", up), ("up_bias", up_bias)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got a {type(t).__name__}; expected a torch.Tensor or None")
        shape = x.shape if name == "up" else x.shape[-1:]
        if t.shape != shape:
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected {list(shape)}")
        if t.device != x.device:
            raise ValueError(f"{name}: got one on {t.device}, x on {x.device}; expected one device: move one of them")
        if t.dtype not in _DTYPES or (t.dtype != x.dtype and (name == "up" or torch.float64 in (t.dtype, x.dtype))):
            raise TypeError(f"{name}: got {t.dtype}, with {x.dtype} of x; expected one that fits: cast one of them")


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _compute(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """In the dtype of the arithmetic, outside the autograd.Function: its gradient is rounded to its own dtype."""
    return None if bias is None else bias.to(_compute_dtype(x)).contiguous()
