"""QGFD attention in transformers' models: `model.set_attn_implementation("qgfd")`.

Importing this module registers the name. Settings come from the model's config, a plain dict that is saved with it:
`config.qgfd = {"steps": 1, "alpha": 0.5, …}` (`fastdiff.nn.QGFDSettings`); without it they are those of the
repository rajboopathiking/TorchDire. The config of the attention module counts; a model of several parts has several
configs, and `use_qgfd` writes to them all.

Self-attention is diffused, cross-attention is plain. Masks of padding and causal ones never become L x L tensors.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from fastdiff.nn.qgfd import DiffusedValues, QGFDSettings, attended_of_float, diffused_attention

__all__ = [
    "NAME",
    "QGFDCache",
    "QGFDLayer",
    "mark_cross_attention",
    "qgfd_attention_forward",
    "qgfd_mask",
    "register",
    "use_qgfd",
]

NAME = "qgfd"

# Arguments that models pass but that do not affect attention, or (a window) that are in the mask already.
_IGNORED_ARGUMENTS = frozenset(
    "position_ids cache_position use_cache return_dict output_hidden_states output_router_logits num_items_in_batch"
    " sliding_window deterministic position_embeddings layer_idx".split()
)
# Arguments by which a module's forward takes states of another sequence.
_OTHER_STATES = frozenset("key_value_states encoder_hidden_states cross_attention_states context keys key".split())


def register() -> None:
    """Makes "qgfd" known to transformers; safe to call again."""
    AttentionInterface.register(NAME, qgfd_attention_forward)
    AttentionMaskInterface.register(NAME, qgfd_mask)


def use_qgfd(model: PreTrainedModel, **settings: Any) -> None:
    """Switches a model to QGFD attention: sets the implementation, `settings` in each config, marks cross-attention.

    Settings that a config has already (a model that was saved with them) stay, but for those given here.

    Raises ValueError for settings that are unknown or do not fit (`fastdiff.nn.QGFDSettings`).
    """
    QGFDSettings.from_dict(settings, "use_qgfd")
    model.set_attn_implementation(NAME)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            before = getattr(module.config, NAME, None) or {}
            setattr(module.config, NAME, before | settings)
    mark_cross_attention(model)


# ---------------------------------------------------------------------------------------------------- masks


def qgfd_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,  # bool [B, keys], True = attend
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """The mask that `qgfd_attention_forward` reads, instead of transformers' `sdpa_mask`.

    - None: no padding; whether it is causal is the module's to say, as with SDPA.
    - bool [B, L_k]: causal, with these keys.
    - bool [B, 1, 1, L_k]: all of these keys.
    - bool [B, 1, L_q, L_k]: any other (windows, chunks, packed sequences, overlays, static caches).
    """
    within = local_size is None or kv_length < local_size  # a window that is longer than the keys hides nothing
    local = local_size is not None
    # in a static cache the last query does not see the last key
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    causal = allow_is_causal_skip and within and aligned and (local or mask_function is causal_mask_function)
    full = allow_is_bidirectional_skip and within and (local or mask_function is bidirectional_mask_function)
    if not (causal or full) or (attention_mask is not None and attention_mask.ndim != 2):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **others,
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    padding = padding[:, kv_offset : kv_offset + kv_length].bool().expand(batch_size, -1)
    if not torch.compiler.is_compiling() and bool(padding.all()):
        return None
    return padding if causal else padding[:, None, None]


# ---------------------------------------------------------------------------------------------------- attention


def qgfd_attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, L_q, d]
    key: Tensor,  # [B, H_kv, L_k, d]
    value: Tensor,  # [B, H_kv, L_k, d]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:  # [B, L_q, H, d]
    """transformers' attention function of the name "qgfd".

    Raises:
        ValueError: unknown settings; an argument of the model that may change attention and that QGFD attention does
            not have (position_bias, softcap, s_aux, head_mask, …); a cache where the settings allow none;
            cross-attention that cannot be told from self-attention (`mark_cross_attention`).
    """
    settings = QGFDSettings.from_dict(getattr(getattr(module, "config", None), NAME, None), f"config.{NAME}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if settings.plain or _attends_across(module, query, key, causal):
        mask = _for_sdpa(attention_mask, causal, query, key)
        given = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, mask, **given, **others)
    _refuse_unknown(others)
    masks = _read_mask(attention_mask, causal, query, key)
    diffused = getattr(key, "qgfd_values", None)
    if query.shape[2] != key.shape[2] or diffused is not None:
        _check_cached(settings, masks, query, key)
        if diffused is not None:
            value = diffused.update(key, value, settings, masks["key_mask"])
            settings = QGFDSettings(steps=0)
    out = diffused_attention(query, key, value, settings, dropout_p=dropout, scale=scaling, **masks)
    return out.transpose(1, 2).contiguous(), None


def _for_sdpa(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """What `qgfd_mask` made, as transformers' SDPA function reads it."""
    queries, keys = query.shape[2], key.shape[2]
    padded = mask is not None and mask.ndim == 2
    if not padded and (mask is not None or not causal or queries in (1, keys)):
        return mask
    lower = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return mask[:, None, None] & lower if padded else lower


def _refuse_unknown(others: dict[str, Any]) -> None:
    given = [
        name
        for name, value in others.items()
        if value is not None and value is not False and name not in _IGNORED_ARGUMENTS
    ]
    if "output_attentions" in given:
        raise ValueError('output_attentions: got True; "qgfd" never makes the weights: use attn_implementation="eager"')
    if given:
        raise ValueError(
            f'the model gives its attention {", ".join(given)}, which "qgfd" does not have; expected a model without'
            ' (use model.set_attn_implementation("eager") for this one)'
        )


def _read_mask(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> dict[str, Any]:
    """Keyword arguments of `diffused_attention`."""
    if mask is None:
        return {"key_mask": None, "is_causal": causal}
    if mask.ndim == 2:
        if mask.dtype != torch.bool or not causal:
            raise ValueError(
                f"attention_mask: got {mask.dtype} {list(mask.shape)} in a module with is_causal={causal}; expected"
                " transformers' own, or a bool mask [B, 1, L_q, L_k], True = attend"
            )
        return {"key_mask": mask, "is_causal": True}
    if mask.dtype != torch.bool:
        mask = attended_of_float("attention_mask", mask)
    if mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1 and (query.shape[2] > 1 or key.shape[2] == 1):
        return {"key_mask": mask[:, 0, 0].expand(query.shape[0], -1), "is_causal": False}
    return {"key_mask": None, "is_causal": False, "attn_mask": mask}


def _check_cached(settings: QGFDSettings, masks: dict[str, Any], query: Tensor, key: Tensor) -> None:
    """Raises where keys and values of a cache cannot be diffused."""
    sizes = f"L_q = {query.shape[2]}, L_k = {key.shape[2]}"
    if settings.transition == "attention":
        raise ValueError(
            f"QGFD's transition 'attention' with a KV cache ({sizes}): each new token changes what the others attend"
            " to; expected use_cache=False, or transition 'key'"
        )
    if not masks["is_causal"]:
        raise ValueError(
            f"QGFD with a KV cache ({sizes}) and a mask that is not causal over all keys (a window, a static cache);"
            " expected a DynamicCache or QGFDCache without windows, or use_cache=False"
        )


# ---------------------------------------------------------------------------------------------------- cross-attention


def _attends_across(module: nn.Module, query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether keys come from another sequence than queries."""
    marked, kind = getattr(module, "is_cross_attention", None), type(module)
    if marked is True or (marked is None and "Cross" in kind.__name__):
        return True
    if causal:  # a cache makes lengths differ here
        return False
    if query.shape[2] != key.shape[2]:
        return True
    if marked is False or not _takes_other_states(kind):
        return False
    if hasattr(module, "is_decoder"):  # one class for both, as in BART: a decoder's self-attention is causal
        return bool(module.is_decoder)
    raise ValueError(
        f"{kind.__name__} may attend within a sequence or across two, and does not say which; expected"
        " is_cross_attention on it: call fastdiff.integrations.transformers.mark_cross_attention(model)"
    )


@torch.compiler.assume_constant_result  # the compiler does not see into signatures
def _takes_other_states(kind: type[nn.Module]) -> bool:
    return _has_other_states(kind)


@cache
def _has_other_states(kind: type[nn.Module]) -> bool:
    return not _OTHER_STATES.isdisjoint(inspect.signature(kind.forward).parameters)


def mark_cross_attention(model: nn.Module) -> list[str]:
    """Sets `is_cross_attention` on the attention modules of classes that serve as both and do not say which.

    Cross-attention is what has "cross", "encoder_attn" or "_to_" (SAM's tokens to image) in its name. Returns those
    names, to be looked at.
    """
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "config") or hasattr(module, "is_decoder") or hasattr(module, "is_cross_attention"):
            continue
        if "Attention" in type(module).__name__ and _takes_other_states(type(module)):
            module.is_cross_attention = any(part in name.lower() for part in ("cross", "encoder_attn", "_to_"))
            found += [name] * module.is_cross_attention
    return found


# ---------------------------------------------------------------------------------------------------- cache


class QGFDCache(DynamicCache):
    """A DynamicCache that keeps transition "key"'s diffused values beside keys and values, for full causal attention.

    `model.generate(…, past_key_values=QGFDCache(model.config))`. Another cache gives the same tokens and makes the
    diffused values of all rows again at each of them. Beam search, cropping and the selection of rows are those of
    DynamicCache.
    """

    def __init__(self, config: PreTrainedConfig | None = None) -> None:
        super().__init__(config=config)
        if self.layer_class_to_replicate is not None:
            self.layer_class_to_replicate = QGFDLayer
        self.layers = [QGFDLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class QGFDLayer(DynamicLayer):
    """One layer of a `QGFDCache`; the attention function finds it through the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.diffused = DiffusedValues()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        keys = keys.view(keys.shape)  # what is stored stays a plain tensor
        keys.qgfd_values = self.diffused
        return keys, values

    def offload(self) -> None:
        super().offload()
        self.diffused.apply(lambda u: u.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self.diffused.apply(lambda u: u.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        self.diffused.hops = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.diffused.apply(lambda u: u.index_select(0, beam_idx.to(u.device)))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self.diffused.apply(lambda u: u[:, :, : self.get_seq_length()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.diffused.apply(lambda u: u.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.diffused.apply(lambda u: u[indices, ...])


register()
