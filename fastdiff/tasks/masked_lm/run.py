"""Masked diffusion language models, loaded to generate with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastdiff.data.tokenization import load_saved_tokenizer, vocabulary_size
from fastdiff.device import check_device, check_dtype
from fastdiff.files import read_json
from fastdiff.recipes import load_recipe
from fastdiff.tasks.hub import local_folder
from fastdiff.tasks.kinds import kind_named, kind_of
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe
from fastdiff.tasks.run import Found, Run, find, going_by_choices
from fastdiff.training.run_folder import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.data.text_codec import TextCodec
    from fastdiff.generation import Continuation, MaskedDiffusionGenerationConfig, Streamer
    from fastdiff.generation.length import LengthPredictor
    from fastdiff.models.masked_lm import MaskedDiffusionLM

DEFAULT_NEW_TOKENS = 64
GENERATION_CONFIG = "generation_config.json"  # transformers' name
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "README.md", "samples.png")  # what a hub's repository has beside
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the second only of repositories without the first


@dataclass(frozen=True)
class LanguageModel(Run):
    """A masked diffusion language model to generate with.

    Attributes:
        tokenizer: its tokenizer; the mask token that counts is `model.config.mask_token_id`. A length calibration lies
            in `source`.
        decoding: how texts are decoded where nobody says otherwise: fields of `MaskedDiffusionGenerationConfig`.
    """

    kind: ClassVar[str] = "masked_lm"

    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)
    decoding: dict[str, Any] = field(default_factory=dict)

    @going_by_choices
    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        num_samples: int = 1,
        batch_size: int = 16,
        chat: bool = False,
        streamer: "Streamer | None" = None,
        **options: Any,
    ) -> "list[Continuation]":
        """Continues prompts, and fills mask tokens in them.

        Args:
            prompts: one or several; "" begins a text.
            num_samples: samples of each prompt.
            batch_size: samples decoded at once; it does not change them.
            chat: each prompt is a user's message, put into the tokenizer's chat template.
            streamer: called after each step of each batch, as streamer(token_ids, step); see
                `fastdiff.generation.generate`.
            options: fields of `MaskedDiffusionGenerationConfig`; what is not given is what the run's recipe says, or
                the saved folder's generation_config.json.

        Returns:
            A `Continuation` (`.text`, `.tokens` as a list of ids, …) for each sample: those of the first prompt, then
            of the second, …

        Raises:
            TypeError, ValueError: options that do not fit, prompts that leave no room or are no texts, or no prompt;
                the message names them.
        """
        from fastdiff.generation import MaskedDiffusionGenerationConfig, TextGenerator
        from fastdiff.generation.config import merged_options

        given = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(given, Sequence) or not all(isinstance(prompt, str) for prompt in given):
            raise TypeError(f"prompts: got {prompts!r}; expected a text or a list of texts")
        prompts = list(given)
        for name, value in (("prompts", len(prompts)), ("num_samples", num_samples), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected at least 1")
        decoding = merged_options(options, with_length(self.decoding, self.model))
        unset = {name: None for name, value in options.items() if value is None}  # what the recipe says is not wanted
        config = MaskedDiffusionGenerationConfig(**decoding | unset)
        generator = TextGenerator(self.model, self.tokenizer, config, load_length_predictor(self, config))
        rows = generator.encode(prompts, chat=chat, unconditional=True)
        make_streamer = None if streamer is None else lambda *_: streamer
        batches = generator.generate(
            prompts, rows, num_samples=num_samples, batch_size=batch_size, streamer=make_streamer
        )
        return [sample for batch in batches for sample in batch]

    @property
    def codec(self) -> "TextCodec":
        """Text to ids and back, as training had them: `run.codec.encode_prompt("…")`, `run.codec.decode(ids)`."""
        from fastdiff.data.text_codec import TextCodec

        return TextCodec(self.tokenizer, self.model.config)

    def usage(self) -> str:
        return 'print(run.generate("", seed=0)[0].text)'

    def _save(self, directory: Path) -> None:
        save_model(directory, self.model, self.tokenizer, self.decoding)
        _copy_calibration(self, directory)


def save_model(
    directory: Path, model: "MaskedDiffusionLM", tokenizer: "PreTrainedTokenizerBase", decoding: Mapping[str, Any]
) -> None:
    """Writes a language model so that it generates by itself: with its tokenizer and ways of decoding."""
    from fastdiff.generation import MaskedDiffusionGenerationConfig

    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    MaskedDiffusionGenerationConfig(**with_length(decoding, model)).save_pretrained(directory)


def with_length(decoding: Mapping[str, Any], model: "MaskedDiffusionLM") -> dict[str, Any]:
    """Decoding options with max_new_tokens: by default 64, or as many whole blocks as fit behind a token."""
    block = decoding.get("block_length") or 1
    most = min(DEFAULT_NEW_TOKENS, model.config.max_position_embeddings - 1) // block * block
    return {"max_new_tokens": max(most, block), **decoding}


def _copy_calibration(run: LanguageModel, directory: Path) -> None:
    """The calibration of lengths beside the checkpoint goes with the weights that it was made for."""
    from fastdiff.files import write_atomically
    from fastdiff.generation.length import CALIBRATION_FILE, load_calibration

    file = run.source / CALIBRATION_FILE
    if not file.is_file() or (directory / CALIBRATION_FILE).resolve() == file.resolve():
        return
    try:
        load_calibration(run.source, "cdf", run.model, run.tokenizer)
    except ValueError:  # of other weights, or damaged
        return
    write_atomically(directory / CALIBRATION_FILE, file.read_bytes())


def saved_decoding(folder: Path) -> dict[str, Any]:
    """The decoding options in generation_config.json of a folder that fastdiff wrote; {} for other projects' models.

    Raises ValueError, naming the file, for options that do not fit.
    """
    from fastdiff.generation import MaskedDiffusionGenerationConfig
    from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig

    file = folder / GENERATION_CONFIG
    ours = read_json(folder / "config.json").get("model_type") == MaskedDiffusionLMConfig.model_type
    if not ours or not file.is_file():
        return {}
    defaults = MaskedDiffusionGenerationConfig.option_defaults()
    stored = {name: value for name, value in read_json(file).items() if name in defaults}
    try:
        MaskedDiffusionGenerationConfig(**stored)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return {name: value for name, value in stored.items() if value != defaults[name] or name == "max_new_tokens"}


def decoding_defaults(path: str | Path, recipe: MaskedLMRecipe | None) -> dict[str, Any]:
    """`LanguageModel.decoding` of what lies at a path, without loading it. `recipe` is its recipe.

    Raises FileNotFoundError and ValueError as `load_language_model`.
    """
    return saved_decoding(local_folder(path, _TEXTS)) if recipe is None else dict(recipe.sampling.generation)


def language_model_recipe(path: str | Path) -> MaskedLMRecipe | None:
    """The recipe of a language model's run or checkpoint; None for another folder or hub id.

    Raises FileNotFoundError, ValueError: a recipe of another kind or version; the message names the file.
    """
    kind = kind_of(path)
    if kind != "masked_lm":
        raise ValueError(
            f"{path}: got {kind_named(kind).about}; expected a language model; fastdiff.load loads any kind"
        )
    folder, _ = locate(path)
    return load_recipe(MaskedLMRecipe, folder.config) if folder.config.is_file() else None


def load_language_model(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **fields: Any,
) -> LanguageModel:
    """Loads a language model and its tokenizer; no code of a checkpoint is ever run.

    Args:
        path: a run's folder (the newest checkpoint), one of its checkpoints, or a folder or hub id of any format that
            `MaskedDiffusionLM.from_pretrained` reads.
        weights: for runs: the averaged ones ("ema") or those that the optimizer has.
        device: None takes a GPU where there is one.
        dtype: a torch.dtype or its name; None is as stored.
        fields: of the configuration of a checkpoint in a foreign format, such as a mask_token_id that it lacks.

    Raises:
        FileNotFoundError: nothing there, no checkpoint, or no tokenizer.
        ValueError: another kind of run or model, a damaged file, a tokenizer with ids beyond the model's vocabulary, or
            a device that this machine does not have.
    """
    device, dtype = check_device(device), check_dtype(dtype)
    found = find_language_model(path, weights)
    recipe = None if found.folder is None else load_recipe(MaskedLMRecipe, found.folder.config)
    model, tokenizer = read_model(found, dtype, **fields)
    decoding = saved_decoding(found.source) if recipe is None else recipe.sampling.generation
    return LanguageModel(
        model=model.to(device), **found.origin, recipe=recipe, tokenizer=tokenizer, decoding=dict(decoding)
    )


def read_model(
    found: Found, dtype: torch.dtype | None = None, **fields: Any
) -> "tuple[MaskedDiffusionLM, PreTrainedTokenizerBase]":
    """The language model that was found, in eval mode on the CPU, and its tokenizer.

    Raises FileNotFoundError and ValueError as `load_language_model`.
    """
    from fastdiff.models.masked_lm import MaskedDiffusionLM
    from fastdiff.models.masked_lm_checkpoints import build_masked_lm, own_config, read_model_config
    from fastdiff.models.weights import read_tensors

    source = found.source
    config = read_model_config(source, {})
    tokenizer = load_saved_tokenizer(source, str(config.get("model_type")))
    if found.state is None:
        model = MaskedDiffusionLM.from_pretrained(source, dtype="auto" if dtype is None else dtype, **fields)
    else:
        file = source / found.weights_file
        tensors = read_tensors(file)
        model = build_masked_lm(MaskedDiffusionLM, own_config(config, tensors, source), tensors, dtype, file)
    size = vocabulary_size(tokenizer)
    if size > model.config.vocab_size:
        raise ValueError(
            f"{source}: its tokenizer has ids up to {size - 1}, its model {model.config.vocab_size} ids; expected the "
            "tokenizer that the model was trained with"
        )
    return model, tokenizer


def find_language_model(path: str | Path, weights: str = "ema") -> Found:
    """Where a language model lies; one on the hub is downloaded. Raises as `load_language_model`."""
    found = find(path, "masked_lm", weights, (*_TEXTS, _WEIGHTS[0]))
    if not Path(path).exists() and not any(found.source.glob(_WEIGHTS[0])):
        found = find(path, "masked_lm", weights, (*_TEXTS, _WEIGHTS[1]))
    return found


def load_length_predictor(
    loaded: LanguageModel, config: "MaskedDiffusionGenerationConfig", length_format: str | None = None
) -> "LengthPredictor | None":
    """What length="auto" is decoded with: the rule "cdf", by the calibration beside the checkpoint where there is one.

    None for length="fixed". Without a calibration the predictor takes the model at its word, in a window of
    max_new_tokens; a calibrated one reads the window that it was calibrated on. `length_format` is that of a checkpoint
    whose config names none.

    Raises:
        ValueError: the calibration was made for another checkpoint or tokenizer, or from too few pairs for the coverage
            asked; the model's config names no length format or end token.
    """
    from fastdiff.generation.length import CALIBRATION_FILE, LengthPredictor, load_calibration

    if config.length == "fixed":
        return None
    calibration, window = None, config.max_new_tokens
    if (loaded.source / CALIBRATION_FILE).is_file():
        calibration = load_calibration(loaded.source, "cdf", loaded.model, loaded.tokenizer)
        window = calibration.window
    return LengthPredictor(
        loaded.model, window=window, length_format=length_format, calibration=calibration, coverage=config.coverage
    )
