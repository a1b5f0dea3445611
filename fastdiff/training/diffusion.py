"""Training of a class-conditional DiT: its recipe and its task."""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data import DataConfig, EpochStream, ImageData, load_data
from fastdiff.device import autocast_dtype
from fastdiff.diffusion.classes import sample_classes
from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.recipes import plain
from fastdiff.training.config import TrainingConfig
from fastdiff.training.randomness import derive_seed, generator, normal_noise
from fastdiff.training.sampling import SamplerConfig, check_sampler
from fastdiff.training.task import Batch

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _TIMES, _LABELS, _NOISE, _FLIPS = 2, 3, 4, 5, 6


@dataclass
class SamplingConfig(SamplerConfig):
    """How a run draws its samples, where a command does not say otherwise, beside the fields of `SamplerConfig`.

    Attributes:
        images_per_class: in samples.png.
    """

    images_per_class: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.images_per_class < 1:
            raise ValueError(f"sampling.images_per_class is {self.images_per_class}; expected at least 1")


@dataclass
class DiTRecipe:
    """Everything a run of fastdiff.train is made from.

    Attributes:
        model: the DiT.
        diffusion: what it predicts, at which noise levels.
        data: the images.
        training: the course of training.
        sampling: the pictures of samples.
    """

    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


class DiffusionTask:
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
        """The model as `DiT.from_pretrained` reads it."""
        model.save_pretrained(folder)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nothing: fastdiff.evaluate scores samples, which takes a classifier."""
        return {}

    def preview(self, model: nn.Module, path: Path) -> None:
        """A labelled grid of samples, a row a class (20 classes at most)."""
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
            sampler=sampling.sampler,
            seed=sampling.seed,
            autocast_dtype=autocast_dtype(self.config.training.mixed_precision, device.type),
        )
        title = f"guidance {sampling.guidance_scale:g}, {sampling.num_inference_steps} steps"
        save_sample_grid(images.cpu(), labels, names, path, title=title)

    def facts(self) -> dict[str, Any]:
        """The classes' names, by label."""
        return {"class_names": list(self.data.class_names)}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(dataclasses.asdict(self.config))


def flip_some(images: Tensor, draws: Tensor) -> Tensor:  # [B, C, H, W], uniform on [0, 1) [B] -> [B, C, H, W]
    """Each image mirrored with probability 1/2."""
    return torch.where((draws < 0.5)[:, None, None, None], images.flip(-1), images)


def check_fit(recipe: DiTRecipe, data: ImageData) -> None:
    """Raises ValueError where the parts of a recipe do not fit each other or the data."""
    channels, *size = data.image_shape
    expected = {"in_channels": channels, "image_size": tuple(size), "num_classes": len(data.class_names)}
    for name, value in expected.items():
        if getattr(recipe.model, name) != value:
            key = "input_size" if name == "image_size" else name
            raise ValueError(
                f"model.{key} is {getattr(recipe.model, key)}; the data set {data.name} has {value}; "
                f"set --model.{key} to that"
            )
    check_sampler(recipe.sampling, recipe.diffusion)
    if recipe.model.learn_sigma and not recipe.diffusion.is_discrete:
        raise ValueError(
            "model.learn_sigma is true; diffusion.noise_levels "
            f"{recipe.diffusion.noise_levels!r} has no variance to learn; set it to false"
        )
