"""Runs of QGFD diffusion models, loaded to sample from or to take their adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastdiff.data import TableSchema
from fastdiff.device import autocast_dtype, check_device
from fastdiff.models.pretrained import read_config
from fastdiff.models.qgfd import QGFDModel
from fastdiff.models.qgfd.backbone import QGFDSelfAttention
from fastdiff.recipes import load_recipe
from fastdiff.tasks.hub import local_folder
from fastdiff.tasks.kinds import kind_named, kind_of
from fastdiff.tasks.qgfd.recipe import QGFDRecipe, QGFDSamplingConfig
from fastdiff.tasks.qgfd.sources import Source, load_source
from fastdiff.tasks.run import Run
from fastdiff.training.checkpoint import load_weights, read_state
from fastdiff.training.run_folder import locate, locate_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.tasks.qgfd.samples import Samples

# of an adapter that is taken from another run
_TRAINED_ANEW = ("label_embedding.", "token_head.", "condition_encoder.")


@dataclass(frozen=True)
class QGFDRun(Run):
    """A QGFD model and what its samples are shown with.

    Attributes:
        facts: of each modality: "class_names"; of a run also "data" and "fingerprint".
        tokenizer: of text, else None.
        schema: of a table, else None.
        sampling: how samples are denoised where nobody says otherwise.
        mixed_precision: as in `TrainingConfig`.
    """

    kind: ClassVar[str] = "qgfd"

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizer: "PreTrainedTokenizerBase | None" = None
    schema: TableSchema | None = None
    sampling: QGFDSamplingConfig = field(default_factory=QGFDSamplingConfig)
    mixed_precision: str = "auto"

    def source_of(self, modality: str) -> Source:
        """The data that a modality was trained on.

        Raises what `load_source` raises, and ValueError where it is not what it was, or this is not a run.
        """
        if self.recipe is None:
            raise ValueError("modality: got a model without a recipe; expected a run, which names its data")
        source = load_source(self.recipe, modality, self.tokenizer)
        if source.data.fingerprint != self.facts[modality]["fingerprint"]:
            raise ValueError(
                f"{modality}_data: the data set {source.data.name} is not what the run {str(self.folder.path)!r} was "
                "trained on: its content has changed; bring the old data back, or train anew"
            )
        return source

    def sample(self, modality: str | None = None, num_samples: int | None = None, **options: Any) -> "Samples":
        """Draws samples of a modality.

        Args:
            modality: None where the model has one.
            num_samples: of each class where there are classes; None is what the run's samples show.
            options: fields of `QGFDSamplingConfig` such as num_inference_steps, guidance_scale and seed.

        Returns:
            `fastdiff.tasks.qgfd.samples.Samples`: `.batch` as the modality's adapter takes it, and `.labels`.

        Raises ValueError for a modality that the model does not have, or options that do not fit.
        """
        from fastdiff.tasks.qgfd.samples import Shown, default_labels, draw_samples

        name = self.model.adapter(modality).modality
        shown = Shown(tuple(self.facts.get(name, {}).get("class_names", ())), self.tokenizer, schema=self.schema)
        count, labels = default_labels(self.model, name, shown, num_samples)
        sampling = QGFDSamplingConfig(**{**vars(self.sampling), **options})
        dtype = autocast_dtype(self.mixed_precision, next(self.model.parameters()).device.type)
        return draw_samples(self.model, name, count, sampling, labels=labels, dtype=dtype)

    def _save(self, directory: Path) -> None:
        names = {name: facts.get("class_names", []) for name, facts in self.facts.items()}
        save_model(directory, self.model, names, [each for each in (self.tokenizer, self.schema) if each is not None])


def save_model(directory: Path, model: QGFDModel, class_names: Mapping[str, Sequence[str]], processors: Sequence[Any]):
    """Writes a model so that it samples by itself: with its classes' names, tokenizer and table columns."""
    model.save_pretrained(directory, extra={"class_names": {name: list(names) for name, names in class_names.items()}})
    for processor in processors:
        processor.save_pretrained(directory)


def load_run(path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None) -> QGFDRun:
    """Loads a run of `task: qgfd`, or a saved model; arguments and errors are those of `fastdiff.load`."""
    device = check_device(device)
    if (kind := kind_of(path)) != "qgfd":
        raise ValueError(f"{path}: got {kind_named(kind).about}; expected a QGFD model; fastdiff.load loads any kind")
    folder, _ = locate(path)
    if not folder.config.is_file():
        source = local_folder(path)
        model = QGFDModel.from_pretrained(source)
        names = read_config(source).get("class_names", {})
        facts = {name: {"class_names": names.get(name, [])} for name in model.adapters}
        return QGFDRun(model.to(device).eval(), Path(source), facts=facts, **_processors(source, model))
    folder, checkpoint = locate_checkpoint(path)
    recipe, state = load_recipe(QGFDRecipe, folder.config), read_state(checkpoint)
    model = QGFDModel.from_pretrained(checkpoint)
    if weights == "ema":
        load_weights(model, checkpoint / "ema.safetensors")
    return QGFDRun(
        model=model.to(device).eval(),
        source=checkpoint,
        folder=folder,
        recipe=recipe,
        step=state["step"],
        facts=state["task"]["modalities"],
        sampling=recipe.sampling,
        mixed_precision=recipe.training.mixed_precision,
        **_processors(checkpoint, model),
    )


def _processors(folder: Path, model: QGFDModel) -> dict[str, Any]:
    """The tokenizer of text and the columns of a table, where the model has these modalities."""
    tokenizer = None
    if "text" in model.adapters:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    schema = TableSchema.from_pretrained(folder) if "tabular" in model.adapters else None
    return {"tokenizer": tokenizer, "schema": schema}


@dataclass(frozen=True)
class Adapters:
    """The adapters of a finished run, for the second stage of latent diffusion."""

    run: QGFDRun

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Of text: token embeddings are of use with it alone."""
        return self.run.tokenizer

    def copy_to(self, model: QGFDModel) -> None:
        """Gives a model's adapters these weights and freezes them; what they condition on stays trainable.

        Raises ValueError where an adapter's shapes or attention differ.
        """
        for name, adapter in model.adapters.items():
            other = self.run.model.adapters[name]
            mine, theirs = adapter.state_dict(), other.state_dict()
            mine, theirs = (
                {key: tensor for key, tensor in state.items() if not key.startswith(_TRAINED_ANEW)}
                for state in (mine, theirs)
            )
            where = f"objective.adapters_from: the {name} adapter of {self.run.source}"
            if {key: t.shape for key, t in mine.items()} != {key: t.shape for key, t in theirs.items()}:
                raise ValueError(
                    f"{where} has other sizes than this recipe's; expected the same section {name}, data and "
                    f"backbone.latent_dim ({self.run.recipe.backbone.latent_dim})"
                )
            taken = [module for key, module in adapter.named_modules() if not f"{key}.".startswith(_TRAINED_ANEW)]
            attends = any(isinstance(module, QGFDSelfAttention) for module in taken)
            if attends and adapter.block_config.qgfd != other.block_config.qgfd:
                raise ValueError(
                    f"{where} diffuses attention as {other.block_config.qgfd}, this recipe's as "
                    f"{adapter.block_config.qgfd}; expected the same: train it with {name}.diffuse_attention false to "
                    "serve any backbone"
                )
            adapter.load_state_dict(theirs, strict=False)
            for key, parameter in adapter.named_parameters():
                if not key.startswith(_TRAINED_ANEW):
                    parameter.requires_grad_(False)


def load_adapters(path: str | Path, recipe: QGFDRecipe) -> Adapters:
    """The adapters of a run. Raises as `load_run`, and ValueError where it lacks a modality of the recipe."""
    run = load_run(path, device="cpu")
    missing = [name for name in recipe.modalities if name not in run.model.adapters]
    if missing:
        raise ValueError(
            f"objective.adapters_from: {path} has the modalities {', '.join(run.model.adapters)}; expected "
            f"{', '.join(recipe.modalities)}"
        )
    return Adapters(run)
