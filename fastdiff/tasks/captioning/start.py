"""The model that a recipe begins with: random weights in its shape, or a language model that learns to look."""

from transformers import PreTrainedTokenizerBase

from fastdiff.errors import section
from fastdiff.models.masked_lm import MaskedDiffusionLM
from fastdiff.models.text_packages import PACKAGED
from fastdiff.tasks.captioning.recipe import CaptioningRecipe
from fastdiff.tasks.kinds import kind_of
from fastdiff.tasks.masked_lm.start import adapt, config_of, load_language_model

_SMOLLM2 = "smollm2"

Start = tuple[MaskedDiffusionLM, PreTrainedTokenizerBase]


def load_start(recipe: CaptioningRecipe) -> Start:
    """The checkpoint that a run goes on from and its tokenizer; of a run, the averaged weights.

    Raises FileNotFoundError, ModuleNotFoundError, ValueError: missing, of an unknown format, damaged, without tokenizer
    or mask token, or conditioned on text.
    """
    wanted = recipe.model
    name = wanted.init_from
    if name != _SMOLLM2 and kind_of(name) == "captioning":
        from fastdiff.tasks.captioning.run import load_run

        run = load_run(name, device="cpu")
        return run.model, run.tokenizer
    with section("model.init_from"):
        folder = str(PACKAGED[_SMOLLM2]().folder) if name == _SMOLLM2 else name
    fields = {} if wanted.mask_token_id is None else {"mask_token_id": wanted.mask_token_id}
    loaded = load_language_model(folder, device="cpu", dtype="float32", **fields)
    if loaded.model.config.num_encoder_layers:
        raise ValueError(
            f"model.init_from: got {name!r}, a model with an encoder of text; expected a language model without one"
        )
    return loaded.model, loaded.tokenizer


def build_model(
    recipe: CaptioningRecipe, tokenizer: PreTrainedTokenizerBase, width: int, start: MaskedDiffusionLM | None
) -> MaskedDiffusionLM:
    """The model of a run before its first step; what is new of it gets random weights from torch's generator.

    Args:
        width: of the states that its cross-attention attends to.
        start: the model that it goes on from; None is random weights.

    Raises ValueError where fields do not fit, or `start` attends to states of another width.
    """
    noise = dict(mask_schedule=recipe.diffusion.schedule, mask_schedule_exponent=recipe.diffusion.exponent)
    length_format = recipe.captions.length_format
    if start is None:
        fields = dict(cross_attention_dim=width, length_format=length_format, **noise)
        return MaskedDiffusionLM(config_of(recipe.model, tokenizer, **fields))
    model = adapt(start, recipe.model, length_format, width)
    if model.config.cross_attention_dim != width:
        raise ValueError(
            f"vision.name: got {recipe.vision.name!r}, whose states are {width} wide; model.init_from "
            f"{recipe.model.init_from!r} looks at states of {model.config.cross_attention_dim}: name its own encoder"
        )
    model.config.update(noise)
    return model
