"""Training of a class-conditional DiT: its task. The recipe is in recipe.py."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data import EpochStream, ImageData, load_data
from fastdiff.data.images import flip_some, shift_and_scale
from fastdiff.device import autocast_dtype
from fastdiff.diffusion.classes import sample_classes
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.errors import section
from fastdiff.models.dit import DiT
from fastdiff.recipes import plain
from fastdiff.tasks.dit.recipe import DiTRecipe, check_fit
from fastdiff.tasks.dit.run import save_model
from fastdiff.training.randomness import derive_seed, generator, normal_noise
from fastdiff.training.task import Batch

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _TIMES, _LABELS, _NOISE, _FLIPS, _SHIFTS = 2, 3, 4, 5, 6, 7


class DiTTask:
    """Denoising of labelled images by a DiT, as the trainer sees it.

    Args:
        recipe: the run's recipe.
        data: the images, where they are loaded already.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: the data is missing, or does not fit the model; one line.
    """

    unit = "images"
    partial_gradients = False

    def __init__(self, recipe: DiTRecipe, data: ImageData | None = None):
        self.config = recipe
        with section("data"):
            self.data = load_data(recipe.data) if data is None else data
        check_fit(recipe, self.data)
        training = recipe.training
        self.diffusion = Diffusion(recipe.diffusion)
        self.stream = EpochStream(len(self.data.train), training.batch_size, derive_seed(training.seed, _ORDER))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = DiT(recipe.model)
        self.model.y_embedder.dropout_prob = 0.0  # `batch` drops labels, from seeds that any process can derive

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step: x0 and noise [n, C, H, W], labels and t [n]."""
        seed, size = self.config.training.seed, self.config.training.batch_size
        dropout, num_classes = self.config.model.class_dropout_prob, self.config.model.num_classes
        mine = slice(slots.start, slots.stop)
        indices = self.stream.indices(step)[mine]
        labels = self.data.train.labels[indices]
        dropped = torch.rand(size, generator=generator(seed, step, _LABELS))[mine] < dropout
        x0 = self.data.train.images(indices)
        if self.config.data.horizontal_flip:
            x0 = flip_some(x0, torch.rand(size, generator=generator(seed, step, _FLIPS))[mine])
        shift, scale = self.config.data.random_shift or 0.0, self.config.data.random_scale or 0.0
        if shift or scale:
            draws = torch.rand(size, 3, generator=generator(seed, step, _SHIFTS))[mine]
            x0 = shift_and_scale(x0, draws, shift, scale)
        return {
            "x0": x0,
            "labels": torch.where(dropped, num_classes, labels),
            # drawn for the whole batch: a process takes its part of what one process would have drawn
            "t": self.diffusion.sample_times(size, generator(seed, step, _TIMES), torch.device("cpu"))[mine],
            "noise": normal_noise(slots, x0.shape[1:], seed, step, _NOISE),
        }

    def weight(self, batch: Batch) -> float:
        """The number of images."""
        return float(len(batch["x0"]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the images' losses."""
        predict = functools.partial(model, class_labels=batch["labels"])
        return self.diffusion.loss(predict, batch["x0"], batch["t"], batch["noise"]).sum()

    def sample_ids(self, step: int) -> list[int]:
        """Indices in the training part of the data."""
        return self.stream.indices(step).tolist()

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model as `fastdiff.load` reads it: with its diffusion process, class names and ways of sampling."""
        recipe = self.config
        save_model(
            folder, model, self.diffusion, self.data.class_names, recipe.sampling, recipe.training.mixed_precision
        )

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nothing: fastdiff.evaluate scores samples, which takes a classifier."""
        return {}

    def preview(self, model: nn.Module, path: Path) -> None:
        """A labelled grid of samples, one row per class (20 classes at most)."""
        from fastdiff.visualization import save_sample_grid  # matplotlib: a second that other uses need not wait

        sampling, names = self.config.sampling, self.data.class_names[:20]
        labels = torch.arange(len(names)).repeat_interleave(sampling.images_per_class)
        device = next(model.parameters()).device
        images = sample_classes(
            model,
            self.diffusion,
            labels.to(device),
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            guidance_interval=sampling.guidance_interval,
            guidance_channels=sampling.guidance_channels,
            seed=sampling.seed,
            autocast_dtype=autocast_dtype(self.config.training.mixed_precision, device.type),
            **sampling.options(),
        )
        save_sample_grid(images.cpu(), labels, names, path, title=sampling.described())

    def data_sets(self) -> dict[str, ImageData]:
        """The images."""
        return {"data": self.data}

    def facts(self) -> dict[str, Any]:
        """The classes' names, by label."""
        return {"class_names": list(self.data.class_names)}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(self.config.to_dict())
