"""What images are drawn from, and the drawing of a batch: texts that a model reads once, or labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.device import autocast, evaluating
from fastdiff.diffusion import Diffusion, sample_classes
from fastdiff.diffusion.prompts import sample_prompts
from fastdiff.errors import section
from fastdiff.models.text_encoder import TextEncoder, TextEncoderConfig, load_text_encoder
from fastdiff.models.text_to_image import TextToImage
from fastdiff.tasks.text_to_image.recipe import TextToImageSamplingConfig

Step = Callable[[int, float, Tensor, Tensor], None]  # as `fastdiff.diffusion.sample` calls it


def load_encoder(
    config: TextEncoderConfig, class_names: Sequence[str], device: torch.device | str = "cpu"
) -> TextEncoder:
    """The text encoder of a recipe; class names that list synonyms, as ImageNet's, name their class by any of them.

    Raises FileNotFoundError, ModuleNotFoundError or ValueError: missing, damaged, or without a layer that is wanted.
    """
    with section("text_encoder"):
        return load_text_encoder(config, device, classes=[name.split(",") for name in class_names])


@dataclass(frozen=True)
class Conditions:
    """What images are drawn from, one entry an image: texts with the states that an encoder made of them, or labels.

    Attributes:
        texts: what stands under a picture.
        states: {"text_states": [N, S, C] or [N, S, K, C], "text_mask": bool [N, S]}; None for labels.
        labels: int64 [N], of the diffusion transformer's own classes; None for texts.
    """

    texts: tuple[str, ...]
    states: Mapping[str, Tensor] | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> "Conditions":
        states = None if self.states is None else {name: value[part] for name, value in self.states.items()}
        return Conditions(self.texts[part], states, None if self.labels is None else self.labels[part])

    def repeated(self, count: int) -> "Conditions":
        """Each entry so often; they follow each other."""
        states = self.states and {name: value.repeat_interleave(count, 0) for name, value in self.states.items()}
        labels = None if self.labels is None else self.labels.repeat_interleave(count)
        return Conditions(tuple(text for text in self.texts for _ in range(count)), states, labels)

    @torch.no_grad()
    def read_by(self, model: TextToImage, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """What texts mean to a model, on its device; it reads each different text once. `dtype`: of autocast."""
        device, first = next(model.parameters()).device, {}
        rows = torch.tensor([first.setdefault(text, len(first)) for text in self.texts])
        chosen = [self.texts.index(text) for text in first]
        with evaluating(model), autocast(device, dtype):
            states = {name: value[chosen].to(device) for name, value in self.states.items()}
            return model.condition(**states, rows=rows.to(device))


@torch.no_grad()
def draw_images(
    model: TextToImage,
    diffusion: Diffusion,
    conditions: Conditions,
    sampling: TextToImageSamplingConfig,
    seeds: Sequence[int],
    dtype: torch.dtype | None,
    callback: Step | None = None,
) -> Tensor:  # [N, C, H, W], float32, on the model's device
    """One batch of samples. The model reads each different text once, whatever the number of steps and images."""
    options = dict(
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        guidance_interval=sampling.guidance_interval,
        seed=list(seeds),
        callback=callback,
        autocast_dtype=dtype,
        **sampling.options(),
    )
    device = next(model.parameters()).device
    if conditions.labels is not None:
        return sample_classes(model.dit, diffusion, conditions.labels.to(device), **options)
    return sample_prompts(model, diffusion, conditions.read_by(model, dtype), **options)


class Frames:
    """The noisy samples after each step of `TextToImageRun.draw`, of all of its batches: pass it as `callback`."""

    def __init__(self) -> None:
        self._batches: list[list[Tensor]] = []

    def __call__(self, index: int, time: float, x: Tensor, x0: Tensor) -> None:
        if index == 0:
            self._batches.append([])
        self._batches[-1].append(x.cpu())

    def steps(self) -> list[Tensor]:
        """[N, C, H, W] after each step."""
        return [torch.cat(parts) for parts in zip(*self._batches, strict=True)]
