"""Checks of what `generate` is given that the model itself would make late, or not make."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.nn.checks import bool_mask, check_token_ids


def check_types(
    model: Any,
    config: Any,
    streamer: Any,
    tokenizer: Any,
    copies: Any,
    rows: int | None,  # of the prompts; None where these are no tensor
) -> None:
    """Raises TypeError, naming the argument, where one is of another kind, ValueError for copies that do not fit."""
    if not all(hasattr(model, name) for name in ("config", "head_weight", "hidden_states")):
        raise TypeError(f"model: got a {type(model).__name__}; expected a fastdiff.models.MaskedDiffusionLM")
    expected = {
        "generation_config": (config, isinstance(config, MaskedDiffusionGenerationConfig),
                              "a MaskedDiffusionGenerationConfig"),
        "streamer": (streamer, callable(streamer), "a function of (token_ids, step)"),
        "tokenizer": (tokenizer, hasattr(tokenizer, "decode"), "a tokenizer, with decode()"),
    }  # fmt: skip
    for name, (given, fits, kind) in expected.items():
        if given is not None and not fits:
            raise TypeError(f"{name}: got a {type(given).__name__}; expected {kind}, or None")
    if copies is None or rows is None:
        return
    fits = isinstance(copies, Sequence) and len(copies) == rows
    if not fits or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in copies):
        raise ValueError(f"copies: got {copies}; expected {rows} numbers of 0 or above, one per row")


def check_prompts(
    model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor | None, config: MaskedDiffusionGenerationConfig
) -> Tensor | None:  # bool [B, P]
    """The mask as bool. Raises TypeError or ValueError, naming the argument."""
    check_token_ids("input_ids", input_ids, "P")
    if not input_ids.numel():
        raise ValueError(
            f"input_ids: got shape {list(input_ids.shape)}, an empty prompt; pass at least one token, such as BoS"
        )
    length = input_ids.shape[1]
    if attention_mask is not None:
        attention_mask = bool_mask("attention_mask", attention_mask, input_ids.shape)
        lengths = attention_mask.sum(1)
        shortest, length = int(lengths.min()), int(lengths.max())
        if shortest == 0:
            row = int(lengths.argmin())
            raise ValueError(f"attention_mask: row {row} has no token, an empty prompt; pass at least one, such as BoS")
    longest = model.config.max_position_embeddings
    if length + config.max_new_tokens > longest:
        raise ValueError(
            f"input_ids: got a prompt of {length} tokens and max_new_tokens = {config.max_new_tokens}; expected at "
            f"most max_position_embeddings = {longest} together: shorten the prompt or ask for fewer tokens"
        )
    vocab = model.config.vocab_size
    for name in ("suppress_tokens", "begin_suppress_tokens", "cfg_keep_tokens"):
        for token in getattr(config, name) or ():
            if token >= vocab:
                raise ValueError(f"{name}: got {token}; expected 0 to {vocab - 1}")
    return attention_mask


def check_encoder_inputs(
    model: torch.nn.Module, batch: int, ids: Tensor | None, mask: Tensor | None, states: Tensor | None
) -> Tensor | None:  # bool [B, M]
    """The encoder's mask as bool. Raises TypeError or ValueError, naming the argument."""
    if ids is None and states is None:
        if mask is not None:
            raise ValueError("encoder_attention_mask: got one without encoder_input_ids or encoder_hidden_states")
        return None
    if ids is not None and states is not None:
        raise ValueError("encoder_input_ids: got encoder_hidden_states too; pass one of the two")
    name = "encoder_hidden_states" if ids is None else "encoder_input_ids"
    if model.config.cross_attention_dim is None:
        raise ValueError(f"{name}: this model has no cross-attention; leave it out, or set cross_attention_dim")
    if ids is not None:
        check_token_ids(name, ids, "M")
        if not model.config.num_encoder_layers:
            raise ValueError(f"{name}: this model has no encoder of its own; pass encoder_hidden_states")
    given = states if ids is None else ids
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got a {type(given).__name__}; expected a torch.Tensor")
    if len(given) != batch or given.ndim != (3 if ids is None else 2) or not given.shape[1]:
        expected = f"[{batch}, states, {model.config.cross_attention_dim}]" if ids is None else f"[{batch}, tokens]"
        raise ValueError(f"{name}: got shape {list(given.shape)}; expected {expected}, one row per prompt, not empty")
    return None if mask is None else bool_mask("encoder_attention_mask", mask, given.shape[:2])


def condition_names(ids: Tensor | None, mask: Tensor | None, states: Tensor | None) -> list[bytes] | None:
    """What tells the conditions of rows apart: their bytes without padding, `[B, M]` ids or `[B, M, D]` states."""
    given = ids if ids is not None else states
    if given is None:
        return None
    given = given.detach().cpu()
    seen = torch.ones(given.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
    return [row[real].contiguous().view(torch.uint8).numpy().tobytes() for row, real in zip(given, seen, strict=True)]
