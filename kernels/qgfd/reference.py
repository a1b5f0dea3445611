"""QGFD attention in plain PyTorch, as it is defined: the L x L matrices, their powers, their mixture (README.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_EPS = 1e-6  # keys shorter than this are scaled up less: else a key of zeros gets gradients of 1e12


def attention_mask(
    queries: int,
    keys: int,
    device: torch.device,
    key_mask: Tensor | None = None,  # bool [B, L_k], True = attend
    is_causal: bool = False,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    prefix_length: int | Tensor | None = None,  # a number, [B], or [S] with cu_seqlens
    attn_mask: Tensor | None = None,  # bool, broadcasts to [B, H, L_q, L_k]
) -> Tensor | None:
    """Which keys a query attends to: a bool mask that broadcasts to [B, H, L_q, L_k]; None where it is all of them."""
    mask = attn_mask
    i = torch.arange(queries, device=device)[:, None] + keys - queries  # the last query sees the last key
    j = torch.arange(keys, device=device)[None]

    def restrict(allowed: Tensor) -> None:
        nonlocal mask
        mask = allowed if mask is None else mask & allowed

    if key_mask is not None:
        restrict(key_mask[:, None, None])
    start, prefix = torch.zeros_like(j[0]), prefix_length
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens.long(), j[0], right=True) - 1
        restrict(sequence[:, None] == sequence[None])
        start = cu_seqlens.long()[sequence]
        if isinstance(prefix, Tensor):
            prefix = prefix[sequence][:, None]
    elif isinstance(prefix, Tensor):
        prefix = prefix[:, None, None, None]
    if prefix is not None:
        restrict((j <= i) | (j - start < prefix))
    elif is_causal:
        restrict(j <= i)
    return mask


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """A row that attends to nothing is zero."""
    if mask is None:
        return scores.softmax(-1)
    some = mask.any(-1, keepdim=True)
    return scores.masked_fill(~(mask | ~some), -torch.inf).softmax(-1).masked_fill(~some, 0)


def transition_matrix(query, key, transition, temperature, scale, masks, sink_isolation) -> Tensor:
    """P: [B, H, L, L]."""
    if transition == "attention":
        mask = attention_mask(query.shape[-2], key.shape[-2], key.device, **masks)
        return masked_softmax(query @ key.mT * (scale / temperature), mask)
    mask = attention_mask(key.shape[-2], key.shape[-2], key.device, **masks)
    unit = F.normalize(key, dim=-1, eps=UNIT_EPS)
    p = masked_softmax(unit @ unit.mT / temperature, mask)
    if not sink_isolation:
        return p
    # The sink, the first key of each sequence that may be attended to, passes nothing on.
    attended = torch.ones(key.shape[-2], dtype=torch.bool, device=key.device) if mask is None else mask.any(-2)
    first = torch.zeros_like(attended)
    starts = [0] if masks["cu_seqlens"] is None else masks["cu_seqlens"].tolist()[:-1]
    ends = [*starts[1:], attended.shape[-1]]
    for begin, end in zip(starts, ends, strict=True):
        part = attended[..., begin:end]
        first[..., begin:end] = part & (part.cumsum(-1) == 1)
    return torch.where(first[..., None], torch.eye(p.shape[-1], dtype=p.dtype, device=p.device), p)


def qgfd_attention(
    query: Tensor,  # [B, H, L_q, d]
    key: Tensor,  # [B, H_kv, L_k, d]
    value: Tensor,  # [B, H_kv, L_k, d]
    *,
    steps: int = 1,
    alpha: float = 0.5,
    transition: str = "attention",
    recurrence: str = "power",
    temperature: float = 1.0,
    sink_isolation: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    **masks,
) -> Tensor:  # [B, H, L_q, d]
    """out = W · V, in fp32 (fp64 for fp64 input), rounded once to query's dtype."""
    masks = {"key_mask": None, "is_causal": False, "cu_seqlens": None, "prefix_length": None, "attn_mask": None} | masks
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    groups = query.shape[1] // max(key.shape[1], 1)
    query = query.to(wide)
    key, value = (t.to(wide).repeat_interleave(groups, 1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = attention_mask(query.shape[-2], key.shape[-2], key.device, **masks)
    attention = masked_softmax(query @ key.mT * scale, mask)
    mixed = attention
    if steps > 0 and alpha > 0:
        p = transition_matrix(query, key, transition, temperature, scale, masks, sink_isolation)
        for step in range(1, steps + 1):
            mixed = mixed @ p
            if recurrence == "restart" or step == steps:
                mixed = alpha * mixed + (1 - alpha) * attention
    if dropout_p > 0:
        mixed = F.dropout(mixed, dropout_p)
    return (mixed @ value).to(dtype)


def qgfd_values(
    key: Tensor,  # [B, H, L, d]
    value: Tensor,  # [B, H, L, d]
    *,
    steps: int = 1,
    alpha: float = 0.5,
    recurrence: str = "power",
    temperature: float = 1.0,
    sink_isolation: bool = False,
    **masks,
) -> Tensor:  # [B, H, L, d]
    """What transition "key" makes of the values: w, of which out = A · w."""
    masks = {"key_mask": None, "is_causal": False, "cu_seqlens": None, "prefix_length": None, "attn_mask": None} | masks
    wide = torch.float64 if key.dtype == torch.float64 else torch.float32
    key, value, dtype = key.to(wide), value.to(wide), value.dtype
    p = transition_matrix(key, key, "key", temperature, 1.0, masks, sink_isolation)
    w = value
    for step in range(1, steps + 1):
        w = p @ w
        if recurrence == "restart" or step == steps:
            w = alpha * w + (1 - alpha) * value
    return w.to(dtype)
