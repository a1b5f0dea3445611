"""Multi-head self-attention with the cheapest formulation for the device, dtype and length at hand."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import backends
from fastdiff.nn.attention_path import fastest_way, products_win
from fastdiff.nn.head import unhooked
from fastdiff.nn.norm import QK_NORM_EPS, AdaLayerNorm
from fastdiff.nn.rotary import rotate
from fastdiff.ops.qk_norm_rotary import qk_norm_rotary
from fastdiff.ops.self_attention import OPERATOR, self_attention

FUSED, SDPA, MATMUL = "fused", "sdpa", "matmul"
ATTENTION_BACKENDS = ("auto", SDPA, MATMUL, FUSED)


def prefers_matmul(query: Tensor, keys: int | None = None) -> bool:
    """Whether plain products are the faster attention for a `[B, H, L, d]` query (`products_win`).

    That is found with as many keys as queries: with more than twice as many `keys` (None is L) it is fused attention.
    """
    if query.device.type != "cpu" or (keys is not None and keys > 2 * query.shape[-2]):
        return False
    return products_win(query, matmul_attention)


def _by_products(qkv: Tensor) -> Tensor:
    # one copy for all three: batched products would otherwise copy each of their strided operands
    return matmul_attention(*qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)).transpose(1, 2)


def _by_sdpa(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2)


# Self-attention of a packed projection: [B, N, 3, H, d] -> [B, N, H, d].
PACKED_WAYS = {FUSED: self_attention, MATMUL: _by_products, SDPA: _by_sdpa}


def self_attention_path(qkv: Tensor) -> str:  # [B, N, 3, H, d]
    """What "auto" takes for self-attention on a packed projection: "fused", "matmul" or "sdpa".

    On a CPU whichever is measured to be fastest (`fastest_way`), else torch's.
    """
    runs = backends.requested() in ("auto", "cpu")  # another backend was asked for by name: torch's own attention
    if runs and backends.why_not(OPERATOR, "cpu", qkv.device.type, (qkv.dtype,)) is None:
        return fastest_way(qkv, PACKED_WAYS, FUSED)
    return MATMUL if prefers_matmul(qkv[:, :, 0].transpose(1, 2)) else SDPA


class SelfAttention(nn.Module):
    """Multi-head self-attention of `[B, N, dim]`, with one projection for query, key and value.

    `backend` is "fused" (`fastdiff.ops.self_attention`, on the projection as it is: fastest on a CPU), "sdpa" (torch's
    scaled_dot_product_attention), "matmul" (plain products) or "auto", which chooses by `self_attention_path`.
    `qk_norm` gives query and key a LayerNorm each, over the whole width, before the heads are split (as in Lumina's and
    LLM2DiT's transformers). Raises ValueError where dim is not a multiple of num_heads or the backend is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads} for dim = {dim}; expected a divisor of dim")
        if backend not in ATTENTION_BACKENDS:
            raise ValueError(f"backend: got {backend!r}; expected one of {', '.join(ATTENTION_BACKENDS)}")
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.q_norm = AdaLayerNorm(dim, eps=QK_NORM_EPS, elementwise_affine=True) if qk_norm else None
        self.k_norm = AdaLayerNorm(dim, eps=QK_NORM_EPS, elementwise_affine=True) if qk_norm else None

    def forward(
        self,
        x: Tensor,  # [B, N, D]
        rotary: tuple[Tensor, Tensor] | None = None,  # `rotary_table` of the positions
    ) -> Tensor:  # [B, N, D]
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        if self.q_norm is not None or rotary is not None:
            qkv = self._placed(qkv, rotary)
        path = self_attention_path(qkv) if self.backend == "auto" else self.backend
        return self.proj(PACKED_WAYS[path](qkv).reshape(batch, tokens, dim))

    def _placed(self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:  # [B, N, 3, H, d] -> the same
        """Query and key normalised and turned to their positions, values as they are."""
        packed = self._plain_norms() and (rotary is None or len(rotary[0]) == 1)
        # a backend of GPUs that was asked for by name has no such operator: it runs the norms
        if packed and backends.requested() not in ("cuda", "triton"):
            cosine, sine = (None, None) if rotary is None else (t[0, 0] for t in rotary)
            weight, bias = (
                torch.stack([getattr(norm, name) for norm in (self.q_norm, self.k_norm)]) for name in ("weight", "bias")
            )
            return qk_norm_rotary(qkv, weight, bias, cosine, sine, eps=self.q_norm.eps)
        query, key, value = qkv.unbind(2)
        if self.q_norm is not None:
            query = self.q_norm(query.flatten(2), None, None).view(query.shape)
            key = self.k_norm(key.flatten(2), None, None).view(key.shape)
        if rotary is not None:
            query, key = (rotate(t.transpose(1, 2), rotary).transpose(1, 2) for t in (query, key))
        return torch.stack([query, key, value], dim=2)

    def _plain_norms(self) -> bool:
        """Whether the norms of query and key are LayerNorms that do nothing else when they are called."""
        return all(type(norm) is AdaLayerNorm and unhooked(norm) for norm in (self.q_norm, self.k_norm))


def matmul_attention(
    query: Tensor,  # [B, H, L, d]
    key: Tensor,  # [B, H, K, d]
    value: Tensor,  # [B, H, K, d]
    mask: Tensor | None = None,  # bool, broadcasts to [B, H, L, K], True = attend
    dropout: float = 0.0,
) -> Tensor:  # [B, H, L, d]
    """Softmax attention by plain products, which holds the L x K weights."""
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    query, key, value = (t.reshape(batch * heads, -1, head_dim) for t in (query, key, value))
    unused = query.new_zeros(1)  # what baddbmm would add; with beta = 0 it only serves to scale by alpha
    scores = torch.baddbmm(unused, query, key.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
    if mask is not None:
        scores = (
            scores.view(batch, heads, queries, keys).masked_fill(~mask, torch.finfo(scores.dtype).min).flatten(0, 1)
        )
    # On a CPU the half-precision softmax falls back to scalars for rows shorter than this; float32 costs half of it.
    wide = scores.device.type == "cpu" and keys < 64
    weights = scores.softmax(-1, dtype=torch.float32 if wide else scores.dtype).to(value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    mixed = torch.bmm(weights, value).view(batch, heads, queries, head_dim)
    return mixed if mask is None else mixed * mask.any(-1, keepdim=True)  # nothing to attend to gives 0, as in SDPA
