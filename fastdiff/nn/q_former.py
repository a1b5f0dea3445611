"""A Q-Former: learned queries that read a text and give a conditioning vector to each layer of a diffusion transformer.

It is LLM2DiT's, which takes the queries of BLIP-2 (Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training
with Frozen Image Encoders and Large Language Models") to per-layer vectors for adaLN. Nothing in it depends on the
noise or its time: it runs once a prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.cross_attention import CrossAttention
from fastdiff.nn.mlp import swiglu_width
from fastdiff.nn.norm import AdaLayerNorm
from fastdiff.nn.transformer import FeedForward

_NORM_EPS = 1e-5


@dataclass
class QFormerConfig:
    """Shape and options of a Q-Former; the defaults are LLM2DiT's.

    Attributes:
        hidden_size: Width of the queries. Text states of another width are projected to it first; null is the width of
            the text states.
        num_queries: Number of learned queries.
        depth: Number of blocks.
        num_heads: Attention heads; divides the width.
        drop_early: Probability with which training hides the first tokens of a text from cross-attention, against
            attention that sinks into them.
        early_tokens: How many tokens those are.
    """

    hidden_size: int | None = 768
    num_queries: int = 4
    depth: int = 2
    num_heads: int = 8
    drop_early: float = 0.0
    early_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("num_queries", "depth", "num_heads", "early_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"QFormerConfig.{name}: got {getattr(self, name)}; expected at least 1")
        if self.hidden_size is not None and self.hidden_size < 1:
            raise ValueError(f"QFormerConfig.hidden_size: got {self.hidden_size}; expected at least 1, or null")
        if self.hidden_size is not None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"QFormerConfig.num_heads: got {self.num_heads}; expected a divisor of hidden_size = {self.hidden_size}"
            )
        if not 0 <= self.drop_early <= 1:
            raise ValueError(f"QFormerConfig.drop_early: got {self.drop_early}; expected a probability, 0 to 1")


class QFormerBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the text, SwiGLU: each pre-norm, each added to the queries."""

    def __init__(self, dim: int, config: QFormerConfig) -> None:
        super().__init__()
        norm = dict(eps=_NORM_EPS, elementwise_affine=True)
        self.attn_norm = AdaLayerNorm(dim, **norm)
        self.self_attn = SelfAttention(dim, config.num_heads, qkv_bias=False, proj_bias=False, qk_norm=True)
        self.cross_norm = AdaLayerNorm(dim, **norm)
        self.cross_attn = CrossAttention(dim, config.num_heads, qk_norm=True)
        self.cross_attn.drop_early, self.cross_attn.early_tokens = config.drop_early, config.early_tokens
        self.ffn_norm = AdaLayerNorm(dim, **norm)
        self.ffn = FeedForward(dim, swiglu_width(dim), activation="silu", gated=True, bias=False)

    def forward(
        self,
        queries: Tensor,  # [B, Q, D], or [1, Q, D] before they have met a text
        text_states: Tensor,  # [B, S, D]
        text_mask: Tensor | None,  # bool [B, S], True = attend
    ) -> Tensor:  # [B, Q, D]
        queries = queries + self.self_attn(self.attn_norm(queries, None, None))
        queries = queries + self.cross_attn(self.cross_norm(queries, None, None), text_states, text_mask)
        return queries + self.ffn(self.ffn_norm(queries, None, None))


class QFormer(nn.Module):
    """Text states `[B, S, text_dim]` → `[B, num_layers, conditioning_dim]`, a vector for each layer.

    Learned queries pass through the blocks; a linear layer takes them to `conditioning_dim`, another one, without bias,
    mixes the queries into the layers. Until they meet a text the queries are the same of every row, and are computed
    once.

    Raises ValueError where the width is not a multiple of the heads.
    """

    def __init__(self, text_dim: int, num_layers: int, conditioning_dim: int, config: QFormerConfig) -> None:
        super().__init__()
        dim = config.hidden_size or text_dim
        self.text_dim, self.num_layers, self.conditioning_dim = text_dim, num_layers, conditioning_dim
        self.queries = nn.Embedding(config.num_queries, dim)
        self.text_proj = None if text_dim == dim else nn.Linear(text_dim, dim)
        self.blocks = nn.ModuleList(QFormerBlock(dim, config) for _ in range(config.depth))
        self.output_proj = nn.Linear(dim, conditioning_dim)
        self.query_to_layer = nn.Linear(config.num_queries, num_layers, bias=False)

    def forward(
        self,
        text_states: Tensor,  # [B, S, text_dim]
        text_mask: Tensor | None = None,  # bool [B, S], True = a token
    ) -> Tensor:  # [B, num_layers, conditioning_dim]
        """Raises ValueError for states of another width, and for a mask that does not fit them."""
        if text_states.ndim != 3 or text_states.shape[2] != self.text_dim:
            raise ValueError(f"text_states: got shape {list(text_states.shape)}; expected [B, S, {self.text_dim}]")
        if self.text_proj is not None:
            text_states = self.text_proj(text_states)
        queries = self.queries.weight[None]
        for block in self.blocks:
            queries = block(queries, text_states, text_mask)
        return self.query_to_layer(self.output_proj(queries).transpose(1, 2)).transpose(1, 2)


class StateMix(nn.Module):
    """A learned mean of the hidden states of several layers, `[B, S, K, C]` → `[B, S, C]`.

    The weights are a softmax (as in ELMo, Peters et al. 2018); they start equal.
    """

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_states))

    def forward(self, text_states: Tensor) -> Tensor:
        """Raises ValueError for another number of states."""
        if text_states.ndim != 4 or text_states.shape[2] != len(self.logits):
            shape = list(text_states.shape)
            raise ValueError(f"text_states: got shape {shape}; expected [B, S, {len(self.logits)}, C]")
        weights = self.logits.softmax(0).to(text_states.dtype)
        return torch.einsum("bskc,k->bsc", text_states, weights)
