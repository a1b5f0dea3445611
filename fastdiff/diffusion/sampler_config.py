"""The part of a recipe that says how a run's samples are denoised, whatever they are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.guidance import check_guidance
from fastdiff.diffusion.sampler_options import Sampler, SamplerOptions, Spacing, Variance
from fastdiff.diffusion.sampling import make_steps, seeds_of
from fastdiff.errors import named, naming_section

_OPTIONS = tuple(field.name for field in dataclasses.fields(SamplerOptions))


@dataclass
class SamplerConfig:
    """How samples are denoised.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: strength of classifier-free guidance; 1 is none.
        guidance_interval: the part of the course of noise levels, from 0 (clean) to 1 (noise), in which guidance acts.
        sampler: "euler", "ddpm", "ddim", "dpm-solver++" or "renoise", as fits the diffusion; null takes what the
            model's scheduler_config.json names, or else the first that fits.
        seed: seed of the first sample's noise; the others count on from it.
        timestep_spacing: which noise levels the steps visit. "trailing", "leading" and "linspace" are those of
            diffusers' schedulers; "respacing" and "ddim_respacing" are facebookresearch/DiT's timestep_respacing ("50",
            "ddim50"); "strided" is every (levels // steps)-th level counted from the image, which is "trailing" where
            steps divide the levels. null is "strided"; for dpm-solver++ "linspace"; for euler "trailing".
        steps_offset: added to the timesteps of "leading"; null is 0.
        timesteps: the noise levels themselves, in falling order, as many as num_inference_steps; null for a spacing.
        set_alpha_to_one: DDIM's last step ends at the image, else at level 0; null is true.
        clip_sample: clamps each predicted image to ± this value; null does not.
        use_clipped_model_output: where DDIM clips, the noise is derived from the clipped image, as in
            facebookresearch/DiT; null is false, as in diffusers.
        variance_type: noise of DDPM, "learned_range", "fixed_small" or "fixed_large"; null is "learned_range" for a
            model with learn_sigma, else "fixed_small". The last step adds none.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ()  # fields that say how many samples there are, not how one is denoised

    num_inference_steps: int = 25
    guidance_scale: float = 1.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: Sampler | None = None
    seed: int = 0
    timestep_spacing: Spacing | None = None
    steps_offset: int | None = None
    timesteps: tuple[float, ...] | None = None
    set_alpha_to_one: bool | None = None
    clip_sample: float | None = None
    use_clipped_model_output: bool | None = None
    variance_type: Variance | None = None

    def __post_init__(self):
        for name in ("num_inference_steps", "seed"):  # NumPy's whole numbers, which no recipe can have
            if isinstance(getattr(self, name), np.integer):
                setattr(self, name, int(getattr(self, name)))
        steps = self.num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"{named('num_inference_steps')}: got {steps!r}; expected a whole number")
        if steps < 1:
            raise ValueError(f"{named('num_inference_steps')}: got {steps}; expected at least 1")
        with naming_section():
            check_guidance(self.guidance_scale, self.guidance_interval)
            if isinstance(self.seed, list | tuple):  # the others count on from one
                raise TypeError(f"seed: got {self.seed!r}; expected a whole number")
            seeds_of(self.seed, 1)
            given = {name: value for name, value in self.options().items() if value is not None}
            self.timesteps = SamplerOptions(**given).timesteps

    def options(self) -> dict[str, Any]:
        """The fields of `SamplerOptions`; None is as the diffusion has it."""
        return {name: getattr(self, name) for name in _OPTIONS}

    def described(self, step: int | None = None, *, guided: bool = True) -> str:
        """How samples were made, for the title of a picture; `step` is how far the model was trained."""
        parts = [
            None if step is None else f"trained for {step} steps",
            f"guidance {self.guidance_scale:g}" if guided else None,
            f"{self.num_inference_steps} denoising steps",
        ]
        return ", ".join(part for part in parts if part is not None)

    def replaced(self, given: Mapping[str, Any]) -> Self:
        """With the fields of `given` that are not None in their place; `timesteps` and a spacing replace each other.

        Raises TypeError for a name that is no field or one of `COUNTS`, and for a wrong type; ValueError for a wrong
        value.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name not in self.COUNTS]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise TypeError(f"{unknown[0]}: got an option that there is not; expected {', '.join(names)}")
        values = {name: value for name, value in given.items() if value is not None}
        if "timesteps" in values:
            try:
                values.setdefault("num_inference_steps", len(values["timesteps"]))
            except TypeError:
                raise TypeError(f"timesteps: got {values['timesteps']!r}; expected a list of numbers") from None
            values = {"timestep_spacing": None, "steps_offset": None, **values}
        elif "timestep_spacing" in values:
            values = {"timesteps": None, "steps_offset": None, **values}
        return dataclasses.replace(self, **values)


def check_sampler(sampling: SamplerConfig, diffusion: Diffusion | DiffusionConfig, count: int = 1) -> None:
    """Raises ValueError where `count` samples cannot be denoised so; messages name fields as `errors.named` does."""
    diffusion = Diffusion(diffusion) if isinstance(diffusion, DiffusionConfig) else diffusion
    with naming_section():
        make_steps(diffusion, sampling.num_inference_steps, sampling.options())
        seeds_of(sampling.seed, count)
