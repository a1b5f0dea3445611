"""A finished (or running) run, loaded to sample from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff.device import autocast_dtype, check_device
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.sampling import sample, samplers_for
from fastdiff.errors import one_line
from fastdiff.models.dit import DiT
from fastdiff.recipes import load_recipe
from fastdiff.tasks.kinds import recipe_kind
from fastdiff.training.checkpoint import STATE_FILE, load_weights, read_state, step_of
from fastdiff.training.diffusion import DiTRecipe, SamplingConfig
from fastdiff.training.masked_lm_recipe import MaskedLMRecipe
from fastdiff.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.generation.config import MaskedDiffusionGenerationConfig
    from fastdiff.generation.length import LengthPredictor
    from fastdiff.models.masked_lm import MaskedDiffusionLM


@dataclass(frozen=True)
class Run:
    """A run's model and how it samples.

    Attributes:
        folder: the run's folder.
        checkpoint: the checkpoint loaded.
        recipe: what it was trained by.
        model: the DiT, in eval mode.
        diffusion: what it predicts.
        class_names: by label.
    """

    folder: RunFolder
    checkpoint: Path
    recipe: DiTRecipe
    model: DiT
    diffusion: Diffusion
    class_names: tuple[str, ...]

    @property
    def step(self) -> int:
        """Optimizer steps behind the checkpoint."""
        return step_of(self.checkpoint)

    def labels(self, text: str | None) -> list[int]:
        """Labels from "0,3,7" or class names; None is every class once.

        Raises:
            ValueError: not a class of this run.
        """
        return list(range(len(self.class_names))) if text is None else parse_labels(text, self.class_names)

    def draw(
        self, labels: Sequence[int] | Tensor, sampling: SamplingConfig, *, batch_size: int = 100, progress: bool = False
    ) -> Tensor:
        """Samples of these labels: float32 [N, C, H, W] on the CPU.

        Sample i depends on its label and on seed + i alone, whatever `batch_size` (rounding aside). The network runs
        in the precision that the run would train in on this device (`fastdiff.device.autocast_dtype`).

        Raises:
            ValueError: a sampler that does not fit the run, or a label out of range.
        """
        fitting = samplers_for(self.recipe.diffusion)
        if sampling.sampler not in (None, *fitting):
            raise ValueError(f"sampler is {sampling.sampler!r}; this run's diffusion needs one of {', '.join(fitting)}")
        labels, parts = torch.as_tensor(labels), []
        device = next(self.model.parameters()).device
        with tqdm(total=len(labels), unit="image", desc="sampling", disable=not progress) as bar:
            for start in range(0, len(labels), batch_size):
                part = labels[start : start + batch_size]
                images = sample(
                    self.model,
                    self.diffusion,
                    part.to(device),
                    sampler=sampling.sampler,
                    num_inference_steps=sampling.num_inference_steps,
                    seed=sampling.seed + start,
                    guidance_scale=sampling.guidance_scale,
                    guidance_interval=sampling.guidance_interval,
                    autocast_dtype=autocast_dtype(self.recipe.training.mixed_precision, device.type),
                )
                parts.append(images.cpu())
                bar.update(len(part))
        return torch.cat(parts)


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Labels from "0,3,7" or class names, in the order given. Raises ValueError for what is no class."""
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part in class_names:
            labels.append(class_names.index(part))
        elif part.isdecimal() and int(part) < len(class_names):
            labels.append(int(part))
        else:
            raise ValueError(
                f"--labels has {part!r}; expected 0 to {len(class_names) - 1} or one of {', '.join(class_names)}"
            )
    return labels


def load_run(
    path: str | Path, *, weights: Literal["ema", "model"] = "ema", device: torch.device | str | None = None
) -> Run:
    """Loads a run's newest checkpoint, or the one named.

    Args:
        path: a run's folder, or one of its checkpoints.
        weights: the averaged ones ("ema") or those that the optimizer has.
        device: None takes a GPU where there is one.

    Raises:
        FileNotFoundError: no run or no checkpoint there.
        ValueError: a checkpoint cut short or of another model, or a device that this machine does not have.
    """
    device = check_device(device)
    folder, _ = _place(Path(path))
    if not Path(path).is_dir():
        raise FileNotFoundError(f"run {str(path)!r} is not a folder; expected the output_dir of a run")
    if folder.config.is_file() and (kind := run_kind(path)) != "dit":
        advice = {
            "masked_lm": "of a language model; python -m fastdiff.generate draws from it",
            "qgfd": "of a QGFD model; fastdiff.training.qgfd_runs.load_qgfd_run loads it",
        }
        raise ValueError(f"{path} is a run {advice[kind]}")
    recipe = load_recipe(DiTRecipe, folder.config)
    folder, checkpoint = locate_checkpoint(path)
    state = read_state(checkpoint)
    model = DiT(recipe.model)
    load_weights(model, checkpoint / ("ema.safetensors" if weights == "ema" else "model.safetensors"))
    return Run(
        folder,
        checkpoint,
        recipe,
        model.to(device).eval(),
        Diffusion(recipe.diffusion),
        tuple(state["task"]["class_names"]),
    )


@dataclass(frozen=True)
class LanguageModel:
    """A masked diffusion language model to generate with.

    Attributes:
        model: in eval mode.
        tokenizer: its tokenizer; the mask token that counts is `model.config.mask_token_id`.
        step: optimizer steps behind it; None for what is not a checkpoint of fastdiff.train.
        folder: the run's folder, or None.
        recipe: what the run was trained by, or None.
        source: the folder (or hub id) that the weights came from; a length calibration lies there.
    """

    model: "MaskedDiffusionLM"
    tokenizer: "PreTrainedTokenizerBase"
    step: int | None = None
    folder: RunFolder | None = None
    recipe: MaskedLMRecipe | None = None
    source: Path = Path()


def run_kind(path: str | Path) -> Literal["dit", "masked_lm", "qgfd"]:
    """What a run's folder or checkpoint generates, by its config.yaml; any other path or hub id is a language model's.

    Raises ValueError for a config.yaml that is no recipe, and for a run that generates nothing: a length head's.
    """
    folder, _ = _place(Path(path))
    if folder.config.is_file():
        kind = recipe_kind(folder.config)
        if kind == "length_head":
            raise ValueError(
                f"{path} is a run of a length head, which generates nothing: it is for "
                "fastdiff.training.runs.load_length_head and LengthPredictor; name the language model's run here"
            )
        return kind
    return "dit" if folder.checkpoints.is_dir() else "masked_lm"  # then load_run says what is missing


def language_model_recipe(path: str | Path) -> MaskedLMRecipe | None:
    """The recipe of a language model's run or checkpoint; None for another folder or hub id.

    Raises FileNotFoundError, ValueError: a recipe of another kind or version; the message names the file.
    """
    kind = run_kind(path)
    if kind != "masked_lm":
        what = "a diffusion transformer" if kind == "dit" else "a QGFD model"
        raise ValueError(f"{path} is a run of {what}; python -m fastdiff.sample draws from it")
    folder, _ = _place(Path(path))
    return load_recipe(MaskedLMRecipe, folder.config) if folder.config.is_file() else None


def load_language_model(
    path: str | Path,
    *,
    weights: Literal["ema", "model"] = "ema",
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
    from fastdiff.models.masked_lm_checkpoints import build_masked_lm, read_model_config, read_tensors

    device, dtype, recipe = check_device(device), _dtype(dtype), language_model_recipe(path)
    folder, checkpoint = _place(Path(path))
    if recipe is not None:
        checkpoint = _newest(folder, checkpoint)
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
    return LanguageModel(model.to(device), tokenizer, step, None if recipe is None else folder, recipe, Path(source))


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


def load_length_head(
    path: str | Path, model: "MaskedDiffusionLM", *, weights: Literal["ema", "model"] = "ema"
) -> nn.Module:
    """Loads the length head that a run of recipes/eos_head_*.yaml trained on the states of `model`.

    Args:
        path: the run's folder (the newest checkpoint), one of its checkpoints, or a folder of `save_length_head`.
        model: the language model that the head will serve.
        weights: of a checkpoint: the averaged ones ("ema") or those that the optimizer has.

    Returns:
        An `EndClassifier` or `LengthRegressor` in eval mode on the model's device; its `kind` says which.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint yet.
        ValueError: no length head, a damaged file, or a head that was trained on another model.
    """
    from fastdiff.generation.length.calibration import model_hash
    from fastdiff.models.length_heads import read_length_head

    if not Path(path).is_dir():
        raise FileNotFoundError(f"length head {str(path)!r} is not a folder; expected a run of recipes/eos_head_*.yaml")
    folder, checkpoint = _place(Path(path))
    if folder.config.is_file():
        if recipe_kind(folder.config) != "length_head":
            raise ValueError(f"{path} is not a run of a length head; expected one of recipes/eos_head_*.yaml")
        checkpoint = _newest(folder, checkpoint)
    elif (Path(path) / STATE_FILE).is_file():
        checkpoint = Path(path)
    file = "model.safetensors"
    if checkpoint is not None:
        read_state(checkpoint)  # its files are whole
        file = "ema.safetensors" if weights == "ema" else file
    head, about = read_length_head(path if checkpoint is None else checkpoint, file)
    if about.get("model_hash") != model_hash(model):
        raise ValueError(
            f"{path}: a length head for another model than this one (it was trained on {about.get('run')}); pass that "
            "model, or train the head anew on this one"
        )
    return head.to(next(model.parameters()).device)


def _place(path: Path) -> tuple[RunFolder, Path | None]:
    """The run's folder that a path means, and the checkpoint where it names one."""
    is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step_")
    return RunFolder(path.parent.parent if is_checkpoint else path), path if is_checkpoint else None


def locate_checkpoint(path: str | Path) -> tuple[RunFolder, Path]:
    """A run's folder and its newest checkpoint, or the one that the path names. Raises FileNotFoundError for none."""
    folder, checkpoint = _place(Path(path))
    return folder, _newest(folder, checkpoint)


def _newest(folder: RunFolder, checkpoint: Path | None) -> Path:
    checkpoint = folder.latest() if checkpoint is None else checkpoint
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder.checkpoints} has no checkpoint yet; train longer, or set training.checkpoint_every lower"
        )
    return checkpoint


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    dtype = given if isinstance(given, torch.dtype | None) else getattr(torch, given, None)
    if given is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {given!r}; expected float32, bfloat16 or float16")
    return dtype


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
