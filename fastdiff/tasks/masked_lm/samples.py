"""Texts that a run shows: generated from its recipe's prompts, with the step that chose each token."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdiff.data.text_codec import TextCodec
from fastdiff.data.text_parts import TextPart
from fastdiff.device import autocast
from fastdiff.generation import MaskedDiffusionGenerationConfig, TextGenerator
from fastdiff.visualization.text import TextSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN, _PROMPT_TOKENS = 6, 16  # held-out prompts shown, and their length where the text has none of its own


def sample_prompts(codec: TextCodec, given: Sequence[str], held_out: TextPart) -> list[list[int]]:
    """Token ids of the prompts given (an empty one begins a text); without any, of the first held-out ones.

    Documents have no prompts: beginnings are taken at even distances from their tokens.
    """
    if given:
        return [codec.encode_prompt(text) or list(codec.start) for text in given]
    if held_out.conditions is not None:
        shown = range(min(_SHOWN, len(held_out.conditions)))
        return [codec.as_given(held_out.conditions.document(i).tolist()) for i in shown]
    step = max(held_out.targets.num_tokens // _SHOWN, 1)
    starts = range(0, held_out.targets.num_tokens - _PROMPT_TOKENS + 1, step)
    return [codec.as_given(held_out.targets.window(start, _PROMPT_TOKENS).tolist()) for start in starts]


def draw_samples(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    *,
    max_length: int,
    pairs: bool,
    dtype: torch.dtype | None = None,
) -> list[TextSample]:
    """Prompts, continued by a model, each token with the step that chose it.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`.
        prompts: token ids, as of `sample_prompts`.
        options: fields of `MaskedDiffusionGenerationConfig`; max_new_tokens is what training shows of a text where they
            leave it out.
        max_length: tokens of an answer in training, or of a window of documents.
        pairs: whether texts are answers, which end at their first end token, or go on over several documents.
        dtype: what the model computes in; None is the dtype of its weights.

    Raises what `fastdiff.generation.generate` raises.
    """
    taken = 1 if model.config.num_encoder_layers else max(map(len, prompts))  # positions before the new tokens: BoS
    room = min(max_length if pairs else max(max_length - taken, 1), model.config.max_position_embeddings - taken)
    config = MaskedDiffusionGenerationConfig(**{"max_new_tokens": room, **options})
    generator = TextGenerator(model, tokenizer, config)
    texts = [generator.codec.decode(prompt, special_tokens=True) for prompt in prompts]
    with autocast(model.head_weight.device, dtype):
        (drawn,) = generator.generate(texts, prompts, batch_size=len(prompts), cut=pairs, record_steps=True)
    arrow = " → " if pairs else ""
    return [TextSample(sample.prompt + arrow, generator.pieces(sample.tokens), sample.steps) for sample in drawn]
