"""Runs of diffusion transformers, loaded to sample from."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.device import autocast_dtype, check_device
from fastdiff.diffusion import Diffusion, DiffusionConfig, sample_classes, samplers_for
from fastdiff.diffusion.sampler_config import check_sampler
from fastdiff.models.dit import DiT
from fastdiff.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, check_overrides, read_config
from fastdiff.recipes import load_recipe
from fastdiff.tasks.dit.recipe import DiTRecipe, SamplingConfig
from fastdiff.tasks.images import to_pil
from fastdiff.tasks.labels import label_of, parse_labels
from fastdiff.tasks.run import Found, Run, find, sampling_keys, stored_sampling
from fastdiff.training.checkpoint import load_weights

if TYPE_CHECKING:
    from PIL.Image import Image

SCHEDULER_CONFIG = "scheduler_config.json"
_HUB_FILES = (  # of a pipeline, what is not its decoder
    CONFIG_NAME, SCHEDULER_CONFIG, "model_index.json", WEIGHTS_NAME, "diffusion_pytorch_model*", "transformer/*",
    "scheduler/*", "README.md", "samples.png",
)  # fmt: skip
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
        classes: "Sequence[int | str] | Tensor | int | str | None" = None,
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
            classes: labels or class names, one or several; None is every class once.
            num_images_per_class: images of each entry of `classes`; they follow each other.
            num_inference_steps, guidance_scale, seed: None is what the run's recipe says. Image i of the call has the
                seed `seed` + i.
            output_type: "pil" or "pt".
            progress: shows a bar.

        Returns:
            N = len(classes) · num_images_per_class images. "pil": PIL images of 8 bits, grey ("L") or RGB. "pt": a
            float32 tensor [N, C, H, W] on the CPU, with values around -1 … 1, or the latents of a model of latents.

        Raises:
            ValueError: not a class, a number out of range, or latents asked for as images; before any work.
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
        wanted = range(len(self.class_names)) if classes is None else classes
        wanted = [wanted] if isinstance(wanted, str | int) else wanted
        labels = [label_of(each, self.class_names) for each in wanted]
        if not labels:
            raise ValueError("classes: got none; expected one or more, or None for every class")
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "seed": seed}
        sampling = replace(self.sampling, **{name: value for name, value in given.items() if value is not None})
        check_sampler(sampling, self.diffusion.config)
        images = self.draw(torch.tensor(labels).repeat_interleave(num_images_per_class), sampling, progress=progress)
        return to_pil(images) if output_type == "pil" else images

    def draw(
        self,
        labels: Sequence[int] | Tensor,
        sampling: SamplingConfig,
        *,
        batch_size: int = 100,
        progress: bool = False,
        keep: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Samples of these labels: float32 [N, C, H, W] on the CPU.

        Sample i depends on its label and on seed + i alone, whatever `batch_size` (rounding aside). The network runs
        in the precision that the run would train in on this device (`fastdiff.device.autocast_dtype`). `keep` gets the
        samples drawn so far, [n, C, H, W], after each batch but the last (`fastdiff.tasks.results.AsTheyCome`).

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
                images = sample_classes(
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
                if keep is not None and start + batch_size < len(labels):
                    keep(torch.cat(parts))
        return torch.cat(parts)

    def usage(self) -> str:
        latents = self.model.config.in_channels not in (1, 3)
        show = ', output_type="pt")  # latents' if latents else ')\nimages[0].save("sample.png")'
        return f'images = run.sample(["{self.class_names[0]}"]{show}'

    def _save(self, directory: Path) -> None:
        save_model(directory, self.model, self.diffusion, self.class_names, self.sampling, self.mixed_precision)


def save_model(
    directory: Path,
    model: DiT,
    diffusion: Diffusion,
    class_names: Sequence[str],
    sampling: SamplingConfig,
    mixed_precision: str,
) -> None:
    """Writes a DiT so that it samples by itself: with its diffusion process, class names and ways of sampling."""
    id2label = {str(label): name for label, name in enumerate(class_names)}
    extra = sampling_keys(sampling, mixed_precision) | ({"id2label": id2label} if id2label else {})
    model.save_pretrained(directory, extra=extra)
    diffusion.save_pretrained(directory)


def load_run(
    path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None, **fields: Any
) -> DiTRun:
    """Loads a DiT; arguments and errors are those of `fastdiff.load`.

    Of a run, the newest checkpoint or the one named. Of anything else the folder or file is read as
    `DiT.from_pretrained` does; without a scheduler_config.json the process of the published DiT checkpoints is assumed,
    with a warning. `fields` are those of `DiT.from_pretrained`, such as the `num_heads` of a facebookresearch file.
    """
    device = check_device(device)
    found = find(path, "dit", weights, _HUB_FILES)
    if found.folder is not None:
        check_overrides(fields, ())
        return _load_checkpoint(found, device)
    own = {} if found.state is None else {"weights": found.weights_file}
    model = DiT.from_pretrained(found.source, **own, **fields).to(device)
    diffusion = _diffusion_of(found)
    sampling, mixed_precision = stored_sampling(found.source, SamplingConfig)
    return DiTRun(
        model=model,
        **found.origin,
        diffusion=diffusion,
        class_names=_names_of(found.source, model.config.num_classes),
        sampling=sampling,
        mixed_precision=mixed_precision,
    )


def _load_checkpoint(found: Found, device: torch.device) -> DiTRun:
    recipe = load_recipe(DiTRecipe, found.folder.config)
    model = DiT(recipe.model)
    load_weights(model, found.source / found.weights_file)
    return DiTRun(
        model=model.to(device).eval(),
        **found.origin,
        recipe=recipe,
        diffusion=Diffusion(recipe.diffusion),
        class_names=tuple(found.state["task"]["class_names"]),
        sampling=recipe.sampling,
        mixed_precision=recipe.training.mixed_precision,
    )


def _diffusion_of(found: Found) -> Diffusion:
    path = found.source
    if any((path / name).is_file() for name in (SCHEDULER_CONFIG, f"scheduler/{SCHEDULER_CONFIG}")):
        return Diffusion.from_pretrained(path)
    if found.state is not None:  # of fastdiff 0.1.0, whose config.yaml alone has the process
        raise FileNotFoundError(
            f"{path}: got a checkpoint without {SCHEDULER_CONFIG}; expected it in its run's folder, whose config.yaml "
            "names the diffusion process; put it back there"
        )
    warnings.warn(
        f"{path}: no {SCHEDULER_CONFIG} beside the weights; assuming the process of the published DiT checkpoints "
        "(1000 levels, linear betas, predicted noise)",
        stacklevel=4,
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
