"""The part of a recipe that says how a run's samples are denoised, whatever they are."""

import math
from dataclasses import dataclass
from typing import Literal

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.sampling import samplers_for
from fastdiff.errors import named


@dataclass
class SamplerConfig:
    """How samples are denoised.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        guidance_interval: the part of the course of noise levels, from 0 (clean) to 1 (noise), in which guidance acts.
        sampler: "euler", "ddpm", "ddim", "dpm-solver++" or "renoise", as fits the diffusion; null takes the first that
            does.
        seed: seed of the first sample's noise; the others count on from it.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: Literal["euler", "ddpm", "ddim", "dpm-solver++", "renoise"] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ValueError(f"{named('num_inference_steps')}: got {self.num_inference_steps}; expected at least 1")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"{named('guidance_scale')}: got {self.guidance_scale}; expected a finite number")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"{named('guidance_interval')}: got {list(interval)}; expected 0 <= low <= high <= 1")


def check_sampler(sampling: SamplerConfig, diffusion: DiffusionConfig) -> None:
    """Raises ValueError where samples cannot be denoised so."""
    fitting = samplers_for(diffusion)
    if sampling.sampler not in (None, *fitting):
        raise ValueError(
            f"sampling.sampler: got {sampling.sampler!r}; diffusion.noise_levels {diffusion.noise_levels!r} needs "
            f"one of {', '.join(fitting)}"
        )
    levels, steps = diffusion.num_train_timesteps, sampling.num_inference_steps
    if diffusion.is_discrete and steps > levels:
        raise ValueError(
            f"sampling.num_inference_steps: got {steps}; expected at most diffusion.num_train_timesteps = {levels}"
        )
