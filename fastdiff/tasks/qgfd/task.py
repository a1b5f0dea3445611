"""Training of QGFD diffusion models: one modality, or several in turn or mixed over a shared backbone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data import EpochStream, LabelledData
from fastdiff.data.images import flip_some, shift_and_scale
from fastdiff.data.stream import share
from fastdiff.data.text_batches import window_length
from fastdiff.device import autocast_dtype
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.recipes import plain
from fastdiff.tasks.qgfd.recipe import QGFDRecipe, check_recipe
from fastdiff.tasks.qgfd.run import load_adapters, save_model
from fastdiff.tasks.qgfd.sources import build_model, check_backbones, load_source
from fastdiff.training.randomness import derive_seed, generator, normal_noise
from fastdiff.training.task import Batch

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _TIMES, _CONDITIONS, _NOISE, _FLIPS, _LENGTH, _SHIFTS = 2, 3, 4, 5, 6, 7, 8


class QGFDTask:
    """Diffusion over the latent tokens of a recipe's modalities, as the trainer sees it.

    Args:
        recipe: the run's recipe.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError, ValueError: data or an encoder is missing, or they do not fit
            each other; one line.
    """

    unit = "samples"
    partial_gradients = True  # of modalities whose turn it is not, and of queries where the condition is one token

    def __init__(self, recipe: QGFDRecipe):
        check_recipe(recipe)
        check_backbones(recipe)
        self.config, training = recipe, recipe.training
        adapters = None
        if recipe.objective.adapters_from is not None:  # one that cannot be used is known before any data is read
            adapters = load_adapters(recipe.objective.adapters_from, recipe)
        tokenizer = None if adapters is None else adapters.tokenizer
        self.sources = {name: load_source(recipe, name, tokenizer) for name in recipe.modalities}
        if recipe.evaluated_after_training and "image" in self.sources:
            from fastdiff.evaluation.classifier import check_classifier_cache

            check_classifier_cache(self.sources["image"].data)  # that training ends with
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_model(recipe, self.sources)
        if adapters is not None:
            adapters.copy_to(self.model)
        # `batch` drops conditions, from seeds that any process can derive
        for adapter in self.model.adapters.values():
            adapter.drops_conditions = False
        self.diffusion = Diffusion(recipe.diffusion)
        self.streams = {
            name: EpochStream(len(source.data.train), len(self._slots(name)), derive_seed(training.seed, _ORDER, index))
            for index, (name, source) in enumerate(self.sources.items())
        }

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step; the names of its tensors begin with their modality: "image.pixel_values"."""
        batch = {}
        for name in self._modalities(step):
            parts = self._examples(name, step, slots)
            if parts:
                batch |= {f"{name}.{field}": value for field, value in parts.items()}
        return batch

    def _modalities(self, step: int) -> tuple[str, ...]:
        """Those that a step trains."""
        names = self.config.modalities
        return names if self.config.objective.order == "mixed" else (names[step % len(names)],)

    def _slots(self, modality: str) -> range:
        """The slots of a step's batch that a modality has where the step trains it."""
        everyone, names = range(self.config.training.batch_size), self.config.modalities
        if self.config.objective.order == "in_turn":
            return everyone
        return everyone[share(len(everyone), len(names), names.index(modality))]

    def _turn(self, step: int) -> int:
        """How often a step's modality had its turn before."""
        return step if self.config.objective.order == "mixed" else step // len(self.config.modalities)

    def _examples(self, modality: str, step: int, slots: range) -> Batch:
        """The examples of a modality among some slots, with their times and noise; {} where there are none."""
        all_of_it, seed = self._slots(modality), self.config.training.seed
        mine = range(max(slots.start, all_of_it.start), min(slots.stop, all_of_it.stop))
        if not len(mine):
            return {}
        # drawn for the whole step: a process takes its part of what one process would have drawn
        part = slice(mine.start - all_of_it.start, mine.stop - all_of_it.start)
        batch = dict(self.sources[modality].data.train.batch(self.streams[modality].indices(self._turn(step))[part]))
        purpose = self.config.modalities.index(modality)
        dropped = torch.rand(len(all_of_it), generator=generator(seed, step, _CONDITIONS, purpose))[part]
        self._drop_conditions(modality, batch, dropped < getattr(self.config, modality).condition_dropout)
        if modality == "image":
            batch["pixel_values"] = self._augmented(batch["pixel_values"], step, len(all_of_it), part)
        if modality == "text" and "condition_ids" not in batch:
            length = window_length(self.config.text_data, generator(seed, step, _LENGTH))
            batch["input_ids"] = batch["input_ids"][:, :length]
        times = self.diffusion.sample_times(len(all_of_it), generator(seed, step, _TIMES, purpose))
        _, *shape = self.model.latent_shape(batch, modality)
        return {**batch, "t": times[part], "noise": normal_noise(mine, tuple(shape), seed, step, _NOISE)}

    def _augmented(self, images: Tensor, step: int, count: int, part: slice) -> Tensor:
        """A part of a step's `count` images, mirrored, moved and resized as the recipe says."""
        data, seed = self.config.image_data, self.config.training.seed
        if data.horizontal_flip:
            images = flip_some(images, torch.rand(count, generator=generator(seed, step, _FLIPS))[part])
        if data.random_shift or data.random_scale:
            draws = torch.rand(count, 3, generator=generator(seed, step, _SHIFTS))[part]
            images = shift_and_scale(images, draws, data.random_shift or 0.0, data.random_scale or 0.0)
        return images

    def _drop_conditions(self, modality: str, batch: Batch, dropped: Tensor) -> None:
        """Takes the condition from some samples, for classifier-free guidance."""
        label_embedding = self.model.adapters[modality].label_embedding
        if label_embedding is None:
            batch.pop("labels", None)
        else:
            batch["labels"] = torch.where(dropped, label_embedding.num_classes, batch["labels"])
        if "condition_mask" in batch:
            batch["condition_mask"] = batch["condition_mask"] & ~dropped[:, None]

    def weight(self, batch: Batch) -> float:
        """The number of samples."""
        return float(sum(len(value) for name, value in batch.items() if name.endswith(".t")))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the samples' losses."""
        by_modality: dict[str, Batch] = {}
        for name, value in batch.items():
            modality, _, field = name.partition(".")
            by_modality.setdefault(modality, {})[field] = value
        return model(by_modality).sum()

    def sample_ids(self, step: int) -> list[int]:
        """Indices in the training part of the data, modality after modality."""
        turn = self._turn(step)
        return [index for name in self._modalities(step) for index in self.streams[name].indices(turn).tolist()]

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model as `fastdiff.load` reads it; see `save_model`."""
        names = {name: source.data.class_names for name, source in self.sources.items()}
        processors = [source.processor for source in self.sources.values() if source.processor is not None]
        recipe = self.config
        save_model(folder, model, names, processors, recipe.sampling, recipe.training.mixed_precision)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Losses on held-out samples, at times and with noise that are the same at each preview."""
        from fastdiff.tasks.qgfd.losses import held_out_losses

        objective, measures = self.config.objective, {}
        device = next(model.parameters()).device
        for name, source in self.sources.items():
            losses = held_out_losses(
                model, name, source.data.held_out, objective.validation_samples,
                autocast_dtype=autocast_dtype(self.config.training.mixed_precision, device.type),
            )  # fmt: skip
            prefix = f"{name}_" if len(self.sources) > 1 else ""
            measures |= {f"{prefix}{part}": float(values.mean()) for part, values in losses.items()}
        if len(self.sources) > 1:
            measures["loss"] = sum(measures[f"{name}_loss"] for name in self.sources) / len(self.sources)
        return measures

    def preview(self, model: nn.Module, path: Path) -> None:
        """Samples of each modality as files beside `path`, and all of their pictures in it."""
        from fastdiff.tasks.qgfd.samples import Shown, preview_samples

        shown = {name: Shown.of_source(source) for name, source in self.sources.items()}
        preview_samples(model, shown, self.config, path)

    def data_sets(self) -> dict[str, LabelledData]:
        """The data of each modality."""
        return {f"{name}_data": source.data for name, source in self.sources.items()}

    def facts(self) -> dict[str, Any]:
        """For each modality, its classes' names."""
        names = {name: {"class_names": list(source.data.class_names)} for name, source in self.sources.items()}
        return {"kind": "qgfd", "modalities": names}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(self.config.to_dict())
