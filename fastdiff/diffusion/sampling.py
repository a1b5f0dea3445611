"""Drawing samples: classifier-free guidance around a step rule.

The step rules are diffusers' schedulers, fed with the predicted image, and re-noising, the sampler of latent
Fashion-MNIST diffusion: predict the image, add fresh noise of the next lower level, repeat.
"""

import math
from collections.abc import Callable, Mapping, Sequence

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

from fastdiff.device import autocast, evaluating
from fastdiff.diffusion.continuous import Diffusion, DiffusionConfig, split_variance

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
    model: torch.nn.Module,
    diffusion: Diffusion,
    class_labels: Tensor | Sequence[int],  # [B] int64
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    sampler: str | None = None,
    seed: int | Sequence[int] = 0,
    sample_size: int | tuple[int, int] | tuple[int, int, int] | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    null_conditioning: Mapping[str, Tensor] | None = None,
    clip_sample: float | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> Tensor:  # [B, C, H, W], float32
    """Draws one sample a label. On one machine the same arguments give the same bits.

    Args:
        model: a `DiT`, or any module called as model(x [B, C, H, W], time [B], labels [B], **conditioning). It runs
            in eval mode and gets its mode back.
        class_labels: a label a sample.
        num_inference_steps: forward passes (of two halves where guided).
        guidance_scale: w of classifier-free guidance, uncond + w·(cond - uncond); 1 is none.
        guidance_interval: (low, high) noise times in [0, 1], 1 being pure noise, between which guidance is on
            (Kynkäänniemi et al., 2024). Outside, one forward pass of the conditional half is made.
        guidance_channels: guide this many channels only (3 in facebookresearch/DiT); None is all. A learnt variance
            is never guided.
        sampler: one of `samplers_for(diffusion.config)`; None is the first of them.
        seed: a number (sample i then has seed + i), or a list of one a sample. A sample's noise depends on its own
            seed alone, neither on its place in the batch nor on the device.
        sample_size: H = W, (H, W) or (C, H, W); None is the model's `config.image_size` and `in_channels`.
        conditioning: further keyword arguments of the model, each `[B, ...]`.
        null_conditioning: what they are for the unconditional half; zeros where not given.
        clip_sample: clamps each predicted image to ± this value.
        callback: called after each step as callback(step, noise time in [0, 1], x after the step, predicted image).
        progress: show a progress bar.
        autocast_dtype: run the model under autocast, e.g. torch.bfloat16.

    Raises:
        ValueError: a sampler that does not fit, a label out of range, too many steps, or a list of seeds of another
            length; the message names the argument and what was expected.
        TypeError: labels that are not integers.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    labels = _as_labels(class_labels)
    config = getattr(model, "config", None)
    _check_labels(labels, config, guidance_scale)
    shape = (len(labels), *_sample_shape(sample_size, config))
    check_interval(guidance_interval)
    guided = _Guidance(
        model, labels.to(device), guidance_scale, guidance_interval, guidance_channels,
        conditioning or {}, null_conditioning or {}, autocast_dtype,
    )  # fmt: skip
    with evaluating(model):
        return denoise(
            guided, diffusion, shape, device, num_inference_steps=num_inference_steps, sampler=sampler, seed=seed,
            clip_sample=clip_sample, callback=callback, progress=progress,
        )  # fmt: skip


@torch.no_grad()
def denoise(
    predict: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor | None]],
    diffusion: Diffusion,
    shape: Sequence[int],
    device: torch.device,
    *,
    num_inference_steps: int = 25,
    sampler: str | None = None,
    seed: int | Sequence[int] = 0,
    clip_sample: float | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:  # of `shape`, float32
    """The loop of `sample`, over tensors of any shape [B, ...] and any predictor.

    Args:
        predict: called as predict(x, time [B] as networks get it, noise time in [0, 1]); gives the prediction, of x's
            shape, and a variance or None.
        shape: of all samples together.
        device: where they are drawn.

    The other arguments and errors are those of `sample`.
    """
    count = shape[0]
    generators = [torch.Generator().manual_seed(s) for s in _seeds(seed, count)]
    steps = _make_steps(sampler, diffusion, num_inference_steps, device, generators)
    if not count:
        return torch.empty(tuple(shape), device=device)
    x = _noise(generators, shape[1:], device)
    for index in tqdm(range(len(steps.times)), disable=not progress, desc="sampling"):
        t = steps.times[index].to(device).expand(count)
        fraction = float(steps.fractions[index])
        prediction, variance = predict(x, diffusion.model_time(t), fraction)
        x0 = diffusion.predicted_x0(prediction, x, t)
        if clip_sample is not None:
            x0 = x0.clamp(-clip_sample, clip_sample)
        x = steps.step(index, x, x0, variance)
        if callback is not None:
            callback(index, fraction, x, x0)
    return x


class _Guidance:
    """The model's prediction under classifier-free guidance."""

    def __init__(self, model, labels, scale, interval, channels, conditioning, null_conditioning, autocast_dtype):
        self.model, self.labels, self.scale, self.interval, self.channels = model, labels, scale, interval, channels
        self.conditioning, self.autocast_dtype = dict(conditioning), autocast_dtype
        if scale != 1:
            null = torch.full_like(labels, model.config.num_classes)
            self.both_labels = torch.cat([labels, null])
            self.both_conditioning = {
                name: torch.cat([value, null_conditioning.get(name, torch.zeros_like(value))])
                for name, value in self.conditioning.items()
            }

    def __call__(self, x: Tensor, time: Tensor, fraction: float) -> tuple[Tensor, Tensor | None]:
        channels = x.shape[1]
        if self.scale == 1 or not self.interval[0] <= fraction <= self.interval[1]:
            return split_variance(self._run(x, time, self.labels, self.conditioning), channels)
        both = self._run(torch.cat([x, x]), torch.cat([time, time]), self.both_labels, self.both_conditioning)
        conditional, unconditional = both.chunk(2)
        prediction, variance = split_variance(conditional, channels)
        base = unconditional[:, :channels]
        guided = base + self.scale * (prediction - base)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], prediction[:, self.channels :]], dim=1)
        return guided, variance

    def _run(self, x: Tensor, time: Tensor, labels: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        parameter = next(self.model.parameters(), x)
        x = x.to(parameter.dtype)  # a model may be in half precision; the samples are not
        with autocast(x.device, self.autocast_dtype):
            return self.model(x, time, labels, **conditioning).float()


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
        self.fractions = (self.times + 1) / total

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
        self.times = self.fractions = self.scheduler.sigmas[:-1].float()

    def step(self, index: int, x: Tensor, x0: Tensor, variance: Tensor | None) -> Tensor:
        output = (x - x0) / self.times[index].to(x.device) if self.is_euler else x0
        return self.scheduler.step(output, self.scheduler.timesteps[index], x).prev_sample


class _RenoiseSteps:
    """Predict the image, then noise it afresh to the next of evenly spaced levels."""

    def __init__(self, sampler: str, diffusion: Diffusion, count: int, device, generators) -> None:
        self.times = self.fractions = torch.linspace(*_RENOISE_LEVELS, count)
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


def check_interval(interval: tuple[float, float]) -> None:
    """Raises ValueError where a guidance interval is not 0 <= low <= high <= 1."""
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval: got {tuple(interval)}; expected 0 <= low <= high <= 1")


def _as_labels(class_labels: Tensor | Sequence[int]) -> Tensor:  # [B], int64
    labels = torch.as_tensor(class_labels).flatten()
    if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"class_labels: got dtype {labels.dtype}; expected int64")
    return labels.to(torch.int64)


def _check_labels(labels: Tensor, config, guidance_scale: float) -> None:
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}; expected a finite number")
    num_classes = getattr(config, "num_classes", None)
    if num_classes is None:
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale: got {guidance_scale}; a model without config.num_classes takes 1 only")
        return
    if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) <= num_classes):
        raise ValueError(
            f"class_labels: got values {int(labels.min())}..{int(labels.max())}; expected 0..{num_classes} "
            f"({num_classes} is the null label)"
        )


def _sample_shape(sample_size, config) -> tuple[int, int, int]:
    if sample_size is None and config is None:
        raise ValueError("sample_size: got None for a model without a config; expected (channels, height, width)")
    size = config.image_size if sample_size is None else sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) == 2 and config is not None:
        size = (config.in_channels, *size)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"sample_size: got {sample_size}; expected H, (H, W) or (channels, H, W)")
    return size


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [seed + index for index in range(count)] if isinstance(seed, int) else [int(s) for s in seed]
    if len(seeds) != count:
        raise ValueError(f"seed: got {len(seeds)} seeds; expected one number, or one for each of the {count} samples")
    return seeds


def _noise(generators: list[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise, a generator a sample, drawn on the CPU: the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
