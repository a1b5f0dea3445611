"""The model that a recipe begins with: random weights in the recipe's shape, or a checkpoint adapted to it."""

import torch
from transformers import PreTrainedTokenizerBase

from fastdiff.models.masked_lm import MaskedDiffusionLM
from fastdiff.models.masked_lm_config import SIZES, MaskedDiffusionLMConfig
from fastdiff.training.masked_lm_recipe import LanguageModelConfig, MaskedLMRecipe
from fastdiff.training.run_folder import RunFolder


def checkpoint_folder(path: str) -> str:
    """The newest checkpoint of a run's folder; anything else as it is."""
    newest = RunFolder(path).latest()
    return str(newest) if newest is not None else path


def load_raw_tokenizer(recipe: MaskedLMRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint that a run goes on from, as it is: special tokens are those of the model."""
    from transformers import AutoTokenizer

    name = checkpoint_folder(recipe.model.init_from)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.init_from {recipe.model.init_from!r} has no tokenizer that can be loaded ({reason}); save one "
            "beside the weights"
        ) from None


def build_model(recipe: MaskedLMRecipe, tokenizer: PreTrainedTokenizerBase) -> MaskedDiffusionLM:
    """The model of a run before its first step; random weights come from torch's generator.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing or of an unknown format, or fields do not fit.
    """
    wanted = recipe.model
    format_of_answers = None if recipe.data.sample == "documents" else recipe.data.length_format
    noise = dict(mask_schedule=recipe.diffusion.schedule, mask_schedule_exponent=recipe.diffusion.exponent)
    if wanted.init_from is None:
        return MaskedDiffusionLM(_config(wanted, tokenizer, length_format=format_of_answers, **noise))
    model = MaskedDiffusionLM.from_pretrained(checkpoint_folder(wanted.init_from), dtype=torch.float32)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"model.init_from {wanted.init_from!r} has {model.config.vocab_size} token embeddings, its tokenizer "
            f"{len(tokenizer)} tokens; expected at most as many"
        )
    model = _adapt(model, wanted, format_of_answers)
    model.config.update(noise)
    return model


def _config(wanted: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase, **fields) -> MaskedDiffusionLMConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    shape = SIZES[wanted.size] | {name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None}
    return MaskedDiffusionLMConfig(
        architecture=wanted.architecture,
        vocab_size=len(tokenizer),
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


def _adapt(model: MaskedDiffusionLM, wanted: LanguageModelConfig, length_format: str | None) -> MaskedDiffusionLM:
    """The loaded model with the recipe's dropout and, where it asks for one, an encoder that begins at random.

    A denoiser trained on plain text becomes a conditional model so (system 002): its cross-attention begins at zero.
    """
    config = model.config
    if wanted.num_encoder_layers and not config.num_encoder_layers:
        fields = config.to_dict() | {"num_encoder_layers": wanted.num_encoder_layers, "cross_attention_dim": None}
        extended = MaskedDiffusionLM(MaskedDiffusionLMConfig.from_dict(fields))
        extended.load_state_dict(model.state_dict(), strict=False)  # lacks what is new
        model, config = extended, extended.config
    config.length_format, config.dropout = length_format, wanted.dropout
    for module in model.modules():  # blocks and attention keep their own copy
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = wanted.dropout
    return model
