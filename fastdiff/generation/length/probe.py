"""One forward pass over prompts with all of their answers masked: what length prediction reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.device import evaluating
from fastdiff.generation.canvas import Canvas, as_seen, padded
from fastdiff.generation.checks import check_encoder_inputs, check_prompts
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.ops import eos_log_prob, lm_head_sample


@dataclass(frozen=True, eq=False)
class Probe:
    """What one forward pass says with a window of W masks behind each prompt; tensors on the model's device.

    Attributes:
        end_log_prob: float32 `[B, W]`, log P(token at offset i is an end token), the mask token left out.
        states: `[B, W, D]`, the last hidden states that predict the window's tokens, before the head.
        prompt_mean: float32 `[B, D]`, mean input embedding of the prompt's real tokens, or of the encoder's input where
            the prompt went through one (None where that was not given).
        end_is_likeliest: bool `[B, W]`, the likeliest token is an end token; only where the rule asks (daedal, rho).
    """

    end_log_prob: Tensor
    states: Tensor
    prompt_mean: Tensor | None
    end_is_likeliest: Tensor | None = None


def check_window(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, window: int) -> Tensor | None:
    """The mask as bool. Raises TypeError or ValueError where a prompt is empty or leaves no room for the window."""
    return check_prompts(model, input_ids, attention_mask, MaskedDiffusionGenerationConfig(max_new_tokens=window))


@torch.no_grad()
def probe_window(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    window: int,
    end_token_ids: tuple[int, ...],
    *,
    likeliest: bool,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
    prompt_mean: Tensor | None,
) -> Probe:
    """See `LengthPredictor.probe`; likeliest: whether `end_is_likeliest` is wanted."""
    mask = check_window(model, input_ids, attention_mask, window)
    input_ids = as_seen(input_ids, model.config.mask_token_id)
    encoder_mask = check_encoder_inputs(model, len(input_ids), None, encoder_attention_mask, encoder_hidden_states)
    canvas = Canvas(input_ids, mask, window, model.config.mask_token_id, model.config.pad_token_id)
    offsets = torch.arange(window, device=input_ids.device) - int(model.config.logit_shift)
    inputs: dict[str, Any] = {"output_columns": (canvas.window_start[:, None] + offsets).clamp(min=0)}
    if model.config.timestep_embedding:
        inputs["timesteps"] = torch.ones(len(input_ids), device=input_ids.device)
    if encoder_hidden_states is not None:
        inputs |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_mask}
    with evaluating(model):
        states = model.hidden_states(canvas.ids, canvas.used, **inputs)
    if prompt_mean is None and encoder_hidden_states is None:
        prompt_mean = mean_embedding(model, input_ids, mask)
    weight, bias, suppressed = model.head_weight, model.head_bias, (model.config.mask_token_id,)
    ends = eos_log_prob(states, weight, end_token_ids, bias, suppress_tokens=suppressed).float()
    if not likeliest:
        return Probe(ends, states, prompt_mean)
    token = lm_head_sample(states, weight, bias, suppress_tokens=suppressed).token
    return Probe(ends, states, prompt_mean, torch.isin(token, torch.tensor(end_token_ids, device=states.device)))


@torch.no_grad()
def prompt_inputs(model: nn.Module, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What `LengthPredictor` takes for prompts of token ids: padded on the right, on the model's device.

    Prompts of a model with an encoder of its own go through it, and the text begins with BoS, as in decoding.
    Raises ValueError for an empty prompt, or where such a model has no BoS token.
    """
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty or not len(prompts):
        raise ValueError(f"prompts: {f'prompt {empty[0]} is empty' if empty else 'got none'}; pass at least one token")
    ids, mask = padded(prompts, model.head_weight.device)
    if not model.config.num_encoder_layers:
        return {"input_ids": ids, "attention_mask": mask}
    if model.config.bos_token_id is None:
        raise ValueError("bos_token_id: the model's config has none, from which a model with encoder starts; set it")
    return {
        "input_ids": torch.full((len(ids), 1), model.config.bos_token_id, device=ids.device),
        "encoder_hidden_states": model.encode(ids, mask),
        "encoder_attention_mask": mask,
        "prompt_mean": mean_embedding(model, ids, mask),
    }


def mean_embedding(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, P] -> float32 [B, D]
    """Mean input embedding of each row's real tokens (mask True or 1; None: all)."""
    real = torch.ones_like(ids) if mask is None else mask.long()
    embedded = model.get_input_embeddings()(ids).float() * real[..., None]
    return embedded.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
