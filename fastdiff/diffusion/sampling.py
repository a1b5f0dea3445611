"""Drawing samples: a prediction with its condition bound, and a step rule around it (fastdiff.diffusion.steps)."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.diffusion.continuous import Diffusion, Predict, split_variance
from fastdiff.diffusion.steps import STEPS, Steps, fresh_noise

_LEAST_SEED, _LARGEST_SEED = -(2**63), 2**64 - 1  # of torch.Generator


@torch.no_grad()
def sample(
    predict: Predict,
    diffusion: Diffusion,
    shape: Sequence[int],
    *,
    device: torch.device | str,
    num_inference_steps: int | None = None,
    seed: int | Sequence[int] = 0,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:  # of `shape`, float32
    """Draws samples of any shape [B, C, ...] under any condition. On one machine the same arguments give the same bits.

    Args:
        predict: called as predict(x, time) with x of `shape` and the time [B] as networks get it
            (`Diffusion.model_time`), as in `Diffusion.loss`; gives the prediction, [B, C, ...], or [B, 2·C, ...] with a
            learnt variance in the second half. What it is conditioned on is bound by the caller: use
            `functools.partial(model, class_labels=labels)`, `Guided`, or any function.
        shape: [B, C, ...], the shape of all samples together.
        device: where they are drawn.
        num_inference_steps: calls of `predict`; None is 25, or the number of `timesteps`.
        seed: a number (sample i then has seed + i), or one number per sample. A sample's noise depends on its own seed
            alone, neither on its place in the batch nor on the device.
        callback: called after each step as callback(step, noise time in [0, 1], x after the step, predicted image).
        progress: shows a progress bar.
        options: fields of `SamplerOptions`: sampler, timestep_spacing, steps_offset, timesteps, set_alpha_to_one,
            clip_sample, use_clipped_model_output, variance_type. What is None or not given is as the diffusion has it
            (`Diffusion.sampler_options`: what its scheduler_config.json says, or else the defaults).

    Raises:
        ValueError: a shape that is none, a sampler that does not fit, an option that the sampler does not have, too
            many steps, a seed that torch has no generator for, or a list of seeds of another length.
        TypeError: an argument of another type, or an option that there is not. Messages name the argument and what was
            expected; both come before any work.
    """
    shape, device = _as_shape(shape), torch.device(device)
    generators = [torch.Generator().manual_seed(s) for s in seeds_of(seed, shape[0])]
    steps = make_steps(diffusion, num_inference_steps, options, generators)
    if not shape[0]:
        return torch.empty(shape, device=device)
    x = fresh_noise(generators, shape[1:], device)
    with _casts_kept(device):
        for index, level in enumerate(tqdm(steps.times, disable=not progress, desc="sampling")):
            t = level.to(device).expand(shape[0])
            prediction, variance = split_variance(predict(x, diffusion.model_time(t)).float(), shape[1])
            unclipped = diffusion.predicted_x0(prediction, x, t)
            clip = steps.options.clip_sample
            x0 = unclipped if clip is None else unclipped.clamp(-clip, clip)
            x = steps.step(index, x, x0, unclipped, variance)
            if callback is not None:
                callback(index, float(diffusion.noise_share(level)), x, x0)
    return x


def _casts_kept(device: torch.device) -> torch.autocast:
    """A block in which autocast is on or off as it is outside, and casts a model's weights once, not at every step.

    Autocast forgets its casts where the outermost of its blocks ends, and `predict` may open one at each call.
    """
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))


def make_steps(
    diffusion: Diffusion,
    num_inference_steps: int | None,
    options: dict[str, Any],
    generators: list[torch.Generator] | None = None,
) -> Steps:
    """The steps that `sample` takes under these arguments. Raises as it does."""
    config = diffusion.config
    chosen = diffusion.sampler_options.replaced(options, config)
    count = chosen.step_count(config, num_inference_steps)
    return STEPS[chosen.sampler_of(config)](diffusion, chosen, count, generators or [])


def seeds_of(seed: int | Sequence[int], count: int) -> list[int]:
    """The seed of each of `count` samples: seed + i, or those of a list. Raises as `sample` does."""
    try:
        listed = not isinstance(seed, int | np.integer | str) and getattr(seed, "ndim", 1) > 0
        seeds = [_whole(each) for each in seed] if listed else [_whole(seed) + index for index in range(count)]
    except TypeError:
        raise TypeError(f"seed: got {seed!r}; expected a whole number, or a list of them") from None
    if len(seeds) != count:
        raise ValueError(f"seed: got {len(seeds)} seeds; expected one number, or one for each of the {count} samples")
    for each in seeds:
        if not _LEAST_SEED <= each <= _LARGEST_SEED:
            raise ValueError(f"seed: got {each}; expected at most {_LARGEST_SEED} (2^64 - 1), and at least -2^63")
    return seeds


def _whole(value: Any) -> int:
    """An integer of Python, NumPy or torch."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _as_shape(shape: Sequence[int]) -> tuple[int, ...]:
    expected = "expected [B, C, ...], the sizes of all samples together (sample_classes takes class labels)"
    sizes = list(shape) if isinstance(shape, Tensor | Sequence) and not isinstance(shape, str) else None
    if sizes is None:
        raise TypeError(f"shape: got {shape!r}; {expected}")
    try:
        counts = () if isinstance(shape, Tensor) else tuple(_whole(size) for size in sizes)
    except TypeError:
        counts = ()
    if len(counts) < 2 or counts[0] < 0 or min(counts[1:]) < 1:
        raise ValueError(f"shape: got {sizes}; {expected}")
    return counts
