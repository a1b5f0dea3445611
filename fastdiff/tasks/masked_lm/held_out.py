"""Held-out text of a run: the windows whose likelihood is measured, and the pairs whose answers are."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.data.text_batches import PairBatch, document_windows, pair_windows
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.errors import section
from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe
from fastdiff.tasks.masked_lm.run import LanguageModel


def text_of_run(loaded: LanguageModel, accept_changed: bool = False, data_path: str | None = None) -> TextData:
    """A run's text, in its own tokenizer; the token files of its training where they are still there.

    With `accept_changed` also a text that is not what the run was trained on, with a line on stderr; `data_path` is
    where it lies instead.

    Raises what `fastdiff.data.load_text_data` raises, and ValueError where the text is not what it was.
    """
    from fastdiff.data.text import load_text_data
    from fastdiff.data.tokenization import tokenizer_fingerprint

    recipe, data, config = loaded.recipe, None, loaded.data_config("data", data_path)
    with section("data"):
        if recipe.model.init_from is None:
            data = load_text_data(config, recipe.tokenizer)
        if data is None or tokenizer_fingerprint(data.tokenizer) != tokenizer_fingerprint(loaded.tokenizer):
            data = load_text_data(config, loaded.tokenizer)
    loaded.check_data({"data": data}, accept_changed)
    return data


def windows_of_pairs(
    recipe: MaskedLMRecipe, config: MaskedDiffusionLMConfig, part: TextPart, indices: Tensor, length: int
) -> PairBatch:
    """Pairs at `indices` of a part of the data, as the recipe puts them, in windows of `length` answer tokens."""
    eos = config.eos_token_id
    return pair_windows(
        part,
        indices,
        length,
        recipe.data.length_format,
        eos_token_id=eos if isinstance(eos, int) else eos[0],
        pad_token_id=config.pad_token_id,
        separate_conditions=config.num_encoder_layers > 0,
        bos_token_id=config.bos_token_id,
        mask_token_id=config.mask_token_id,
    )


def without_first_token(maskable: Tensor) -> Tensor:  # bool [B, W]
    """A mask without position 0, for a recipe whose loss leaves it out."""
    return maskable & (torch.arange(maskable.shape[1], device=maskable.device) > 0)


def likelihood_arguments(
    recipe: MaskedLMRecipe, config: MaskedDiffusionLMConfig, data: TextData, num_samples: int | None = None
) -> dict[str, Any]:
    """Arguments of `likelihood_bound`: windows of max_length tokens, evenly spaced over the held-out text.

    `num_samples` are draws; None is the recipe's objective.likelihood_samples.
    """
    part, length = data.held_out, recipe.data.max_length
    count = recipe.objective.likelihood_samples if num_samples is None else num_samples
    arguments: dict[str, Any] = {
        "process": likelihood_process(recipe, config),
        "num_samples": count,
        "seed": recipe.training.seed,
    }
    if part.conditions is None:
        last = part.targets.num_tokens - length
        starts = torch.linspace(0, last, min(count, last + 1), dtype=torch.float64).long()
        sequences = document_windows(part.targets, length, starts)
        # an adapted model's mask token may be an ordinary one: where text has it, it cannot be measured
        maskable = sequences != config.mask_token_id
        if recipe.objective.loss_on_first_token is False:
            maskable = without_first_token(maskable)
        return arguments | {"sequences": sequences, "maskable": maskable}
    windows = windows_of_pairs(recipe, config, part, evenly_spaced(len(part.targets), count), length)
    maskable = windows.maskable & (windows.input_ids != config.mask_token_id)
    if recipe.objective.loss_on_first_token is False:
        maskable = without_first_token(maskable)
    arguments |= {"sequences": windows.input_ids, "maskable": maskable, "attention_mask": windows.attention_mask}
    if windows.condition_ids is not None:
        arguments |= {"encoder_input_ids": windows.condition_ids, "encoder_attention_mask": windows.condition_mask}
    return arguments


def likelihood_process(recipe: MaskedLMRecipe, config: MaskedDiffusionLMConfig) -> MaskedDiffusion:
    """What masks text for the likelihood: any schedule serves, but a timestep embedding knows the recipe's."""
    return MaskedDiffusion(
        MaskedDiffusionConfig(**{**vars(recipe.diffusion), "weighting": "elbo"}), config.mask_token_id
    )


def evenly_spaced(size: int, count: int) -> Tensor:  # int64 [min(size, count)]
    """`count` indices spread over 0 … size - 1, or all of them."""
    return torch.arange(size) if count >= size else torch.arange(count) * size // count
