"""Which Gaussian diffusion: its noise levels and what the network predicts."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")
DISCRETE_LEVELS = ("linear", "cosine", "scaled_linear")
CONTINUOUS_LEVELS = ("uniform", "logit_normal", "beta")
_BETA_RANGES = {"linear": (1e-4, 2e-2), "scaled_linear": (8.5e-4, 1.2e-2)}


@dataclass
class DiffusionConfig:
    """Noise levels and target of a diffusion.

    Attributes:
        prediction_type: What the network predicts: "epsilon" (the noise), "sample" (the image), "v_prediction"
            (α·noise - σ·image) or "flow" (noise - image; continuous levels only).
        noise_levels: Discrete: "linear", "cosine" or "scaled_linear" β. Continuous: t drawn from "uniform" on [0, 1],
            "logit_normal" or "beta" (the Beta distribution).
        num_train_timesteps: Number of discrete levels; with continuous ones the default of time_scale.
        beta_start: First β of "linear" (default 0.0001) or "scaled_linear" (0.00085).
        beta_end: Last β of "linear" (default 0.02) or "scaled_linear" (0.012).
        beta_a: First parameter of the Beta distribution of "beta".
        beta_b: Second parameter; Beta(1, 2.5) favours low noise.
        logit_normal_mean: Mean of logit(t) for "logit_normal".
        logit_normal_std: Standard deviation of logit(t).
        time_scale: Continuous t is multiplied by it before the network sees it; null is num_train_timesteps. With
            discrete levels the network sees (level + 1) / num_train_timesteps times it (LLM2DiT: 1); null is the level
            itself.
        time_range: Continuous training times below the first number are raised to it, those above the second lowered:
            [0.01, 0.99] are the ends of "renoise". null takes them as they are drawn.
    """

    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow"] = "flow"
    noise_levels: Literal["linear", "cosine", "scaled_linear", "uniform", "logit_normal", "beta"] = "logit_normal"
    num_train_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    beta_a: float = 1.0
    beta_b: float = 2.5
    logit_normal_mean: float = 0.0
    logit_normal_std: float = 1.0
    time_scale: float | None = None
    time_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        known = {"prediction_type": PREDICTION_TYPES, "noise_levels": DISCRETE_LEVELS + CONTINUOUS_LEVELS}
        for name, names in known.items():
            value = getattr(self, name)
            if value not in names:
                raise ValueError(f"DiffusionConfig.{name}: got {value!r}; expected one of {', '.join(names)}")
        if self.prediction_type == "flow" and self.is_discrete:
            raise ValueError(
                f"DiffusionConfig.noise_levels: got {self.noise_levels!r} with prediction_type 'flow'; "
                f"expected one of {', '.join(CONTINUOUS_LEVELS)}"
            )
        for name in ("num_train_timesteps", "beta_a", "beta_b", "logit_normal_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"DiffusionConfig.{name}: got {getattr(self, name)}; expected a positive number")
        if self.time_scale is not None and not 0 < self.time_scale < math.inf:
            raise ValueError(f"DiffusionConfig.time_scale: got {self.time_scale}; expected a positive number, or null")
        if self.noise_levels in _BETA_RANGES and not 0 < self.beta_range[0] <= self.beta_range[1] < 1:
            raise ValueError(
                f"DiffusionConfig.beta_start, beta_end: got {self.beta_range}; expected 0 < beta_start <= beta_end < 1"
            )
        if self.time_range is not None:
            self._check_time_range()

    def _check_time_range(self) -> None:
        if self.is_discrete:
            raise ValueError(
                f"DiffusionConfig.time_range: got {self.time_range} with noise_levels {self.noise_levels!r}; expected "
                f"none, or one of {', '.join(CONTINUOUS_LEVELS)}"
            )
        try:
            low, high = self.time_range
            fits = 0 <= low < high <= 1
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"DiffusionConfig.time_range: got {self.time_range}; expected two numbers, 0 <= lowest < highest <= 1"
            )
        self.time_range = (low, high)

    @property
    def is_discrete(self) -> bool:
        return self.noise_levels in DISCRETE_LEVELS

    @property
    def beta_range(self) -> tuple[float, float]:
        start, end = _BETA_RANGES[self.noise_levels]
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )


def discrete_betas(config: DiffusionConfig) -> Tensor:  # [T], float64
    """The β of each discrete level: Ho et al. (2020), Rombach et al. (2022), Nichol & Dhariwal (2021) for "cosine"."""
    steps = config.num_train_timesteps
    if config.noise_levels == "cosine":
        angles = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * (math.pi / 2)
        alphas_cumprod = angles.cos().square()
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    start, end = config.beta_range
    if config.noise_levels == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
