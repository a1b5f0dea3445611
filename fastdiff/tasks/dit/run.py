"""Runs of diffusion transformers, loaded to sample from."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.device import autocast_dtype, check_device
from fastdiff.diffusion import Diffusion, DiffusionConfig, sample, samplers_for
from fastdiff.models.dit import DiT
from fastdiff.models.pretrained import CONFIG_NAME, read_config
from fastdiff.recipes import load_recipe
from fastdiff.tasks.dit.recipe import DiTRecipe, SamplingConfig
from fastdiff.tasks.hub import local_folder
from fastdiff.tasks.labels import parse_labels
from fastdiff.tasks.run import Run
from fastdiff.training.checkpoint import load_weights, read_state
from fastdiff.training.run_folder import locate, locate_checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEDULER_CONFIG = "scheduler_config.json"
# The process of the published DiT checkpoints, which is assumed of a folder that does not name its own.
_PUBLISHED = DiffusionConfig(prediction_type="epsilon", noise_levels="linear")


@dataclass(frozen=True)
class DiTRun(Run):
    """A DiT and how it samples.

    Attributes:
        diffusion: what the model predicts, at which noise levels.
        class_names: by label.
        sampling: how samples are denoised where nobody says otherwise.
        mixed_precision: as in `TrainingConfig`.
    """

    kind: ClassVar[str] = "dit"

    diffusion: Diffusion = field(default_factory=lambda: Diffusion(_PUBLISHED))
    class_names: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mixed_precision: str = "auto"

    def labels(self, text: str | None) -> list[int]:
        """Labels from "0,3,7" or class names; None is every class once. Raises ValueError for what is not a class."""
        return list(range(len(self.class_names))) if text is None else parse_labels(text, self.class_names)

    def sample(
        self,
        classes: Sequence[int | str] | None = None,
        *,
        num_images_per_class: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        progress: bool = False,
    ) -> "list[Image] | Tensor":
        """Draws images.

        Args:
            classes: labels or class names; None is every class once.
            num_images_per_class: images of each entry of `classes`; image i has the seed `seed` + i.
            num_inference_steps, guidance_scale, seed: None is what the run's recipe says.
            output_type: "pil" gives PIL images, "pt" a float32 tensor [N, C, H, W] with values around -1 … 1.
            progress: shows a bar.

        Raises:
            ValueError: not a class, a number out of range, or latents asked for as images.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type: got {output_type!r}; expected 'pil' or 'pt'")
        channels = self.model.config.in_channels
        if output_type == "pil" and channels not in (1, 3):
            raise ValueError(
                f"output_type: got 'pil' for a model of latents with {channels} channels; expected 'pt', and a decoder "
                "that makes images of them"
            )
        if num_images_per_class < 1:
            raise ValueError(f"num_images_per_class: got {num_images_per_class}; expected at least 1")
        names = range(len(self.class_names)) if classes is None else classes
        if isinstance(names, str | int):
            names = [names]
        labels = [each for name in names for each in parse_labels(str(name), self.class_names)]
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "seed": seed}
        values = {name: value for name, value in given.items() if value is not None}
        sampling = SamplingConfig(**{**vars(self.sampling), **values})
        images = self.draw(torch.tensor(labels).repeat_interleave(num_images_per_class), sampling, progress=progress)
        return to_pil(images) if output_type == "pil" else images

    def draw(
        self, labels: Sequence[int] | Tensor, sampling: SamplingConfig, *, batch_size: int = 100, progress: bool = False
    ) -> Tensor:
        """Samples of these labels: float32 [N, C, H, W] on the CPU.

        Sample i depends on its label and on seed + i alone, whatever `batch_size` (rounding aside). The network runs
        in the precision that the run would train in on this device (`fastdiff.device.autocast_dtype`).

        Raises:
            ValueError: a sampler that does not fit the run, or a label out of range.
        """
        fitting = samplers_for(self.diffusion.config)
        if sampling.sampler not in (None, *fitting):
            raise ValueError(f"sampler: got {sampling.sampler!r}; expected one of {', '.join(fitting)} for this run")
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
                    autocast_dtype=autocast_dtype(self.mixed_precision, device.type),
                )
                parts.append(images.cpu())
                bar.update(len(part))
        return torch.cat(parts)

    def _save(self, directory: Path) -> None:
        save_model(directory, self.model, self.diffusion, self.class_names)


def save_model(directory: Path, model: DiT, diffusion: Diffusion, class_names: Sequence[str]) -> None:
    """Writes a DiT so that it samples by itself: with its diffusion process and the names of its classes."""
    id2label = {str(label): name for label, name in enumerate(class_names)}
    model.save_pretrained(directory, extra={"id2label": id2label} if id2label else None)
    diffusion.save_pretrained(directory)


def to_pil(images: Tensor) -> "list[Image]":  # [N, C, H, W], -1 … 1
    """8-bit images, grey or RGB."""
    from PIL import Image

    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image.squeeze(-1).numpy()) for image in pixels]


def load_run(path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None) -> DiTRun:
    """Loads a DiT; arguments and errors are those of `fastdiff.load`.

    Of a run, the newest checkpoint or the one named. Of anything else the folder or file is read as
    `DiT.from_pretrained` does; without a scheduler_config.json the process of the published DiT checkpoints is assumed,
    with a warning.
    """
    device = check_device(device)
    folder, _ = locate(path)
    if folder.config.is_file():
        return _load_checkpoint(path, weights, device)
    path = local_folder(path)
    model = DiT.from_pretrained(path).to(device)
    diffusion = _diffusion_of(path)
    names = _names_of(path, model.config.num_classes)
    return DiTRun(model=model, source=Path(path), diffusion=diffusion, class_names=names)


def _load_checkpoint(path: str | Path, weights: str, device: torch.device) -> DiTRun:
    folder, _ = locate(path)
    recipe = load_recipe(DiTRecipe, folder.config)
    folder, checkpoint = locate_checkpoint(path)
    state = read_state(checkpoint)
    model = DiT(recipe.model)
    load_weights(model, checkpoint / ("ema.safetensors" if weights == "ema" else "model.safetensors"))
    return DiTRun(
        model=model.to(device).eval(),
        source=checkpoint,
        folder=folder,
        recipe=recipe,
        step=state["step"],
        diffusion=Diffusion(recipe.diffusion),
        class_names=tuple(state["task"]["class_names"]),
        sampling=recipe.sampling,
        mixed_precision=recipe.training.mixed_precision,
    )


def _diffusion_of(path: Path) -> Diffusion:
    if any((path / name).is_file() for name in (SCHEDULER_CONFIG, f"scheduler/{SCHEDULER_CONFIG}")):
        return Diffusion.from_pretrained(path)
    warnings.warn(
        f"{path}: no {SCHEDULER_CONFIG} beside the weights; assuming the process of the published DiT checkpoints "
        "(1000 levels, linear betas, predicted noise)",
        stacklevel=2,
    )
    return Diffusion(_PUBLISHED)


def _names_of(path: Path, num_classes: int) -> tuple[str, ...]:
    """The classes' names by id2label in config.json or in a pipeline's model_index.json; else their numbers."""
    values: dict[str, Any] = {}
    if (path / "model_index.json").is_file():
        values = json.loads((path / "model_index.json").read_text())
    elif (path / CONFIG_NAME).is_file():
        values = read_config(path)
    names = values.get("id2label")
    if not isinstance(names, dict):
        return tuple(str(label) for label in range(num_classes))
    if sorted(map(int, names)) != list(range(num_classes)):
        raise ValueError(f"{path}: id2label: got {len(names)} names; expected those of 0 to {num_classes - 1}")
    return tuple(str(names[key]) for key in sorted(names, key=int))
