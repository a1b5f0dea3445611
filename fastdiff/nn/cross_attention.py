"""Multi-head attention of one sequence to another: of queries, or image tokens, to the tokens of a text."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdiff.nn.attention import matmul_attention
from fastdiff.nn.checks import bool_mask
from fastdiff.nn.flash import attend, resolve_implementation
from fastdiff.nn.head import plain_weights
from fastdiff.nn.norm import QK_NORM_EPS, AdaLayerNorm

# Up to so many queries and keys plain products in half precision are faster on a CPU than torch's attention: forward
# and backward of 128 x 4 queries to 16 tokens, 768 wide, take 90 ms with them and 145 with it (in float32 169 and 148).
_FEW = 64


def _few(query: Tensor, key: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.device.type == "cpu" and max(query.shape[-2], key.shape[-2]) <= _FEW


class CrossAttention(nn.Module):
    """Attention of x `[B, Q, dim]` to a context `[B, K, context_dim]`.

    Queries and results go by way of the keys where these are few (two tokens for 64 of an image, on a CPU): that needs
    no product of x with a matrix. Else flash-attn where it is installed and fits, plain products, or torch's fused
    attention (`fastdiff.nn.flash.attend`).

    Attributes:
        capture: called with the weights `[B, H, Q, K]` of each call, where it is not None; these weights are then made
            explicitly, and used. Gradients flow through them.
        drop_early: in training mode a row's first `early_tokens` tokens are hidden with this probability, if others of
            it are left: a remedy for attention that sinks into the first token (Xiao et al. 2024, "Efficient Streaming
            Language Models with Attention Sinks", describe it). Drawn from torch's generator.
        early_tokens: how many those are.
        leading_keys: keys that come before the first token and are never hidden (the time of a DiT).

    Args:
        dim: width of x and of the result.
        num_heads: divides dim.
        context_dim: width of the context; None is dim.
        bias: biases of the projections to query, key and value.
        out_bias: bias of the output projection; None is `bias`.
        qk_norm: a LayerNorm of query and one of key, over the whole width, before the heads are split.

    Raises ValueError where dim is not a multiple of num_heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads} for dim = {dim}; expected a divisor of dim")
        self.num_heads, self.context_dim = num_heads, context_dim or dim
        self.wq = nn.Linear(dim, dim, bias=bias)
        self.wk = nn.Linear(self.context_dim, dim, bias=bias)
        self.wv = nn.Linear(self.context_dim, dim, bias=bias)
        self.wo = nn.Linear(dim, dim, bias=bias if out_bias is None else out_bias)
        self.q_norm = AdaLayerNorm(dim, eps=QK_NORM_EPS, elementwise_affine=True) if qk_norm else None
        self.k_norm = AdaLayerNorm(dim, eps=QK_NORM_EPS, elementwise_affine=True) if qk_norm else None
        self.capture: Callable[[Tensor], None] | None = None
        self.drop_early, self.early_tokens, self.leading_keys = 0.0, 1, 0
        self.implementation = resolve_implementation(None)

    def forward(
        self,
        x: Tensor,  # [B, Q, dim], or [1, Q, dim]: the same of every row
        context: Tensor,  # [B, K, context_dim]
        context_mask: Tensor | None = None,  # bool [B, K], True = attend
    ) -> Tensor:  # [B, Q, dim]
        """Raises ValueError for a context of another width or batch, TypeError and ValueError for a mask that is none.

        A row that has nothing to attend to gives zeros, through `wo`.
        """
        self._check(x, context)
        seen = self._seen(context, context_mask)
        key, value = self.wk(context), self.wv(context)
        if self._folds(x, key):
            return self._through_keys(x, key, value, seen)
        query = self.wq(x)
        if self.q_norm is not None:
            query, key = self.q_norm(query, None, None), self.k_norm(key, None, None)
        query, key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value))
        mixed = self._mixed(query.expand(len(context), -1, -1, -1), key, value, seen)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def _folds(self, x: Tensor, key: Tensor) -> bool:
        """Whether queries and results are cheaper by way of the keys: where these are few, on a CPU."""
        if self.capture is not None or self.q_norm is not None or x.device.type != "cpu" or len(x) != len(key):
            return False
        (tokens, dim), keys = x.shape[1:], key.shape[1]
        if 2 * keys * (tokens * self.num_heads + dim) > tokens * dim:  # half, as small batched products are slower
            return False
        return plain_weights(self.wq) is not None and plain_weights(self.wo) is not None

    def _through_keys(self, x: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:  # [B, Q, dim]
        """The same with the projections of query and output folded into keys and values.

        q·k = x·(Wqᵀk) and Wo·(Σ a·v) = Σ a·(Wo·v), head by head: each token of x meets H·K vectors of the sample
        instead of two matrices.
        """
        (batch, keys), heads = key.shape[:2], self.num_heads
        (weight, bias), (out_weight, out_bias) = plain_weights(self.wq), plain_weights(self.wo)
        key, value = (t.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).flatten(1, 2) for t in (key, value))
        by_head = weight.unflatten(0, (heads, -1))  # [H, d, dim]
        by_keys = torch.bmm(key, by_head).view(heads, batch, keys, -1).permute(1, 0, 2, 3).flatten(1, 2)
        scores = torch.bmm(x, by_keys.transpose(1, 2)).unflatten(-1, (heads, keys))  # [B, Q, H, K]
        if bias is not None:
            constant = torch.bmm(key, bias.view(heads, -1, 1)).view(heads, batch, keys)
            scores = scores + constant.transpose(0, 1)[:, None]
        scores = scores * key.shape[-1] ** -0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], torch.finfo(scores.dtype).min)
        # rows as short as these are slower in float32
        weights = scores.softmax(-1, dtype=None if keys < 8 else torch.float32)
        if seen is not None:
            weights = weights * seen[:, None, None]
        out_by_head = out_weight.t().unflatten(0, (heads, -1))  # [H, d, dim]
        by_values = torch.bmm(value, out_by_head).view(heads, batch, keys, -1).permute(1, 0, 2, 3).flatten(1, 2)
        mixed = torch.bmm(weights.flatten(2).to(by_values.dtype), by_values)
        return mixed if out_bias is None else mixed + out_bias

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        mask = None if seen is None else seen[:, None, None]
        if self.capture is None and _few(query, key):
            return matmul_attention(query, key, value, mask)
        if self.capture is None:
            return attend(query, key, value, mask, implementation=self.implementation)
        scores = torch.matmul(query, key.transpose(-2, -1)).float() * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        if mask is not None:
            weights = weights * mask  # of a row without any key: zeros
        self.capture(weights)
        return torch.matmul(weights.to(value.dtype), value)

    def _seen(self, context: Tensor, context_mask: Tensor | None) -> Tensor | None:  # bool [B, K]
        """The keys that each row attends to; None is all of them."""
        if context_mask is not None:
            context_mask = bool_mask("context_mask", context_mask, context.shape[:2])
        if not self.training or not self.drop_early:
            return context_mask
        batch, keys = context.shape[:2]
        everything = torch.ones(batch, keys, dtype=torch.bool, device=context.device)
        seen = everything if context_mask is None else context_mask
        dropped = torch.rand(batch, 1, device=context.device) < self.drop_early
        places = torch.arange(keys, device=context.device) - self.leading_keys
        kept = (places < 0) | (places >= self.early_tokens) | ~dropped
        others = (seen & kept & (places >= 0)).any(1, keepdim=True)
        return seen & (kept | ~others)

    def _check(self, x: Tensor, context: Tensor) -> None:
        if context.ndim != 3 or context.shape[2] != self.context_dim:
            raise ValueError(f"context: got shape {list(context.shape)}; expected [B, K, {self.context_dim}]")
        if len(x) not in (1, len(context)):
            raise ValueError(f"context: got {len(context)} rows for {len(x)} of x; expected as many")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, drop_early={self.drop_early}, early_tokens={self.early_tokens}"
