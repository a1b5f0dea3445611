"""QGFD attention: attention whose weights are diffused along a Markov chain, without an L x L matrix in memory.

Mathematics, rounding and what was measured: kernels/qgfd/README.md. The method is Query Graph Flow Diffusion, of the
repository rajboopathiking/TorchDire. Its mixture is linear in the values, so that k + 1 products of width d replace
powers of L x L matrices: that is why it costs what attention costs.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.qgfd import reference
from fastdiff.ops._checks import autocast, choose_backend
from fastdiff.ops._qgfd_backends import OPERATOR, refuses_head_size
from fastdiff.ops._qgfd_hops import hops, unit_keys
from fastdiff.ops._qgfd_options import (
    Masks,
    QGFDOptions,
    Recurrence,
    Transition,
    check_operands,
    hide,
    isolate_sinks,
    row_intervals,
)


def qgfd_attention(
    query: Tensor,  # [B, H, L_q, d]
    key: Tensor,  # [B, H_kv, L_k, d]
    value: Tensor,  # [B, H_kv, L_k, d]
    *,
    steps: int = 1,
    alpha: float = 0.5,
    transition: Transition = "attention",
    recurrence: Recurrence = "power",
    temperature: float = 1.0,
    key_mask: Tensor | None = None,  # bool [B, L_k], True = attend
    is_causal: bool = False,
    cu_seqlens: Tensor | None = None,  # int32 or int64 [S + 1]
    prefix_length: int | Tensor | None = None,  # a number, or int64 [B] ([S] with cu_seqlens)
    sink_isolation: bool = False,
    enable_gqa: bool = False,
    scale: float | None = None,
    hop_dropout_p: float = 0.0,
) -> Tensor:  # [B, H, L_q, d]
    """Attention diffused along its own Markov chain: out = A·w.

    A is attention's softmax matrix, P the chain's transition matrix, both with the same masks. With `recurrence`
    "power", w = α·Pᵏ·V + (1 − α)·V; with "restart" (personalised PageRank), w ← α·P·w + (1 − α)·V, k times from V;
    k = `steps`, α = `alpha`. Memory is linear in L, in both directions.

    Args:
        query, key, value: float32, bfloat16 or float16, one dtype (float64 through the reference); under autocast they
            are cast as scaled_dot_product_attention casts them.
        steps: k >= 0. 0 is plain attention, and goes through scaled_dot_product_attention where that knows the mask.
        alpha: a number in [0, 1].
        transition: "attention": P is A (at `temperature`), which wants L_q = L_k. "key": P is the softmax of the keys'
            cosine similarity / `temperature`; w then depends on keys and values alone (`qgfd_values`).
        recurrence: "power" or "restart".
        temperature: P's scores are divided by it; > 0.
        key_mask: True = attend. What keys and values hold elsewhere does not matter, even NaN. A query with nothing to
            attend to gives zeros and gets zero gradients.
        is_causal: query i sees the keys up to i + L_k − L_q (the last query sees the last key).
        cu_seqlens: B = 1, and sequences lie one after the other: the s-th from cu_seqlens[s] to cu_seqlens[s + 1].
        prefix_length: causal, but the first prefix_length keys (of each sequence) are seen by every query.
        sink_isolation: with transition "key": the first key that may be attended to passes nothing on (its row of P is
            its unit row).
        enable_gqa: key and value have fewer heads than query, each for a group of neighbouring heads.
        scale: the scores are multiplied by it; > 0, d ** -0.5 by default.
        hop_dropout_p: each hop drops weights of its matrix independently with this probability, which makes it
            steps + 1 calls of scaled_dot_product_attention; with transition "attention" and temperature 1 alone.
            Dropout of the mixed matrix does not factor: `qgfd_attention_dense` has it.

    Returns:
        [B, H, L_q, d] in query's dtype (autocast's under autocast), as a rule a transposed [B, L_q, H, d], so that
        `out.transpose(1, 2).flatten(2)` costs nothing. It can be differentiated once, not twice. Masks keep finite
        values apart; a NaN or Inf in a masked row may spread, as 0 · NaN is NaN.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, value or device does not fit; the message names it. The
            numbers of cu_seqlens and of a prefix_length tensor are looked at on the CPU alone, and not under
            torch.compile.
        BackendError: the backend that was asked for cannot run.
    """
    options = QGFDOptions(
        steps=steps,
        alpha=alpha,
        transition=transition,
        recurrence=recurrence,
        temperature=temperature,
        sink_isolation=sink_isolation,
    )
    masks = Masks(key_mask, is_causal, cu_seqlens, prefix_length)
    limits = {"enable_gqa": enable_gqa, "scale": scale, "hop_dropout_p": hop_dropout_p}
    check_operands(query, key, value, options, masks, **limits)
    query, key, value = hide(*autocast(query, key, value), key_mask, options)
    if options.plain and masks.sdpa_knows:
        return _sdpa(query, key, value, masks, scale, hop_dropout_p)
    if hop_dropout_p > 0:
        return _with_hop_dropout(query, key, value, options, masks, scale, hop_dropout_p)
    backend = _choose(query)
    if backend == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return reference.qgfd_attention(query, key, value, scale=scale, **options.of_attention, **masks.as_dict())
    intervals = row_intervals(masks, query.shape[2], key.shape[2], query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if options.plain:
        return hops(backend, query, key, value, key_mask, intervals, scale, 1)
    if transition == "attention" and temperature == 1:
        return hops(backend, query, key, value, key_mask, intervals, scale, steps + 1, options.mixed, alpha)
    if transition == "attention":
        scores = scale / temperature
        w = hops(backend, query, key, value, key_mask, intervals, scores, steps, options.mixed, alpha)
    else:
        w = _diffuse_over_keys(backend, key, value, options, masks)
    return hops(backend, query, key, w, key_mask, intervals, scale, 1)


def qgfd_values(
    key: Tensor,  # [B, H, L, d]
    value: Tensor,  # [B, H, L, d]
    *,
    steps: int = 1,
    alpha: float = 0.5,
    recurrence: Recurrence = "power",
    temperature: float = 1.0,
    key_mask: Tensor | None = None,  # bool [B, L], True = attend
    is_causal: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    prefix_length: int | Tensor | None = None,
    sink_isolation: bool = False,
) -> Tensor:  # [B, H, L, d]
    """The values w that transition "key" diffuses: plain attention over (query, key, w) is `qgfd_attention`.

    w does not depend on the queries, and under a causal mask a row of it depends on the rows before alone: it can be
    kept beside a KV cache. Arguments and errors as in `qgfd_attention`.
    """
    options = QGFDOptions(
        steps=steps,
        alpha=alpha,
        transition="key",
        recurrence=recurrence,
        temperature=temperature,
        sink_isolation=sink_isolation,
    )
    masks = Masks(key_mask, is_causal, cu_seqlens, prefix_length)
    check_operands(key, key, value, options, masks)
    key, value = autocast(key, value)
    _, key, value = hide(key, key, value, key_mask, options)
    if options.plain:
        return value
    backend = _choose(key)
    if backend == "reference":
        with torch.autocast(key.device.type, enabled=False):
            return reference.qgfd_values(key, value, **options.of_values, **masks.as_dict())
    return _diffuse_over_keys(backend, key, value, options, masks)


def qgfd_attention_dense(
    query: Tensor,  # [B, H, L_q, d]
    key: Tensor,  # [B, H_kv, L_k, d]
    value: Tensor,  # [B, H_kv, L_k, d]
    *,
    steps: int = 1,
    alpha: float = 0.5,
    transition: Transition = "attention",
    recurrence: Recurrence = "power",
    temperature: float = 1.0,
    attn_mask: Tensor | None = None,  # bool, broadcasts to [B, H, L_q, L_k], True = attend
    key_mask: Tensor | None = None,  # bool [B, L_k], True = attend
    is_causal: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    prefix_length: int | Tensor | None = None,
    sink_isolation: bool = False,
    enable_gqa: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:  # [B, H, L_q, d]
    """`qgfd_attention` by its definition, with L x L matrices: for any mask, and for dropout of the mixed matrix.

    Args:
        attn_mask: any mask, a sliding window say. Such masks are not closed under powers: a second hop reaches keys
            that the mask hides from the query (TorchDire does not mask again, and neither does this); the
            first call with one warns of it. Only where L_q = L_k.
        dropout_p: each weight of the mixed matrix W is dropped with this probability.

    The other arguments and errors are those of `qgfd_attention`.
    """
    options = QGFDOptions(
        steps=steps,
        alpha=alpha,
        transition=transition,
        recurrence=recurrence,
        temperature=temperature,
        sink_isolation=sink_isolation,
    )
    masks = Masks(key_mask, is_causal, cu_seqlens, prefix_length, attn_mask)
    check_operands(query, key, value, options, masks, enable_gqa=enable_gqa, scale=scale, dropout_p=dropout_p)
    if attn_mask is not None and not options.plain:
        _warn_of_leaks()
    query, key, value = hide(*autocast(query, key, value), key_mask, options)
    with torch.autocast(query.device.type, enabled=False):
        return reference.qgfd_attention(
            query, key, value, scale=scale, **options.of_attention, **masks.as_dict(), dropout_p=dropout_p
        )


_warned = False


def _warn_of_leaks() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "QGFD's hops reach keys that attn_mask hides where it is not closed under powers, as a sliding window is"
            " not; key_mask, is_causal, prefix_length and cu_seqlens are, and need no L x L matrix",
            stacklevel=3,
        )


def _choose(query: Tensor) -> str:
    """The backend that runs, its limits on head sizes counted."""
    dim = query.shape[-1]
    return choose_backend(OPERATOR, query.device.type, (query.dtype,), lambda backend: refuses_head_size(backend, dim))


def _diffuse_over_keys(backend: str, key: Tensor, value: Tensor, options: QGFDOptions, masks: Masks) -> Tensor:
    unit = unit_keys(key)
    length = key.shape[2]
    intervals = row_intervals(masks, length, length, key.device)
    if options.sink_isolation:
        intervals = isolate_sinks(intervals, masks, key.shape[0], length, key.device)
    scores, steps = 1 / options.temperature, options.steps
    return hops(backend, unit, unit, value, masks.key_mask, intervals, scores, steps, options.mixed, options.alpha)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, masks: Masks, scale: float | None, dropout_p: float) -> Tensor:
    """torch's attention under the masks it knows: keys, causal."""
    queries, keys = query.shape[2], key.shape[2]
    causal = masks.is_causal and queries > 1
    mask = None if masks.key_mask is None else masks.key_mask[:, None, None]
    if causal and (
        mask is not None or queries != keys
    ):  # torch's own causal mask has the first query see the first key
        lower = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        mask = lower if mask is None else mask & lower
        causal = False
    grouped = False
    if query.shape[1] != key.shape[1]:  # a branch: under torch.compile the comparison itself is not a bool
        grouped = True
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped, dropout_p=dropout_p
    )


def _with_hop_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: QGFDOptions,
    masks: Masks,
    scale: float | None,
    hop_dropout_p: float,
) -> Tensor:
    """Each hop's weights dropped on their own, as steps + 1 calls of torch's attention."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value)) if groups > 1 else (key, value)
    w = value
    for step in range(1, options.steps + 1):
        w = _sdpa(query, key, w, masks, scale, hop_dropout_p)
        if step in options.mixed:
            w = torch.lerp(value, w, options.alpha)
    return _sdpa(query, key, w, masks, scale, hop_dropout_p)
