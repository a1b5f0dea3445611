"""The model that a recipe begins with: random weights in the recipe's shape, or a checkpoint adapted to it."""

import torch
from transformers import PreTrainedTokenizerBase

from fastdiff.data.tokenization import vocabulary_size
from fastdiff.models.masked_lm import MaskedDiffusionLM
from fastdiff.models.masked_lm_config import SIZES, MaskedDiffusionLMConfig
from fastdiff.tasks.masked_lm.recipe import LanguageModelConfig, MaskedLMRecipe
from fastdiff.tasks.masked_lm.run import LanguageModel, load_language_model


def load_start(recipe: MaskedLMRecipe) -> LanguageModel:
    """The checkpoint that a run goes on from, with its tokenizer; of a run, the averaged weights.

    Raises:
        FileNotFoundError, ValueError: missing, of an unknown format, damaged, or without tokenizer or mask token.
    """
    wanted = recipe.model
    fields = {} if wanted.mask_token_id is None else {"mask_token_id": wanted.mask_token_id}
    return load_language_model(wanted.init_from, device="cpu", dtype=torch.float32, **fields)


def build_model(
    recipe: MaskedLMRecipe, tokenizer: PreTrainedTokenizerBase, start: LanguageModel | None = None
) -> MaskedDiffusionLM:
    """The model of a run before its first step, from `start` or with random weights from torch's generator.

    Raises:
        ValueError: fields do not fit.
    """
    format_of_answers = None if recipe.data.sample == "documents" else recipe.data.length_format
    noise = dict(mask_schedule=recipe.diffusion.schedule, mask_schedule_exponent=recipe.diffusion.exponent)
    if start is None:
        return MaskedDiffusionLM(config_of(recipe.model, tokenizer, length_format=format_of_answers, **noise))
    model = adapt(start.model, recipe.model, format_of_answers)
    model.config.update(noise)
    return model


def config_of(wanted: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase, **fields) -> MaskedDiffusionLMConfig:
    """The configuration of a model with random weights; `fields` are those that its recipe's `model` has not."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    shape = SIZES[wanted.size] | {name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None}
    return MaskedDiffusionLMConfig(
        architecture=wanted.architecture,
        vocab_size=vocabulary_size(tokenizer),
        max_position_embeddings=wanted.max_position_embeddings,
        position_embedding=wanted.position_embedding,
        timestep_embedding=wanted.timestep_embedding,
        num_encoder_layers=wanted.num_encoder_layers,
        dropout=wanted.dropout,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
        **fields,
    )


def adapt(
    model: MaskedDiffusionLM,
    wanted: LanguageModelConfig,
    length_format: str | None,
    cross_attention_dim: int | None = None,
) -> MaskedDiffusionLM:
    """The loaded model with the recipe's dropout and, where it asks for one, an encoder that begins at random.

    So a denoiser of plain text becomes a conditional model, as in diffusion-llm: its cross-attention begins at zero.
    `cross_attention_dim` adds cross-attention to states of this width of another model, such as a vision encoder.
    """
    config, added = model.config, {}
    if cross_attention_dim is not None and config.cross_attention_dim is None:
        added = {"cross_attention_dim": cross_attention_dim}
    elif wanted.num_encoder_layers and not config.num_encoder_layers:
        added = {"num_encoder_layers": wanted.num_encoder_layers, "cross_attention_dim": None}
    if added:
        extended = MaskedDiffusionLM(MaskedDiffusionLMConfig.from_dict(config.to_dict() | added))
        extended.load_state_dict(model.state_dict(), strict=False)  # lacks what is new
        model, config = extended, extended.config
    config.length_format, config.dropout = length_format, wanted.dropout
    config.add_special_tokens = False  # from here on texts are what training makes of them
    for module in model.modules():  # blocks and attention keep their own copy
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = wanted.dropout
    return model
