"""Attention of language models: flash-attn where it is installed and fits, plain products for short sequences on a CPU,
else torch's fused attention."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.nn.attention import matmul_attention, prefers_matmul

FLASH, SDPA = "flash_attention_2", "sdpa"  # transformers' names
_DEVICES, _DTYPES, _MAX_HEAD_DIM = ("cuda",), (torch.float16, torch.bfloat16), 256


def resolve_implementation(wanted: str | None) -> str:
    """The implementation of `attn_implementation`; None is flash-attn where installed, else SDPA.

    Raises ValueError for an unknown name and ImportError where flash-attn is wanted and not installed.
    """
    installed = importlib.util.find_spec("flash_attn") is not None
    if wanted is None:
        return FLASH if installed else SDPA
    if wanted not in (FLASH, SDPA):
        raise ValueError(f"attn_implementation: got {wanted!r}; expected {SDPA!r}, {FLASH!r} or None")
    if wanted == FLASH and not installed:
        raise ImportError(f"attn_implementation: got {FLASH!r}, but flash-attn is not installed; pass {SDPA!r}")
    return wanted


def attend(
    query: Tensor,  # [B, H, L, d]
    key: Tensor,  # [B, H_kv, K, d]
    value: Tensor,  # [B, H_kv, K, d]
    mask: Tensor | None = None,  # bool, broadcasts to [B, H, L, K], True = attend
    dropout: float = 0.0,
    implementation: str = SDPA,
) -> Tensor:  # [B, H, L, d]
    """Softmax attention. flash-attn takes float16 and bfloat16 on CUDA, without a mask or with one over keys."""
    grouped = query.shape[1] != key.shape[1]
    if implementation != FLASH or not _fits(query, mask):
        if prefers_matmul(query, key.shape[-2]):
            if grouped:
                key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
            return matmul_attention(query, key, value, mask, dropout)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # its layout is [B, L, H, d]
    if mask is None:
        return flash_attn_func(query, key, value, dropout_p=dropout).transpose(1, 2)
    batch, length = query.shape[:2]
    seen = mask[:, 0, 0].expand(batch, key.shape[1])
    ends = F.pad(seen.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    mixed = flash_attn_varlen_func(
        query.flatten(0, 1),
        key[seen],
        value[seen],
        torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device),
        ends,
        length,
        key.shape[1],  # an upper bound: the longest row is known to the device alone
        dropout_p=dropout,
    )
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)


def _fits(query: Tensor, mask: Tensor | None) -> bool:
    over_keys = mask is None or (mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1)
    return over_keys and query.device.type in _DEVICES and query.dtype in _DTYPES and query.shape[-1] <= _MAX_HEAD_DIM
