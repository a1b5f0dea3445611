"""Drawing samples: a prediction with its condition bound, and a step rule around it.

The step rules are diffusers' schedulers, fed with the predicted image, and re-noising, the sampler of latent
Fashion-MNIST diffusion: predict the image, add fresh noise of the next lower level, repeat.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.continuous import Diffusion, Predict, split_variance

SAMPLERS = ("euler", "renoise", "dpm-solver++", "ddim", "ddpm")
_RENOISE_LEVELS = (0.99, 0.01)  # first and last noise level of "renoise"


def samplers_for(config: DiffusionConfig) -> tuple[str, ...]:
    """The samplers that fit noise levels and prediction type, the default one first."""
    if config.is_discrete:
        return ("ddim", "ddpm", "dpm-solver++")
    if config.prediction_type == "epsilon":
        return ("renoise",)  # the others start at t = 1, where predicted noise says nothing about the image
    return ("euler", "dpm-solver++", "renoise")


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: Diffusion,
    shape: Sequence[int],
    *,
    device: torch.device | str,
    num_inference_steps: int = 25,
    sampler: str | None = None,
    seed: int | Sequence[int] = 0,
    clip_sample: float | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:  # of `shape`, float32
    """Draws samples of any shape [B, C, ...] under any condition. On one machine the same arguments give the same bits.

    Args:
        predict: called as predict(x, time) with x of `shape` and the time [B] as networks get it
            (`Diffusion.model_time`), as in `Diffusion.loss`; gives the prediction, [B, C, ...], or [B, 2·C, ...] with a
            learnt variance in the second half. What it is conditioned on is bound by the caller: use
            `functools.partial(model, class_labels=labels)`, `Guided`, or any function.
        shape: [B, C, ...], the shape of all samples together.
        device: where they are drawn.
        num_inference_steps: calls of `predict`.
        sampler: one of `samplers_for(diffusion.config)`; None is the first of them.
        seed: a number (sample i then has seed + i), or one number per sample. A sample's noise depends on its own seed
            alone, neither on its place in the batch nor on the device.
        clip_sample: clamps each predicted image to ± this value.
        callback: called after each step as callback(step, noise time in [0, 1], x after the step, predicted image).
        progress: shows a progress bar.

    Raises:
        ValueError: a shape that is none, a sampler that does not fit, too many steps, or a list of seeds of another
            length; the message names the argument and what was expected.
    """
    shape, device = _as_shape(shape), torch.device(device)
    generators = [torch.Generator().manual_seed(s) for s in _seeds(seed, shape[0])]
    steps = _make_steps(sampler, diffusion, num_inference_steps, device, generators)
    if not shape[0]:
        return torch.empty(shape, device=device)
    x = _noise(generators, shape[1:], device)
    for index, level in enumerate(tqdm(steps.times, disable=not progress, desc="sampling")):
        t = level.to(device).expand(shape[0])
        prediction, variance = split_variance(predict(x, diffusion.model_time(t)).float(), shape[1])
        x0 = diffusion.predicted_x0(prediction, x, t)
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
        x = steps.step(index, x, x0, variance)
        if callback is not None:
            callback(index, float(diffusion.noise_share(level)), x, x0)
    return x


class _DiscreteSteps:
    """DDPM, DDIM and DPM-Solver++ over a table of β."""

    def __init__(self, sampler: str, diffusion: Diffusion, count: int, device, generators) -> None:
        total = diffusion.config.num_train_timesteps
        options = dict(num_train_timesteps=total, trained_betas=diffusion.betas.numpy(), prediction_type="sample")
        # DDIM and DDPM step by total // count. Counted from this offset, the last step ends at the image itself.
        spacing = dict(timestep_spacing="leading", steps_offset=total // count - 1, clip_sample=False)
        self.generators, self.is_ddpm = generators, sampler == "ddpm"
        if self.is_ddpm:
            self.scheduler = DDPMScheduler(**options, **spacing)
            self.learned = DDPMScheduler(**options, **spacing, variance_type="learned_range")
            self.learned.set_timesteps(count, device=device)
        elif sampler == "ddim":
            self.scheduler = DDIMScheduler(**options, **spacing)
        else:
            self.scheduler = DPMSolverMultistepScheduler(**options)
        self.scheduler.set_timesteps(count, device=device)
        self.times = self.scheduler.timesteps

    def step(self, index: int, x: Tensor, x0: Tensor, variance: Tensor | None) -> Tensor:
        t = self.times[index]
        if not self.is_ddpm:
            return self.scheduler.step(x0, t, x).prev_sample
        scheduler, output = self.scheduler, x0
        if variance is not None:
            scheduler, output = self.learned, torch.cat([x0, variance], dim=1)
        return scheduler.step(output, t, x, generator=self.generators).prev_sample


class _FlowSteps:
    """Euler and DPM-Solver++ along x_t = (1 - t)·x0 + t·noise, from t = 1 to 0."""

    def __init__(self, sampler: str, diffusion: Diffusion, count: int, device, generators) -> None:
        total = diffusion.config.num_train_timesteps
        self.is_euler = sampler == "euler"
        if self.is_euler:
            self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=total)
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), device=device)
        else:
            self.scheduler = DPMSolverMultistepScheduler(
                num_train_timesteps=total, use_flow_sigmas=True, prediction_type="sample"
            )
            self.scheduler.set_timesteps(count, device=device)
        self.times = self.scheduler.sigmas[:-1].float()

    def step(self, index: int, x: Tensor, x0: Tensor, variance: Tensor | None) -> Tensor:
        output = (x - x0) / self.times[index].to(x.device) if self.is_euler else x0
        return self.scheduler.step(output, self.scheduler.timesteps[index], x).prev_sample


class _RenoiseSteps:
    """Predict the image, then noise it afresh to the next of evenly spaced levels."""

    def __init__(self, sampler: str, diffusion: Diffusion, count: int, device, generators) -> None:
        self.times = torch.linspace(*_RENOISE_LEVELS, count)
        self.diffusion, self.generators = diffusion, generators

    def step(self, index: int, x: Tensor, x0: Tensor, variance: Tensor | None) -> Tensor:
        if index + 1 == len(self.times):
            return x0
        t = self.times[index + 1].to(x.device).expand(len(x))
        return self.diffusion.add_noise(x0, _noise(self.generators, x.shape[1:], x.device), t)


def _make_steps(sampler, diffusion: Diffusion, count: int, device, generators):
    config = diffusion.config
    fitting = samplers_for(config)
    sampler = fitting[0] if sampler is None else sampler
    if sampler not in fitting:
        raise ValueError(
            f"sampler: got {sampler!r} for prediction_type {config.prediction_type!r} with noise_levels "
            f"{config.noise_levels!r}; expected one of {', '.join(fitting)}"
        )
    if count < 1 or (config.is_discrete and count > config.num_train_timesteps):
        most = f"..{config.num_train_timesteps}" if config.is_discrete else " or more"
        raise ValueError(f"num_inference_steps: got {count}; expected 1{most}")
    kind = _DiscreteSteps if config.is_discrete else _RenoiseSteps if sampler == "renoise" else _FlowSteps
    return kind(sampler, diffusion, count, device, generators)


def _as_shape(shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, Tensor) or len(shape) < 2 or shape[0] < 0 or min(shape[1:]) < 1:
        raise ValueError(
            f"shape: got {list(shape)}; expected [B, C, ...], the sizes of all samples together "
            "(sample_classes takes class labels)"
        )
    return tuple(shape)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed + index for index in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise ValueError(f"seed: got {len(seeds)} seeds; expected one number, or one for each of the {count} samples")
    return seeds


def _noise(generators: list[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise, one generator per sample, drawn on the CPU: the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
