"""qk_norm_rotary: norms and rotary positions of queries and keys, on the packed projection, in one pass each way.

Mathematics, rounding and bytes: kernels/qk_norm_rotary/README.md. The norms over the whole width are those of Lumina's
transformers (Gao et al. 2024), the positions those of RoPE (Su et al. 2021).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.backends import Backend, register
from fastdiff.kernels.qk_norm_rotary import reference
from fastdiff.ops import _native
from fastdiff.ops._checks import check_floats, choose_backend, distinct, wants_grad
from fastdiff.ops._register import register_fake

OPERATOR = "qk_norm_rotary"
_PARAMETERS = "Tensor weight, Tensor bias, Tensor? cosine, Tensor? sine"
# The same schemas are written in csrc/qk_norm_rotary_cpu.cpp; a test compares them.
SCHEMAS = {
    "qk_norm_rotary": f"(Tensor qkv, {_PARAMETERS}, float eps) -> Tensor",
    "qk_norm_rotary_saved": f"(Tensor qkv, {_PARAMETERS}, float eps) -> (Tensor, Tensor)",
    "qk_norm_rotary_backward": (
        f"(Tensor grad_out, Tensor qkv, Tensor stats, {_PARAMETERS}, bool need_parameters) -> (Tensor, Tensor)"
    ),
}


def _fake(qkv, weight, bias, cosine, sine, eps):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _fake_saved(qkv, weight, bias, cosine, sine, eps):
    stats = qkv.new_empty((qkv.shape[0] * qkv.shape[1], 4), dtype=torch.float32)
    return _fake(qkv, weight, bias, cosine, sine, eps), stats


def _fake_backward(grad_out, qkv, stats, weight, bias, cosine, sine, need_parameters):
    grads = qkv.new_empty((4 if need_parameters else 0, weight.shape[1]), dtype=torch.float32)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), grads


_missing = _native.why_no_operator(OPERATOR)
if _missing is None:
    for _name, _function in zip(SCHEMAS, (_fake, _fake_saved, _fake_backward), strict=True):
        register_fake(f"fastdiff::{_name}", _function)
register(OPERATOR, "reference", Backend(None, _native.refuses_nothing))
register(OPERATOR, "cpu", Backend(_missing, _native.refuses_cpu_float64))


def qk_norm_rotary(
    qkv: Tensor,  # [B, N, 3, H, d]
    weight: Tensor,  # [2, H · d]
    bias: Tensor,  # [2, H · d]
    cosine: Tensor | None = None,  # [N, d / 2]
    sine: Tensor | None = None,  # [N, d / 2]
    *,
    eps: float = 1e-5,
) -> Tensor:  # like qkv
    """Queries and keys normalised over all heads together and turned to their positions; values as they are.

    Args:
        qkv: query, key and value of each head, `[B, N, 3, H, d]`, as a view of one linear layer's output; float32,
            bfloat16 or float16 (float64 runs on the reference alone).
        weight, bias: of the LayerNorms of query (row 0) and key (row 1), `[2, H · d]`; their dtype may differ from
            qkv's.
        cosine, sine: of each token's angles, `[N, d / 2]`: a head's first half is turned with its second. None of both:
            nothing turns. No gradient flows to them.
        eps: added to the variance.

    Returns:
        A tensor of qkv's shape and dtype. Gradients flow to qkv, weight and bias, once; the parameters' are sums in
        float32, in an order that does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    _check(qkv, weight, bias, cosine, sine, eps)
    cosine, sine = (None if t is None else t.detach() for t in (cosine, sine))
    if choose_backend(OPERATOR, qkv.device.type, (qkv.dtype,)) == "reference":
        return reference.qk_norm_rotary(qkv, weight, bias, cosine, sine, eps)
    qkv = qkv.contiguous()
    weight, bias, cosine, sine = (None if t is None else t.float().contiguous() for t in (weight, bias, cosine, sine))
    if wants_grad(qkv, weight, bias):
        return _QkNormRotary.apply(*distinct((qkv, weight, bias, cosine, sine, eps)))
    return torch.ops.fastdiff.qk_norm_rotary.default(qkv, weight, bias, cosine, sine, eps)


class _QkNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, weight, bias, cosine, sine, eps):
        out, stats = torch.ops.fastdiff.qk_norm_rotary_saved.default(qkv, weight, bias, cosine, sine, eps)
        ctx.save_for_backward(qkv, stats, weight, bias, cosine, sine)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        need = ctx.needs_input_grad
        run = torch.ops.fastdiff.qk_norm_rotary_backward.default
        grad_qkv, grads = run(grad_out.contiguous(), *ctx.saved_tensors, need[1] or need[2])
        return (
            grad_qkv if need[0] else None,
            grads[::2] if need[1] else None,
            grads[1::2] if need[2] else None,
            *[None] * 3,
        )


def _check(qkv, weight, bias, cosine, sine, eps: float) -> None:
    check_floats("qkv", qkv, 5)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv: got shape {list(qkv.shape)}; expected [B, N, 3, H, d] with d > 0; reshape it")
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps: got {eps!r}; expected a number >= 0")
    if (cosine is None) != (sine is None):
        raise ValueError("cosine, sine: got one of them; pass both or neither")
    tokens, heads, dim = qkv.shape[1], *qkv.shape[3:]
    if cosine is not None and dim % 2:
        raise ValueError(f"qkv: got heads of {dim} numbers with cosine and sine; expected an even number")
    parameters, angles = (2, heads * dim), (tokens, dim // 2)
    for name, t, shape in (("weight", weight, parameters), ("bias", bias, parameters), ("cosine", cosine, angles),
                           ("sine", sine, angles)):  # fmt: skip
        if t is None and shape is angles:
            continue
        check_floats(name, t, 2)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected {list(shape)}")
        if t.device != qkv.device:
            raise ValueError(
                f"{name}: got one on {t.device}, qkv on {qkv.device}; expected one device: move one of them"
            )
