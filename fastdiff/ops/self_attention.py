"""self_attention: softmax attention of short sequences, on the packed projection that a model already has.

Mathematics, rounding and FLOPs: kernels/self_attention/README.md. It is the attention of Vaswani et al. (2017), with
the gradients of FlashAttention-2 (Dao 2023): weights are made again from the log-sum-exp of each row.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.backends import Backend, register
from fastdiff.kernels.self_attention import reference
from fastdiff.ops import _native
from fastdiff.ops._checks import check_floats, choose_backend, wants_grad
from fastdiff.ops._register import register_fake

OPERATOR = "self_attention"
# The same schemas are written in csrc/self_attention_cpu.cpp; a test compares them.
SCHEMAS = {
    "self_attention": "(Tensor qkv, float scale) -> Tensor",
    "self_attention_saved": "(Tensor qkv, float scale) -> (Tensor, Tensor)",
    "self_attention_backward": "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
}


def _fake(qkv: Tensor, scale: float) -> Tensor:
    batch, tokens, _, heads, dim = qkv.shape
    return qkv.new_empty((batch, tokens, heads, dim))


def _fake_saved(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out = _fake(qkv, scale)
    batch, tokens, heads, _ = out.shape
    return out, qkv.new_empty((batch, heads, tokens), dtype=torch.float32)


def _fake_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


if _native.cpu_missing is None:  # without fastdiff._C the operators are not defined
    for _name, _function in zip(SCHEMAS, (_fake, _fake_saved, _fake_backward), strict=True):
        register_fake(f"fastdiff::{_name}", _function)
register(OPERATOR, "reference", Backend(None, _native.refuses_nothing))
register(OPERATOR, "cpu", Backend(_native.cpu_missing, _native.refuses_cpu_float64))


def self_attention(
    qkv: Tensor,  # [B, N, 3, H, d]
    *,
    scale: float | None = None,
) -> Tensor:  # [B, N, H, d]
    """Softmax attention of every token to every token, from one packed projection and back.

    For short sequences on a CPU: nothing is copied or transposed on the way in or out, and the gradient comes as one
    tensor like qkv. On a GPU torch's attention is what to call.

    Args:
        qkv: query, key and value of each head, `[B, N, 3, H, d]`, as a view of one linear layer's output; float32,
            bfloat16 or float16 (float64 runs on the reference alone).
        scale: of the scores, above 0; None is 1/√d.

    Returns:
        `[B, N, H, d]` in qkv's dtype, whose last two dimensions flatten to what the output projection takes. The
        gradient flows to qkv, once.

    Raises:
        TypeError, ValueError: shape, dtype or scale does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    check_floats("qkv", qkv, 5)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv: got shape {list(qkv.shape)}; expected [B, N, 3, H, d] with d > 0; reshape it")
    scale = qkv.shape[4] ** -0.5 if scale is None else scale
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}; expected a finite number above 0")
    if choose_backend(OPERATOR, qkv.device.type, (qkv.dtype,)) == "reference":
        return reference.self_attention(qkv, scale)
    qkv = qkv.contiguous()
    if wants_grad(qkv):
        return _SelfAttention.apply(qkv, scale)
    return torch.ops.fastdiff.self_attention.default(qkv, scale)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scale):
        out, lse = torch.ops.fastdiff.self_attention_saved.default(qkv, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        run = torch.ops.fastdiff.self_attention_backward.default
        return run(grad_out.contiguous(), *ctx.saved_tensors, ctx.scale), None
