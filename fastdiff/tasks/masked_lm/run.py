"""Masked diffusion language models, loaded to generate with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastdiff.device import check_device, check_dtype
from fastdiff.errors import one_line
from fastdiff.recipes import load_recipe
from fastdiff.tasks.kinds import kind_named, kind_of
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe
from fastdiff.tasks.run import Run
from fastdiff.training.checkpoint import STATE_FILE, read_state
from fastdiff.training.run_folder import locate, locate_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.generation import Continuation, MaskedDiffusionGenerationConfig, Streamer
    from fastdiff.generation.length import LengthPredictor

DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class LanguageModel(Run):
    """A masked diffusion language model to generate with.

    Attributes:
        tokenizer: its tokenizer; the mask token that counts is `model.config.mask_token_id`. A length calibration lies
            in `source`.
    """

    kind: ClassVar[str] = "masked_lm"

    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)

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
            options: fields of `MaskedDiffusionGenerationConfig`; what is not given is what the run's recipe says.

        Returns:
            A `Continuation` (`.text`, `.tokens`, …) for each sample: those of the first prompt, then of the second, …

        Raises ValueError for options that do not fit and prompts that leave no room; the message names them.
        """
        from fastdiff.generation import MaskedDiffusionGenerationConfig, TextGenerator

        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        recipe = {} if self.recipe is None else self.recipe.sampling.generation
        config = MaskedDiffusionGenerationConfig(**{"max_new_tokens": DEFAULT_NEW_TOKENS, **recipe, **options})
        generator = TextGenerator(self.model, self.tokenizer, config, load_length_predictor(self, config))
        rows = generator.encode(prompts, chat=chat, unconditional=True)
        make_streamer = None if streamer is None else lambda *_: streamer
        batches = generator.generate(
            prompts, rows, num_samples=num_samples, batch_size=batch_size, streamer=make_streamer
        )
        return [sample for batch in batches for sample in batch]

    def _save(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


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
        weights: of a run: the averaged ones ("ema") or those that the optimizer has.
        device: None takes a GPU where there is one.
        dtype: a torch.dtype or its name; None is as stored.
        fields: of the configuration of a checkpoint in a foreign format, such as a mask_token_id that it lacks.

    Raises:
        FileNotFoundError: nothing there, no checkpoint, or no tokenizer.
        ValueError: another kind of run or model, a damaged file, a tokenizer with ids beyond the model's vocabulary, or
            a device that this machine does not have.
    """
    from fastdiff.models.masked_lm import MaskedDiffusionLM
    from fastdiff.models.masked_lm_checkpoints import build_masked_lm, read_model_config
    from fastdiff.models.pretrained import read_tensors

    device, dtype, recipe = check_device(device), check_dtype(dtype), language_model_recipe(path)
    folder, checkpoint = locate(path)
    if recipe is not None:
        folder, checkpoint = locate_checkpoint(path)
    elif (Path(path) / STATE_FILE).is_file():  # a checkpoint taken out of its run
        checkpoint = Path(path)
    source = path if checkpoint is None else checkpoint
    state = None if checkpoint is None else read_state(checkpoint)
    config = read_model_config(source, {})
    tokenizer = _tokenizer(source, config)
    if checkpoint is None:
        model = MaskedDiffusionLM.from_pretrained(source, dtype="auto" if dtype is None else dtype, **fields)
    else:
        name = "ema.safetensors" if weights == "ema" else "model.safetensors"
        tensors, config = read_tensors(checkpoint / name), MaskedDiffusionLM.config_class.from_pretrained(checkpoint)
        model = build_masked_lm(MaskedDiffusionLM, config, tensors, dtype, checkpoint / name)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"{source}: its tokenizer has ids up to {largest}, its model {model.config.vocab_size} ids; expected the "
            "tokenizer that the model was trained with"
        )
    step = None if state is None else state["step"]
    folder = None if recipe is None else folder
    return LanguageModel(model.to(device), Path(source), folder, recipe, step, tokenizer)


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


def _tokenizer(source: str | Path, config: dict[str, Any]) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, Qwen2Tokenizer

    # Dream's own class is code in its repository; what it does is Qwen2's tokenizer.
    is_dream = str(config.get("model_type")).lower() == "dream"
    kind = Qwen2Tokenizer if is_dream else AutoTokenizer
    try:
        options = {} if is_dream else {"trust_remote_code": False}
        return kind.from_pretrained(str(source), **options)
    except Exception as error:  # transformers and tokenizers raise what they like on missing and damaged files
        raise FileNotFoundError(
            f"{source}: no tokenizer that can be loaded (tokenizer.json, tokenizer_config.json): {one_line(error)}"
        ) from error
