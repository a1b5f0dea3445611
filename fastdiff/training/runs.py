"""A finished (or running) run, loaded to sample from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.cli import load_recipe
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.sampling import sample, samplers_for
from fastdiff.models.dit import DiT
from fastdiff.training.checkpoint import load_weights, read_state, step_of
from fastdiff.training.diffusion import DiTRecipe, SamplingConfig
from fastdiff.training.run_folder import RunFolder
from fastdiff.training.setup import autocast_dtype, check_device


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
        if text is None:
            return list(range(len(self.class_names)))
        labels = []
        for part in (part.strip() for part in text.split(",")):
            if part in self.class_names:
                labels.append(self.class_names.index(part))
            elif part.isdecimal() and int(part) < len(self.class_names):
                labels.append(int(part))
            else:
                raise ValueError(
                    f"--labels has {part!r}; expected 0 to {len(self.class_names) - 1} or one of "
                    f"{', '.join(self.class_names)}"
                )
        return labels

    def draw(
        self, labels: Sequence[int] | Tensor, sampling: SamplingConfig, *, batch_size: int = 100, progress: bool = False
    ) -> Tensor:
        """Samples of these labels: float32 [N, C, H, W] on the CPU.

        Sample i depends on its label and on seed + i alone, whatever `batch_size` (rounding aside). The network runs
        in the precision that the run would train in on this device (`setup.autocast_dtype`).

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
                    autocast_dtype=autocast_dtype(self.recipe.training, device.type),
                )
                parts.append(images.cpu())
                bar.update(len(part))
        return torch.cat(parts)


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
    path = Path(path)
    is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step_")
    folder = RunFolder(path.parent.parent if is_checkpoint else path)
    if not path.is_dir():
        raise FileNotFoundError(f"run {str(path)!r} is not a folder; expected the output_dir of a run")
    recipe = load_recipe(DiTRecipe, folder.config)
    checkpoint = path if is_checkpoint else folder.latest()
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder.checkpoints} has no checkpoint yet; train longer, or set training.checkpoint_every lower"
        )
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
