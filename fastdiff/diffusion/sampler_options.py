"""Which sampler a Gaussian diffusion is sampled by, and its terms, in the words of diffusers' schedulers."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.timesteps import SPACINGS, spaced_timesteps

SAMPLERS = ("euler", "renoise", "dpm-solver++", "ddim", "ddpm")
VARIANCE_TYPES = ("learned_range", "fixed_small", "fixed_large")
Sampler = Literal["euler", "ddpm", "ddim", "dpm-solver++", "renoise"]
Spacing = Literal["strided", "trailing", "leading", "linspace", "respacing", "ddim_respacing"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]

_FLOW_SPACINGS = ("trailing", "linspace")  # of "euler"
_DISCRETE = ("ddim", "ddpm", "dpm-solver++")
# Which samplers have an option; those not named here all of them have.
_TAKEN_BY = {
    "timestep_spacing": (*_DISCRETE, "euler"),
    "steps_offset": _DISCRETE,
    "timesteps": (*_DISCRETE, "euler"),
    "set_alpha_to_one": ("ddim",),
    "use_clipped_model_output": ("ddim",),
    "variance_type": ("ddpm",),
}


def samplers_for(config: DiffusionConfig) -> tuple[str, ...]:
    """The samplers that fit noise levels and prediction type, the default one first."""
    if config.is_discrete:
        return ("ddim", "ddpm", "dpm-solver++")
    if config.prediction_type == "epsilon":
        return ("renoise",)  # the others start at t = 1, where predicted noise says nothing about the image
    return ("euler", "dpm-solver++", "renoise")


@dataclass(frozen=True)
class SamplerOptions:
    """How samples are denoised, where `sample` is not told otherwise. `Diffusion.from_pretrained` reads it.

    Attributes:
        sampler: One of `samplers_for(config)`; None is the first of them.
        timestep_spacing: Which levels the steps visit. "trailing", "leading" and "linspace" are those of diffusers'
            schedulers, step for step: its DDIM goes from t to t - T // steps, wherever the next step stands.
            "respacing" and "ddim_respacing" are facebookresearch/DiT's timestep_respacing, "50" and "ddim50" at 50
            steps. "strided" is every (T // steps)-th level, counted from the image, so that the last step ends at the
            image; it is "trailing" where steps divide T. None is "strided", with "dpm-solver++" "linspace". With
            "euler" it is "trailing" (t = 1, 1 - 1/steps, …; the default) or "linspace" (evenly from 1 to 1/T, as
            FlowMatchEulerDiscreteScheduler without sigmas).
        steps_offset: Added to the timesteps of "leading".
        timesteps: The levels themselves, in falling order: 0 … T - 1, or with "euler" times in (0, 1]. They replace
            the spacing; each step goes to the next of them, the last one to the image.
        set_alpha_to_one: DDIM's last step ends at the image; false: at level 0, which has a little noise.
        clip_sample: Clamps each predicted image to ± this value; None (or infinity) does not.
        use_clipped_model_output: Where DDIM clips, the noise is derived from the clipped image, as in
            facebookresearch/DiT; false keeps the network's noise, as diffusers does.
        variance_type: Of DDPM: "learned_range" (the network's, between the other two), "fixed_small" (of the
            posterior) or "fixed_large" (β). None is what the network predicts, or "fixed_small". The last step adds no
            noise, whichever level it starts from (diffusers' DDPMScheduler adds some where that is not level 0).

    Raises ValueError or TypeError for a value that is none of these; the message names the option.
    """

    sampler: Sampler | None = None
    timestep_spacing: Spacing | None = None
    steps_offset: int = 0
    timesteps: tuple[float, ...] | None = None
    set_alpha_to_one: bool = True
    clip_sample: float | None = None
    use_clipped_model_output: bool = False
    variance_type: Variance | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("sampler", SAMPLERS), ("timestep_spacing", SPACINGS), ("variance_type", VARIANCE_TYPES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(known)}")
        if not _is_number(self.steps_offset, int) or self.steps_offset < 0:
            raise ValueError(f"steps_offset: got {self.steps_offset!r}; expected a whole number of 0 or more")
        for name in ("set_alpha_to_one", "use_clipped_model_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected True or False")
        if self.clip_sample is not None and not (_is_number(self.clip_sample, int | float) and self.clip_sample > 0):
            raise ValueError(f"clip_sample: got {self.clip_sample!r}; expected a positive number, or None")
        if self.clip_sample == math.inf:
            object.__setattr__(self, "clip_sample", None)
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _as_timesteps(self.timesteps))

    def replaced(self, given: Mapping[str, Any], config: DiffusionConfig) -> "SamplerOptions":
        """These options with those of `given` that are not None in their place, checked against a diffusion.

        An offset belongs to "leading": it goes where another spacing is given. Raises TypeError for a name that is no
        option, ValueError for a sampler that does not fit the diffusion and for an option that the sampler does not
        have.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in given:
            if name not in names:
                raise TypeError(f"{name}: got an option that there is not; expected {', '.join(names)}")
        given = {name: value for name, value in given.items() if value is not None}
        _check_fits(given.get("sampler"), config)
        kept = {}
        if given.get("timesteps") is not None or given.get("timestep_spacing", "leading") != "leading":
            kept["steps_offset"] = 0
        if "timestep_spacing" in given:
            kept["timesteps"] = None
        options = dataclasses.replace(self, **{**kept, **given})
        sampler = options.sampler_of(config)
        for name, value in given.items():
            if name != "sampler":
                _check_taken(name, value, sampler, options, config)
        return options

    def sampler_of(self, config: DiffusionConfig) -> str:
        """The sampler's name. Raises ValueError for one that does not fit the diffusion."""
        _check_fits(self.sampler, config)
        return self.sampler or samplers_for(config)[0]

    def step_count(self, config: DiffusionConfig, num_inference_steps: int | None) -> int:
        """The number of steps; None is that of `timesteps`, or 25.

        Raises ValueError for a number that does not fit the diffusion or `timesteps`, TypeError for what is no number.
        """
        count = num_inference_steps
        if count is None:
            count = 25 if self.timesteps is None else len(self.timesteps)
        if not _is_number(count, int | np.integer):
            raise TypeError(f"num_inference_steps: got {count!r}; expected a whole number")
        if count < 1 or (config.is_discrete and count > config.num_train_timesteps):
            most = f"..{config.num_train_timesteps}" if config.is_discrete else " or more"
            raise ValueError(f"num_inference_steps: got {count}; expected 1{most}")
        if self.timesteps is not None and count != len(self.timesteps):
            raise ValueError(f"timesteps: got {len(self.timesteps)} with num_inference_steps {count}; expected as many")
        return count

    def levels(self, config: DiffusionConfig, count: int) -> list[int]:
        """The discrete levels of each step, falling. Raises ValueError where there are none beyond, or too many."""
        total = config.num_train_timesteps
        if self.timesteps is not None:
            levels = list(self.timesteps)
            if any(level != int(level) or not 0 <= level < total for level in levels):
                raise ValueError(f"timesteps: got {_shown(levels)}; expected whole numbers of 0..{total - 1}")
            return [int(level) for level in levels]
        sampler = self.sampler_of(config)
        spacing = self.timestep_spacing or ("linspace" if sampler == "dpm-solver++" else "strided")
        return spaced_timesteps(spacing, total, count, self.steps_offset, is_solver=sampler == "dpm-solver++")

    def times(self, config: DiffusionConfig, count: int) -> list[float]:
        """The noise times of "euler", falling, in (0, 1]. Raises ValueError where they are not."""
        if self.timesteps is not None:
            if not all(0 < t <= 1 for t in self.timesteps):
                raise ValueError(
                    f"timesteps: got {_shown(self.timesteps)} with noise_levels {config.noise_levels!r}; expected "
                    "noise times in (0, 1]"
                )
            return list(self.timesteps)
        last = 1 / (config.num_train_timesteps if self.timestep_spacing == "linspace" else count)
        return [1 + (last - 1) * index / max(count - 1, 1) for index in range(count)]


def _check_fits(sampler: str | None, config: DiffusionConfig) -> None:
    fitting = samplers_for(config)
    if sampler not in (None, *fitting):
        raise ValueError(
            f"sampler: got {sampler!r} for prediction_type {config.prediction_type!r} with noise_levels "
            f"{config.noise_levels!r}; expected one of {', '.join(fitting)}"
        )


def _check_taken(name: str, value: Any, sampler: str, options: SamplerOptions, config: DiffusionConfig) -> None:
    """Raises ValueError for an option that was given and would do nothing."""
    if value == getattr(SamplerOptions, name):  # as where it is not given
        return
    takers = [each for each in _TAKEN_BY.get(name, SAMPLERS) if each in samplers_for(config)]
    if not config.is_discrete and name in _TAKEN_BY:
        takers = [each for each in takers if each == "euler"]
    if sampler not in takers:
        expected = f"it with {' or '.join(takers)}" if takers else f"none with noise_levels {config.noise_levels!r}"
        raise ValueError(f"{name}: got {value!r} with sampler {sampler!r}; expected {expected}")
    if name == "timestep_spacing" and sampler == "euler" and value not in _FLOW_SPACINGS:
        raise ValueError(
            f"timestep_spacing: got {value!r} with sampler 'euler'; expected one of {', '.join(_FLOW_SPACINGS)}"
        )
    if name == "steps_offset" and (options.timesteps is not None or options.timestep_spacing != "leading"):
        raise ValueError(f"steps_offset: got {value}; expected timestep_spacing 'leading' with it: no other has one")


def _as_timesteps(timesteps: Any) -> tuple[float, ...]:
    try:
        levels = tuple(float(t) if isinstance(t, float) else int(t) for t in timesteps)
    except (TypeError, ValueError):
        raise TypeError(f"timesteps: got {timesteps!r}; expected a list of numbers") from None
    if not levels or any(after >= before for before, after in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"timesteps: got {_shown(levels)}; expected at least one, in falling order")
    return levels


def _is_number(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and not math.isnan(value)


def _shown(levels: Any) -> str:
    shown = ", ".join(f"{level:g}" for level in list(levels)[:6])
    return f"[{shown}, …]" if len(levels) > 6 else f"[{shown}]"
