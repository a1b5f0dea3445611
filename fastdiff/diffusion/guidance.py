"""Classifier-free guidance (Ho & Salimans, 2022): a prediction moved away from the one without the condition."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.device import autocast

if TYPE_CHECKING:
    from fastdiff.diffusion.continuous import Diffusion

Condition = Mapping[str, Tensor | None]  # keyword arguments of a network; each tensor is [B, ...]


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """u + scale·(c - u), elementwise: 1 gives the conditional prediction, more moves further away from u."""
    return unconditional + scale * (conditional - unconditional)


def join_halves(conditional: Condition, null: Condition) -> Condition:
    """Both conditions in one batch, the conditional half first. Raises ValueError where they do not fit together."""
    if conditional.keys() != null.keys():
        raise ValueError(
            f"null: got {', '.join(null) or 'nothing'}; expected the names of conditional, "
            f"{', '.join(conditional) or 'none'}"
        )
    both: dict[str, Tensor | None] = {}
    for name, value in conditional.items():
        shapes = [None if half is None else list(half.shape) for half in (value, null[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"null: got {name} of shape {shapes[1]}; expected conditional's, {shapes[0]}")
        both[name] = None if value is None else torch.cat([value, null[name]])
    return both


class Guided:
    """A network with its condition bound, under classifier-free guidance: what `sample` takes as `predict`.

    Inside the interval each call is one forward pass of 2·B samples, the conditional half first; outside, and without
    guidance, one of the B conditional ones.

    Args:
        predict: called as predict(x [N, C, ...], time [N], **condition), N being B or 2·B; gives [N, C, ...], or
            [N, 2·C, ...] with a learnt variance, which is never guided.
        conditional: the condition: keyword arguments of `predict`, each [B, ...] or None.
        null: the condition that stands for none, with the same names; None is allowed where guidance_scale is 1.
        diffusion: tells how noisy a time is.
        guidance_scale: w of u + w·(c - u); 1 is no guidance.
        guidance_interval: (low, high) noise times in [0, 1], 1 being pure noise, between which guidance is on
            (Kynkäänniemi et al., 2024).
        guidance_channels: guides this many of the first channels only (3 in facebookresearch/DiT); None is all.
        join: makes one condition of 2·B samples of `conditional` and `null`.
        autocast_dtype: runs `predict` under autocast, e.g. torch.bfloat16.

    Raises:
        ValueError: a scale or an interval out of range, or conditions that do not fit together.
    """

    def __init__(
        self,
        predict: Callable[..., Tensor],
        conditional: Condition,
        null: Condition | None,
        diffusion: "Diffusion",
        *,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        join: Callable[[Condition, Condition], Condition] = join_halves,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        check_guidance(guidance_scale, guidance_interval, guidance_channels)
        if guidance_scale != 1 and null is None:
            raise ValueError(f"null: got None with guidance_scale {guidance_scale}; expected the condition of none")
        self.predict, self.conditional, self.diffusion = predict, conditional, diffusion
        self.scale, self.interval, self.channels = guidance_scale, tuple(guidance_interval), guidance_channels
        self.autocast_dtype = autocast_dtype
        self.both = None if guidance_scale == 1 else join(conditional, null)

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:  # [B, C, ...], [B] -> as `predict`, float32
        if not self._acts(time):
            return self._run(x, time, self.conditional)
        conditional, unconditional = self._run(torch.cat([x, x]), torch.cat([time, time]), self.both).chunk(2)
        channels = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
        guided = guide(conditional[:, :channels], unconditional[:, :channels], self.scale)
        if channels == conditional.shape[1]:
            return guided
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    def _acts(self, time: Tensor) -> bool:
        if self.both is None or self.interval == (0, 1):  # no need to wait for a device to tell the time
            return self.both is not None
        low, high = self.interval
        return low <= float(self.diffusion.noise_share(self.diffusion.level(time[0]))) <= high

    def _run(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        with autocast(x.device, self.autocast_dtype):
            return self.predict(x, time, **condition).float()


def check_guidance(
    guidance_scale: float, guidance_interval: tuple[float, float], guidance_channels: int | None = None
) -> None:
    """Raises ValueError where the scale is not finite, the interval not 0 <= low <= high <= 1, or channels below 1.

    Raises TypeError where they are no numbers.
    """
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, numbers.Real):
        raise TypeError(f"guidance_scale: got {guidance_scale!r}; expected a number")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}; expected a finite number")
    try:
        fits = len(guidance_interval) == 2 and 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
    except TypeError:
        raise TypeError(f"guidance_interval: got {guidance_interval!r}; expected two numbers, (low, high)") from None
    if not fits:
        raise ValueError(f"guidance_interval: got {tuple(guidance_interval)}; expected 0 <= low <= high <= 1")
    if guidance_channels is None:
        return
    if isinstance(guidance_channels, bool) or not isinstance(guidance_channels, int):
        raise TypeError(f"guidance_channels: got {guidance_channels!r}; expected a whole number, or None for all")
    if guidance_channels < 1:
        raise ValueError(f"guidance_channels: got {guidance_channels}; expected at least 1, or None for all")
