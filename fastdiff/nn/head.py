"""Modules whose weights are read, and what stands in for the weights once somebody has wrapped the module.

A fused operator takes weight and bias. An adapter (peft's LoRA, DoRA, trainable tokens), a quantised or sharded layer
and a hook do more than these say. So whoever wants a module's weights asks here, and where there are none to have, the
module is called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastdiff.ops import (
    TokenSample,
    eos_log_prob,
    eos_log_prob_from_logits,
    lm_head_sample,
    masked_linear_cross_entropy,
    sample_tokens,
)
from fastdiff.ops.masked_linear_cross_entropy import cross_entropy_from_logits

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_ROWS = ("sequence_ids", "positions", "temperature")
_LOGITS_AT_ONCE = 64 << 20  # bytes of a module's logits that are made at a time where only numbers of them are wanted


def plain_weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer or an embedding; None where calling it does anything but what they say.

    torch's parametrizations (weight norm, say) are plain: the weight is the one that they compute, gradients and all.
    """
    if parametrize.type_before_parametrizations(module) not in (nn.Linear, nn.Embedding):
        return None
    if not unhooked(module):
        return None
    if getattr(module, "max_norm", None) is not None:
        return None
    weight, bias = module.weight, getattr(module, "bias", None)
    if any(type(t) not in (Tensor, nn.Parameter) for t in (weight, bias) if t is not None):  # quantised or sharded
        return None
    return weight, bias


def unhooked(module: nn.Module) -> bool:
    """Whether calling a module is its class's forward and nothing else: no hooks (offloading, torch's older norms), no
    other forward put in, not compiled in place."""
    hooked = "forward" in module.__dict__ or any(getattr(module, name) for name in _HOOKS)
    return not hooked and module._compiled_call_impl is None


def embedding_table(embedding: nn.Module, size: int) -> Tensor:  # [size, D]
    """What an embedding of `size` ids, wrapped or not, gives for each of them."""
    plain = plain_weights(embedding)
    if plain is not None:
        return plain[0]
    return embedding(torch.arange(size, device=next(embedding.parameters()).device))


def linear_bias(linear: nn.Module, dim: int) -> Tensor:  # [V]
    """What a linear layer with a bias, wrapped or not, gives for zeros of its width `dim`."""
    plain = plain_weights(linear)
    if plain is not None:
        return plain[1]
    like = next(linear.parameters())
    return linear(torch.zeros(1, dim, dtype=like.dtype, device=like.device))[0]


def linear_without_bias(linear: nn.Module, x: Tensor) -> Tensor:  # [..., D] -> [..., V]
    """What a linear layer with a bias, wrapped or not, adds to its bias."""
    plain = plain_weights(linear)
    return F.linear(x, plain[0]) if plain is not None else linear(x) - linear_bias(linear, x.shape[-1])


def check_decodes(model: nn.Module) -> None:
    """Raises ValueError where a wrapper acts in the forward pass of the whole model, which decoding does not call.

    Decoding, length prediction and likelihoods ask the model for hidden states and go through its head themselves.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    name = "a " + type(model).__name__
    if kinds & {"DistributedDataParallel", "DataParallel"}:
        raise ValueError(f"model: got {name}; expected the model in it: pass model.module")
    if kinds & {"FSDPModule", "FullyShardedDataParallel"}:
        raise ValueError(f"model: got {name}, of which each process holds a part; expected a whole one")
    configs = getattr(model, "peft_config", None)
    for adapter in getattr(model, "active_adapters", None) or () if isinstance(configs, dict) else ():
        config = configs.get(adapter)
        of_inputs = getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None)
        if of_inputs or getattr(config, "peft_type", None) == "XLORA":
            raise ValueError(
                f"model: got {name} with {type(config).__name__}, which changes inputs of the whole model; expected "
                "adapters of its layers (LoRA, DoRA, IA3, …)"
            )


class LanguageModelHead:
    """The head of a language model, states `[..., D]` → logits `[..., V]`, and what is computed through it.

    Attributes:
        module: The head.
        plain: Its (weight, bias) where they say all that it does: the fused operators read them, and logits never lie
            whole in memory. Else None: the head is called, and results are those of its own forward pass. The loss then
            holds the logits of the masked rows, the other methods those of some rows at a time.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.plain = module, plain_weights(module)

    def logits(self, states: Tensor) -> Tensor:  # [..., D] -> [..., V]
        """All logits."""
        return self.module(states) if self.plain is None else F.linear(states, *self.plain)

    def logits_of(self, states: Tensor, ids: Tensor) -> Tensor:  # [..., D], int64 [n] -> [..., n]
        """The logits of some ids, without gradient."""
        if self.plain is None:
            return self._by_rows(states, lambda logits, _: (logits[:, ids],))[0].view(*states.shape[:-1], len(ids))
        weight, bias = (None if t is None else t.detach().index_select(0, ids) for t in self.plain)
        return F.linear(states.detach(), weight, bias)

    def masked_cross_entropy(
        self,
        states: Tensor,  # [..., D]
        targets: Tensor,  # int64 [...]
        mask: Tensor,  # bool [...]
        *,
        row_weight: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:  # [], [...]
        """`fastdiff.ops.masked_linear_cross_entropy`."""
        if self.plain is not None:
            weight, bias = self.plain
            options |= dict(bias=bias, row_weight=row_weight)
            return masked_linear_cross_entropy(states, weight, targets, mask, **options)
        if row_weight is not None:
            row_weight = row_weight.expand(mask.shape)[mask]
        logits = self.module(states[mask][None])[0]
        loss, losses = cross_entropy_from_logits(logits, targets[mask], row_weight=row_weight, **options)
        return loss, torch.zeros(mask.shape, dtype=losses.dtype, device=mask.device).masked_scatter(mask, losses)

    def sample(self, states: Tensor, **options: Any) -> TokenSample:  # [R, D]
        """`fastdiff.ops.lm_head_sample`; sequence_ids, positions and a temperature by row are of shape `[R]`."""
        if self.plain is not None:
            return lm_head_sample(states, *self.plain, **options)
        count = len(states)
        options = {"sequence_ids": torch.arange(count, device=states.device), **options}
        by_row = {name: t for name in _OF_ROWS if isinstance(t := options.get(name), Tensor) and t.ndim}

        def draw(logits: Tensor, rows: slice) -> TokenSample:
            return sample_tokens(logits, **(options | {name: t[rows] for name, t in by_row.items()}))

        return TokenSample(*self._by_rows(states, draw))

    def eos_log_prob(
        self, states: Tensor, end_token_ids: Sequence[int], *, suppress_tokens: Sequence[int] = ()
    ) -> Tensor:  # [..., D] -> [...]
        """`fastdiff.ops.eos_log_prob`."""
        options = dict(suppress_tokens=suppress_tokens)
        if self.plain is not None:
            weight, bias = self.plain
            return eos_log_prob(states, weight, end_token_ids, bias, **options)
        found = self._by_rows(states, lambda logits, _: (eos_log_prob_from_logits(logits, end_token_ids, **options),))
        return found[0].view(states.shape[:-1])

    @torch.no_grad()
    def _by_rows(self, states: Tensor, numbers: Callable[[Tensor, slice], Sequence[Tensor | None]]) -> list:
        """The `numbers` of the module's logits `[r, V]`, each of a slice of rows, joined."""
        flat, start, parts = states.flatten(0, -2), 0, []
        step = 1  # the first row tells how wide the logits are
        while start < len(flat) or not parts:
            rows = slice(start, start + step)
            logits = self.module(flat[rows][None])[0]
            parts.append(numbers(logits, rows))
            start, step = start + step, max(1, _LOGITS_AT_ONCE // (logits.shape[-1] * logits.element_size()))
        return [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
