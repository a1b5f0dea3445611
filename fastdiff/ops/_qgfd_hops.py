"""The operator under QGFD attention: repeated products with one softmax matrix, and its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.qgfd.reference import UNIT_EPS
from fastdiff.ops._checks import distinct, wants_grad
from fastdiff.ops._qgfd_backends import IMPLEMENTATIONS
from fastdiff.ops._qgfd_options import Interval


def hops(
    backend: str,
    query: Tensor,  # [B, H, L_q, d]
    key: Tensor,  # [B, H_kv, L_k, d]
    value: Tensor,  # [B, H_kv or H, L_k, d]
    key_mask: Tensor | None,
    interval: Interval,
    scale: float,
    count: int,
    mixed: range = range(0),
    alpha: float = 1.0,
) -> Tensor:  # [B, H, L_q, d]
    """u_count of u_0 = value, u_j = M·u_{j−1}, mixed with value after the hops `mixed` (kernels/qgfd/README.md)."""
    if value.shape[1] != key.shape[1]:  # w of a grouped attention has one head per query head
        key = key.repeat_interleave(value.shape[1] // key.shape[1], 1)
    key_mask = None if key_mask is None else key_mask.contiguous()
    query, key, value = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (query, key, value))
    first, last = (mixed.start, mixed.stop - 1) if len(mixed) else (1, 0)
    arguments = (key_mask, *interval, float(scale), count, first, last, float(alpha))
    if wants_grad(query, key, value):
        out = _Hops.apply(backend, *distinct((query, key, value)), *arguments)
    else:
        out = IMPLEMENTATIONS[backend].qgfd_forward(query, key, value, *arguments)
    return out.transpose(1, 2)


def unit_keys(key: Tensor) -> Tensor:  # [B, H, L, d] -> the same
    """k / ‖k‖, made in float32 at least, in the dtype of k."""
    wide = key if key.dtype == torch.float64 else key.float()
    return F.normalize(wide, dim=-1, eps=UNIT_EPS).to(key.dtype)


class _Hops(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, query, key, value, key_mask, row_begin, row_end, *numbers):
        masks = (key_mask, row_begin, row_end)
        run = IMPLEMENTATIONS[backend].qgfd_forward_saved
        out, lse, passes = run(query, key, value, *masks, *numbers)
        ctx.save_for_backward(query, key, value, out, lse, passes, *masks)
        ctx.backend, ctx.numbers = backend, numbers
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, key, value, *saved = ctx.saved_tensors
        grad_out = grad_out.transpose(1, 2)
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        run = IMPLEMENTATIONS[ctx.backend].qgfd_backward
        grad_query, grad_key, grad_value = run(grad_out, query, key, value, *saved, *ctx.numbers)
        grad_key, grad_value = (_of_groups(t, key.shape[1]) for t in (grad_key, grad_value))
        return None, grad_query.transpose(1, 2), grad_key, grad_value, None, None, None, *[None] * len(ctx.numbers)


def _of_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """[B, L, H, d] to [B, H_kv, L, d]: the sum over the query heads of each group."""
    batch, length, heads, dim = grad.shape
    if heads != kv_heads:
        wide = grad.view(batch, length, kv_heads, heads // kv_heads, dim)
        grad = wide.sum(3, dtype=torch.float32).to(grad.dtype)
    return grad.transpose(1, 2)
