"""The model that a text-to-image run begins with: random weights, or those of a trained DiT that learns to read."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.diffusion.config import CONTINUOUS_LEVELS, DiffusionConfig
from fastdiff.models.dit import DiT
from fastdiff.models.dit_config import DiTConfig
from fastdiff.models.pretrained import read_config
from fastdiff.models.text_to_image import TextToImage, TextToImageConfig
from fastdiff.nn.attention import SelfAttention
from fastdiff.tasks.dit.run import load_run as load_dit
from fastdiff.tasks.kinds import kind_named, kind_of
from fastdiff.tasks.text_to_image.recipe import TextToImageRecipe
from fastdiff.training.run_folder import RunFolder

# of a DiT's shape: what no weight depends on, and what training on texts does not look at
_FREE = ("attention", "class_dropout_prob", "gradient_checkpointing")


@dataclasses.dataclass(frozen=True)
class Start:
    """The diffusion transformer of a run before its first step.

    Attributes:
        config: its shape.
        dit: with trained weights; None for random ones, and where a checkpoint of the run has them.
        class_names: of a trained one, by label.
        labelled: what a checkpoint of the run says of `draws_classes`; None where there is none.
    """

    config: DiTConfig
    dit: DiT | None = None
    class_names: tuple[str, ...] = ()
    labelled: bool | None = None

    def draws_classes(self, names: Sequence[str]) -> bool:
        """Whether the transformer was trained on these classes, by label. Names that are numbers tell nothing."""
        if self.labelled is not None:
            return self.labelled
        numbers = tuple(map(str, range(len(names))))
        return bool(self.class_names) and self.class_names in (tuple(names), numbers)


def load_start(recipe: TextToImageRecipe) -> Start:
    """Reads what `dit_from` names, or the shape in the checkpoint of a run that goes on.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another kind of model, a damaged one, another shape than the recipe's section `model` says, or one
            that was trained for another diffusion; one line.
    """
    if recipe.dit_from is None:
        return Start(recipe.model)
    newest = RunFolder(recipe.training.output_dir).latest() if recipe.training.resume else None
    if newest is not None:
        config, labelled = _stored(newest)
        return Start(_merged(recipe.model, config, str(newest)), labelled=labelled)
    kind = kind_of(recipe.dit_from)
    if kind != "dit":
        raise ValueError(
            f"dit_from: got {recipe.dit_from!r}, {kind_named(kind).about}; expected {kind_named('dit').about}"
        )
    loaded = load_dit(recipe.dit_from, device="cpu")
    config = _merged(recipe.model, loaded.model.config, f"the DiT of dit_from ({recipe.dit_from})")
    _check_diffusion(recipe.diffusion, loaded.diffusion.config, recipe.dit_from)
    knows_no_text = config.null_label or config.conditioning != "adaln"
    if not knows_no_text and recipe.objective.text_dropout_prob:
        raise ValueError(
            f"objective.text_dropout_prob: got {recipe.objective.text_dropout_prob}; the DiT of dit_from was trained "
            "without label dropout and knows no empty condition: set it to 0, and sampling.guidance_scale to 1"
        )
    if not knows_no_text and recipe.sampling.guidance_scale != 1:
        raise ValueError(
            f"sampling.guidance_scale: got {recipe.sampling.guidance_scale}; the DiT of dit_from was trained without "
            "label dropout and knows no empty condition: set it to 1"
        )
    loaded.model.config = config
    for module in loaded.model.modules():
        if isinstance(module, SelfAttention):
            module.backend = config.attention
    return Start(config, loaded.model, loaded.class_names)


def build_model(recipe: TextToImageRecipe, start: Start, text_dim: int, num_states: int, **fields: Any) -> TextToImage:
    """The run's model, for text states of this width, of so many layers; random weights from the recipe's seed.

    With `train` "q_former" the diffusion transformer is frozen. `fields` are further ones of `TextToImageConfig`.
    """
    crosses = start.config.conditioning == "cross_attention"
    config = TextToImageConfig(
        dit=start.config,
        text_dim=text_dim,
        text_states=num_states,
        conditioning="cross_attention" if crosses else "q_former",
        q_former=None if crosses else recipe.q_former,
        # a Q-Former's own projection of one-hot rows is such a table
        text_embedding_dim=start.config.hidden_size if crosses and recipe.text_encoder.name == "learned" else None,
        text_dropout_prob=recipe.objective.text_dropout_prob,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        model = TextToImage(config) if start.dit is None else TextToImage.from_dit(start.dit, config)
    if recipe.train == "q_former":
        model.dit.requires_grad_(False)
    return model


def _stored(checkpoint: Path) -> tuple[DiTConfig, bool]:
    """A checkpoint's shape of the DiT, and whether that draws the data's classes by label."""
    content = read_config(checkpoint)
    values = content.get("dit")
    if not isinstance(values, dict):
        raise ValueError(f"{checkpoint}/config.json: dit: got {values!r}; expected the shape of a DiT")
    try:
        return DiTConfig(**values), bool(content.get("labelled", False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint}/config.json: dit: {error}") from None


def _merged(given: DiTConfig, found: DiTConfig, what: str) -> DiTConfig:
    """A trained shape, with the recipe's choice of what may differ. Raises ValueError where the recipe has another."""
    default = DiTConfig()
    for field in dataclasses.fields(DiTConfig):
        value, theirs = getattr(given, field.name), getattr(found, field.name)
        if field.name == "input_size":
            value, theirs = given.image_size, found.image_size
            if given.input_size == default.input_size:
                continue
        if field.name not in _FREE and value not in (getattr(default, field.name), theirs):
            raise ValueError(
                f"model.{field.name}: got {value}; {what} has {theirs}: leave it out of the recipe, or train another"
            )
    return dataclasses.replace(found, **{name: getattr(given, name) for name in _FREE if _is_free(name, found)})


def _is_free(name: str, found: DiTConfig) -> bool:
    return name != "class_dropout_prob" or found.null_label


def _check_diffusion(given: DiffusionConfig, found: DiffusionConfig, path: str) -> None:
    """Raises ValueError where a network would see other noise, or be asked for another target, than it has learnt."""
    mine, theirs = _learnt(given), _learnt(found)
    for name, value in theirs.items():
        if mine.get(name, value) != value:
            raise ValueError(
                f"diffusion.{name}: got {mine[name]!r}; the DiT of dit_from ({path}) was trained with {value!r}: set "
                "it to that"
            )


def _learnt(config: DiffusionConfig) -> dict[str, Any]:
    """What a network learns to expect of a diffusion: not how continuous times are distributed."""
    levels = config.noise_levels if config.is_discrete else " or ".join(CONTINUOUS_LEVELS)
    facts = {"prediction_type": config.prediction_type, "noise_levels": levels}
    if not config.is_discrete:
        return facts | {"time_scale": config.time_scale or config.num_train_timesteps}
    betas = {}
    if config.noise_levels != "cosine":
        betas = dict(zip(("beta_start", "beta_end"), config.beta_range, strict=True))
    return facts | {"num_train_timesteps": config.num_train_timesteps, "time_scale": config.time_scale} | betas
