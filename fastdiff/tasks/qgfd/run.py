"""Runs of QGFD diffusion models, loaded to sample from or to take their adapters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastdiff.data import TableSchema
from fastdiff.data.tokenization import load_saved_tokenizer
from fastdiff.device import autocast_dtype, check_device
from fastdiff.diffusion.sampler_config import check_sampler
from fastdiff.models.pretrained import read_config
from fastdiff.models.qgfd.backbone import QGFDSelfAttention
from fastdiff.models.qgfd.model import QGFDModel
from fastdiff.recipes import load_recipe
from fastdiff.tasks.labels import labels_of
from fastdiff.tasks.qgfd.recipe import QGFDRecipe, QGFDSamplingConfig
from fastdiff.tasks.qgfd.sources import Source, load_source
from fastdiff.tasks.run import Run, check_count, find, going_by_choices, sampling_keys, stored_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.tasks.qgfd.decoded import QGFDSamples

# of an adapter that is taken from another run
_TRAINED_ANEW = ("label_embedding.", "token_head.", "condition_encoder.")


@dataclass(frozen=True)
class QGFDRun(Run):
    """A QGFD model and what its samples are shown with.

    Attributes:
        facts: of each modality: "class_names".
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

    def source_of(self, modality: str, accept_changed: bool = False, data_path: str | None = None) -> Source:
        """The data that a modality was trained on; with `accept_changed` also other data, with a line on stderr.

        `data_path` is where it lies instead of where the recipe says.

        Raises what `load_source` raises, and ValueError where it is not what it was, or this is not a run.
        """
        if self.recipe is None:
            raise ValueError("modality: got a model without a recipe; expected a run, which names its data")
        section = f"{modality}_data"
        recipe = replace(self.recipe, **{section: self.data_config(section, data_path)})
        source = load_source(recipe, modality, self.tokenizer)
        self.check_data({section: source.data}, accept_changed)
        return source

    @going_by_choices
    def sample(
        self,
        modality: str | None = None,
        num_samples: int | None = None,
        *,
        labels: "Sequence[int | str] | int | str | None" = None,
        prompts: Sequence[str] | str | None = None,
        length: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> "QGFDSamples":
        """Draws samples of a modality.

        Args:
            modality: "text", "image", "audio", "video" or "tabular"; None where the model has one.
            num_samples: for each label where there are classes, for each prompt where there are prompts, else in all;
                None is what the run's own samples show (one for each prompt).
            labels: of a modality with classes: labels or class names; None is every class once.
            prompts: of text that is conditioned on a text, which needs them: one or several.
            length: of each sample, in tokens, audio samples or frames; None is that of training.
            progress: shows a bar.
            options: fields of `QGFDSamplingConfig`: num_inference_steps, guidance_scale, guidance_interval, seed, and
                those of the sampler (`fastdiff.diffusion.SamplerOptions`). What is not given is what the run's recipe
                says. Sample i of the call has the seed `seed` + i.

        Returns:
            `QGFDSamples`: `.samples` are PIL images, texts, waveforms, lists of frames or a table; `.batch` the same as
            tensors.

        Raises:
            ValueError: a modality, class, prompt, length or option that does not fit; before any work.
            TypeError: an option that there is not, or a value of another type; before any work, too.
        """
        from fastdiff.tasks.qgfd.decoded import decoded
        from fastdiff.tasks.qgfd.samples import Shown, default_labels, draw_samples, encode_prompts, label_count

        name = self.model.adapter(modality).modality
        for option, value in (("num_samples", num_samples), ("length", length)):
            check_count(option, value)
        sampling = self.sampling.replaced(options)
        check_sampler(sampling, self.model.diffusion)
        conditional, names = self._takes_prompts(name), tuple(self.facts.get(name, {}).get("class_names", ()))
        self._check_conditions(name, labels, prompts)
        given = encode_prompts(self.tokenizer, [prompts] if isinstance(prompts, str) else prompts) if prompts else None
        shown = Shown(names, self.tokenizer, conditional, self.schema, prompts=given)
        each = num_samples or sampling.num_samples
        count, drawn = default_labels(self.model, name, shown, each)
        if given is not None:
            count = len(given["condition_ids"]) * (num_samples or 1)
            given = {field: value.repeat_interleave(num_samples or 1, 0) for field, value in given.items()}
        elif labels is not None:
            drawn = torch.tensor(labels_of(labels, names)).repeat_interleave(count // label_count(self.model, name))
            count = len(drawn)
        dtype = autocast_dtype(self.mixed_precision, next(self.model.parameters()).device.type, self.model)
        samples = draw_samples(
            self.model, name, count, sampling, labels=drawn, prompts=given, length=length, dtype=dtype,
            progress=progress,
        )  # fmt: skip
        return decoded(samples, name, shown, self.model.adapter(name).config)

    def _takes_prompts(self, modality: str) -> bool:
        return modality == "text" and self.model.adapter(modality).config.conditional

    def _check_conditions(self, modality: str, labels: Any, prompts: Any) -> None:
        """Raises ValueError for conditions that the modality does not have, and for prompts that it lacks."""
        if labels is not None and not self.model.adapter(modality).config.num_classes:
            raise ValueError(f"labels: got {labels!r}; expected None: the model's {modality} is not of classes")
        if labels is not None and not isinstance(labels, int | str) and not len(labels):
            raise ValueError("labels: got none; expected one or more, or None for every class")
        if prompts is not None and not self._takes_prompts(modality):
            raise ValueError(f"prompts: got {prompts!r}; expected None: the model's {modality} takes no prompts")
        if not prompts and self._takes_prompts(modality):
            raise ValueError(f"prompts: got {prompts!r}; expected one or more texts: the model's text answers a text")

    def usage(self) -> str:
        name = self.model.config.modalities[0]
        given = [f'"{name}"'] if len(self.model.config.modalities) > 1 else []
        given += ['prompts=["…"]'] if self._takes_prompts(name) else ["num_samples=1"]
        return f"drawn = run.sample({', '.join(given)})\nprint(drawn.samples)"

    @going_by_choices
    def _save(self, directory: Path) -> None:
        names = {name: facts.get("class_names", []) for name, facts in self.facts.items()}
        processors = [each for each in (self.tokenizer, self.schema) if each is not None]
        save_model(directory, self.model, names, processors, self.sampling, self.mixed_precision)


def save_model(
    directory: Path,
    model: QGFDModel,
    class_names: Mapping[str, Sequence[str]],
    processors: Sequence[Any],
    sampling: QGFDSamplingConfig,
    mixed_precision: str,
) -> None:
    """Writes a model so that it samples by itself: with class names, tokenizer, table columns, ways of sampling."""
    names = {name: list(each) for name, each in class_names.items()}
    model.save_pretrained(directory, extra={"class_names": names, **sampling_keys(sampling, mixed_precision)})
    for processor in processors:
        processor.save_pretrained(directory)


def load_run(path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None) -> QGFDRun:
    """Loads a run of `task: qgfd`, or a saved model; arguments and errors are those of `fastdiff.load`."""
    device = check_device(device)
    found = find(path, "qgfd", weights)
    model = QGFDModel.from_pretrained(found.source, weights=found.weights_file)
    if found.folder is not None:
        recipe = load_recipe(QGFDRecipe, found.folder.config)
        facts, sampling, precision = found.state["task"]["modalities"], recipe.sampling, recipe.training.mixed_precision
    else:
        recipe, names = None, read_config(found.source).get("class_names", {})
        facts = {name: {"class_names": names.get(name, [])} for name in model.adapters}
        sampling, precision = stored_sampling(found.source, QGFDSamplingConfig)
    return QGFDRun(
        model=model.to(device).eval(),
        **found.origin,
        recipe=recipe,
        facts=facts,
        sampling=sampling,
        mixed_precision=precision,
        **_processors(found.source, model),
    )


def _processors(folder: Path, model: QGFDModel) -> dict[str, Any]:
    """The tokenizer of text and the columns of a table, where the model has these modalities."""
    tokenizer = None
    if "text" in model.adapters:
        tokenizer = load_saved_tokenizer(folder)
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
