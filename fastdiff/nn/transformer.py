"""Bidirectional transformer blocks of language models: attention over token masks, rotary positions, caches.

One block serves GPT-2 (LayerNorm, GELU), Llama, Qwen2 and LLaDA (RMSNorm, SwiGLU, rotary positions, grouped keys) and
encoder-decoders (cross-attention). Parameter names are those of transformers' Llama.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.nn.flash import SDPA, attend
from fastdiff.nn.mlp import linear_activation
from fastdiff.nn.norm import AdaLayerNorm
from fastdiff.nn.rotary import rotate


def annealed_attention_mask(
    length: int,
    bidirectional: float,
    *,
    batch_size: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:  # bool [batch_size, length, length], True = attend
    """Causal attention in which each later token is visible with probability `bidirectional` (Gong et al. 2025).

    Adapting an autoregressive model raises it from 0 (causal) to 1 (all attend to all) over the first steps. Drawn on
    the generator's device (the CPU's without one). Raises ValueError for a probability outside [0, 1].
    """
    if not 0 <= bidirectional <= 1:
        raise ValueError(f"bidirectional: got {bidirectional}; expected a probability in [0, 1]")
    draw = {"generator": generator, "device": "cpu" if generator is None else generator.device}
    seen = torch.rand(batch_size, length, length, **draw).to(device) < bidirectional
    return seen | torch.ones(length, length, dtype=torch.bool, device=device).tril()


def take_columns(x: Tensor, columns: Tensor, dim: int = 1) -> Tensor:
    """Columns `[B, l]` of each sequence, along dimension `dim` of x (dimension 0 of size B or 1)."""
    batch, length = columns.shape
    shape = [batch, *x.shape[1:]]
    index = columns.view(batch, *[1] * (dim - 1), length, *[1] * (x.ndim - dim - 1))
    return x.expand(shape).gather(dim, index.expand(*shape[:dim], length, *shape[dim + 1 :]))


class KeyValueCache:
    """Keys and values of every layer at all positions of a batch of sequences, for inference.

    A call over whole sequences fills it; a later call over a few columns writes theirs in place and attends to all.
    The other columns are as old as their last writing, so that its results approximate those of a whole call. Either
    kind may be of some of the sequences alone (`rows`), whose keys and values are then gathered and written back.
    """

    def __init__(self) -> None:
        self.columns: Tensor | None = None  # [l] or [B, l] of the call under way; None is a whole call
        self.rows: Tensor | None = None  # [b] of the call under way; None is all
        self._layers: list[tuple[Tensor, Tensor]] = []  # [B, H, L, d] each

    @property
    def length(self) -> int:
        """Columns held: 0 before the first call."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def keep(self, rows: Tensor, length: int) -> None:
        """Goes on with these sequences (int64 `[b]`, in this order) and their first `length` columns."""
        self._layers = [tuple(t.index_select(0, rows)[:, :, :length] for t in pair) for pair in self._layers]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values and returns all of that layer's."""
        if self.columns is None and self.rows is None:
            del self._layers[layer:]
            self._layers.append((key.detach(), value.detach()))
            return key, value
        stored = self._layers[layer]
        for whole, part in zip(stored, (key.detach(), value.detach()), strict=True):
            self._write(whole, part)
        if self.rows is None:
            return stored
        return (key, value) if self.columns is None else tuple(t.index_select(0, self.rows) for t in stored)

    def _write(self, whole: Tensor, part: Tensor) -> None:  # [B, H, L, d], [b, H, l, d]
        if self.columns is None:
            whole.index_copy_(0, self.rows, part)
        elif self.rows is None and self.columns.ndim == 1:
            whole.index_copy_(2, self.columns, part)
        else:
            rows = torch.arange(len(part), device=part.device) if self.rows is None else self.rows
            whole.transpose(1, 2)[rows[:, None], self.columns] = part.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention (`fastdiff.nn.flash.attend`), with grouped keys and values.

    `context_dim` is the width of the states attended to in cross-attention; None is self-attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        output_bias: bool = True,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads or num_heads
        self.head_dim, self.dropout = head_dim or dim // num_heads, dropout
        self.q_proj = nn.Linear(dim, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(context_dim or dim, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, dim, bias=output_bias)
        self.o_proj.branch = "residual" if context_dim is None else "cross"  # read where weights are initialised

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        mask: Tensor | None = None,  # bool, broadcasts to [B, H, L, keys], True = attend
        rotary: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,  # [B, M, context_dim]
        cache: KeyValueCache | None = None,
        layer: int = 0,
        columns: Tensor | None = None,  # int64 [B, l]: those of x that ask; all are keys
        implementation: str = SDPA,
    ) -> Tensor:  # [B, L or l, D]
        source = x if context is None else context
        asking, asking_rotary = x, rotary
        if columns is not None:
            asking = take_columns(x, columns)
            asking_rotary = None if rotary is None else tuple(take_columns(t, columns, 2) for t in rotary)
            if mask is not None and mask.shape[2] > 1:
                mask = take_columns(mask, columns, 2)
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in ((self.q_proj, asking), (self.k_proj, source), (self.v_proj, source))
        )
        if rotary is not None:
            query, key = rotate(query, asking_rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.update(layer, key, value)
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0, implementation)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear → activation → Linear, or with `gated` activation(gate) · up → Linear (SwiGLU where that is "silu")."""

    def __init__(self, dim: int, hidden_dim: int, *, activation: str, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        self.down_proj.branch = "residual"
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
        if self.gate_proj is None:
            return self.down_proj(linear_activation(self.up_proj, x, self.activation))
        return self.down_proj(linear_activation(self.gate_proj, x, self.activation, self.up_proj))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, optional cross-attention, feed-forward, each added to the residual stream.

    `attention`, `feed_forward` and `norm` are the keyword arguments of `Attention`, `FeedForward` and `AdaLayerNorm`;
    `context_dim` adds the cross-attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        attention: dict,
        feed_forward: dict,
        norm: dict,
        context_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_layernorm = AdaLayerNorm(dim, elementwise_affine=True, **norm)
        self.self_attn = Attention(dim, num_heads, dropout=dropout, **attention)
        self.cross_attention_layernorm, self.cross_attn = None, None
        if context_dim is not None:
            self.cross_attention_layernorm = AdaLayerNorm(dim, elementwise_affine=True, **norm)
            self.cross_attn = Attention(dim, num_heads, dropout=dropout, context_dim=context_dim, **attention)
        self.post_attention_layernorm = AdaLayerNorm(dim, elementwise_affine=True, **norm)
        self.mlp = FeedForward(dim, hidden_dim, **feed_forward)
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        mask: Tensor | None = None,  # bool, broadcasts to [B, H, L, keys], True = attend
        rotary: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,  # [B, M, context_dim]
        context_mask: Tensor | None = None,  # bool [B, 1, 1, M]
        cache: KeyValueCache | None = None,
        layer: int = 0,
        columns: Tensor | None = None,  # int64 [B, l]: those wanted; all serve as keys and values
        implementation: str = SDPA,
    ) -> Tensor:  # [B, L or l, D]
        normed = self.input_layernorm(x, None, None)
        mixed = self.self_attn(normed, mask, rotary, None, cache, layer, columns, implementation)
        x = (x if columns is None else take_columns(x, columns)) + self._drop(mixed)
        if self.cross_attn is not None and context is not None:
            normed = self.cross_attention_layernorm(x, None, None)
            mixed = self.cross_attn(normed, context_mask, context=context, implementation=implementation)
            if context_mask is not None:  # a row that may attend to nothing is left as it is
                mixed = mixed.masked_fill(~context_mask.any(-1), 0)
            x = x + self._drop(mixed)
        return x + self._drop(self.mlp(self.post_attention_layernorm(x, None, None)))

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch
