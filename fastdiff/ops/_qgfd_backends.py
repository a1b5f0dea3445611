"""QGFD attention's backends as seen from Python: the torch operators, their fake kernels, the Triton launchers.

The native operators (`fastdiff::…`, csrc/qgfd.h) and the Triton launchers share these signatures; query is
[B, H, L_q, d], key and value [B, H_kv, L_k, d], each with a contiguous last dimension, key_mask bool [B, L_k],
row_begin and row_end int32 [B or 1, L_q], all contiguous (kernels/qgfd/README.md has the mathematics):

    qgfd_forward(query, key, value, key_mask, row_begin, row_end, scale, hops, first_mixed, last_mixed, alpha)
        -> out [B, L_q, H, d]
    qgfd_forward_saved(same) -> out, lse float32 [B, H, L_q], passes [S, B, H, L_q, d]
        passes: y_1, y_2, …; S = hops - 1, and hops where the last hop is mixed
    qgfd_backward(grad_out [B, H, L_q, d], query, key, value, out [B, L_q, H, d], lse, passes, key_mask, row_begin,
        row_end, scale, hops, first_mixed, last_mixed, alpha)
        -> grad_query [B, L_q, H, d], grad_key, grad_value [B, L_k, H, d], one per query head
"""

import torch
from torch import Tensor

from fastdiff.ops._register import implementations, register_backends

OPERATOR = "qgfd_attention"
_MATRIX = (
    "Tensor? key_mask, Tensor? row_begin, Tensor? row_end, float scale, int hops, int first_mixed, int last_mixed,"
    " float alpha"
)
# The same schemas are written in csrc/qgfd_cpu.cpp; a test compares them.
SCHEMAS = {
    "qgfd_forward": f"(Tensor query, Tensor key, Tensor value, {_MATRIX}) -> Tensor",
    "qgfd_forward_saved": f"(Tensor query, Tensor key, Tensor value, {_MATRIX}) -> (Tensor, Tensor, Tensor)",
    "qgfd_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor passes,"
    f" {_MATRIX}) -> (Tensor, Tensor, Tensor)",
}


def saved_passes(hops: int, first_mixed: int, last_mixed: int) -> int:
    """How many y_j the backward pass needs beside the output."""
    return hops if first_mixed <= hops <= last_mixed else hops - 1


def _fake_forward(query, key, value, *others) -> Tensor:
    batch, heads, queries, dim = query.shape
    return query.new_empty((batch, queries, heads, dim))


def _fake_forward_saved(
    query, key, value, key_mask, row_begin, row_end, scale, hops, first_mixed, last_mixed, alpha
) -> tuple[Tensor, Tensor, Tensor]:
    out = _fake_forward(query, key, value)
    passes = query.new_empty((saved_passes(hops, first_mixed, last_mixed), *query.shape))
    return out, query.new_empty(query.shape[:3], dtype=torch.float32), passes


def _fake_backward(grad_out, query, key, *others) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, queries, dim = query.shape
    sizes = (queries, key.shape[2], key.shape[2])
    return tuple(query.new_empty((batch, size, heads, dim)) for size in sizes)


_FAKES = {
    "qgfd_forward": _fake_forward,
    "qgfd_forward_saved": _fake_forward_saved,
    "qgfd_backward": _fake_backward,
}
IMPLEMENTATIONS = implementations(SCHEMAS, _FAKES, "fastdiff.kernels.qgfd.triton_kernels")
register_backends(OPERATOR)


def refuses_head_size(backend: str, dim: int) -> str | None:
    """Why a backend cannot run a head size: one sentence, or None where it can."""
    if backend == "cuda" and (dim > 256 or dim % 8):
        return f"it takes head sizes that are multiples of 8 up to 256, not {dim}"
    if backend == "triton" and dim > 256:
        return f"it takes head sizes up to 256, not {dim}"
    return None
