"""Step rules: from a noisy sample and the image predicted from it to a less noisy sample.

DDPM (Ho et al., 2020; Nichol & Dhariwal, 2021), DDIM (Song et al., 2021) and Euler's step of rectified flow are written
here, with tables in float64; DPM-Solver++ (Lu et al., 2022) is diffusers'. Re-noising is the sampler of latent
Fashion-MNIST diffusion: predict the image, add fresh noise of the next lower level, repeat.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.sampler_options import SamplerOptions
from fastdiff.diffusion.timesteps import DIFFUSERS_SPACINGS

_RENOISE_LEVELS = (0.99, 0.01)  # first and last noise level of "renoise"


class Steps:
    """The steps of one sampler.

    Attributes:
        times: [steps], the t of each step.
    """

    times: Tensor

    def __init__(
        self, diffusion: Diffusion, options: SamplerOptions, count: int, generators: list[torch.Generator]
    ) -> None:
        self.diffusion, self.options, self.generators = diffusion, options, generators
        self.prepare(count)

    def prepare(self, count: int) -> None:
        """Sets `times`. Raises ValueError where the options do not fit; before any work."""
        raise NotImplementedError

    def step(self, index: int, x: Tensor, x0: Tensor, unclipped: Tensor, variance: Tensor | None) -> Tensor:
        """The sample after a step, of x's shape: x0 is the predicted image, `unclipped` the same before clipping."""
        raise NotImplementedError


class DiscreteSteps(Steps):
    """The levels of DDIM and DDPM, each with the α² of the level that its step goes to; 1 is the image."""

    def prepare(self, count: int) -> None:
        config = self.diffusion.config
        levels = self.options.levels(config, count)
        self.times = torch.tensor(levels)
        self.cumulative = torch.cumprod(1 - self.diffusion.betas, 0).tolist()
        self.targets = [*(self.cumulative[level] for level in levels[1:]), 1.0]

    def alphas(self, index: int) -> tuple[float, float]:
        """α² at a step's level, and at the level that it goes to."""
        return self.cumulative[int(self.times[index])], self.targets[index]


class DDIMSteps(DiscreteSteps):
    """x' = α'·x0 + σ'·noise, with the noise that x holds beside the predicted image (no noise is added: η = 0)."""

    def prepare(self, count: int) -> None:
        super().prepare(count)
        final = 1.0 if self.options.set_alpha_to_one else self.cumulative[0]
        self.targets[-1] = final
        if self.options.timesteps is None and self.options.timestep_spacing in DIFFUSERS_SPACINGS:
            stride = self.diffusion.config.num_train_timesteps // count
            ahead = [level - stride for level in self.times.tolist()]
            self.targets = [self.cumulative[level] if level >= 0 else final for level in ahead]

    def step(self, index: int, x: Tensor, x0: Tensor, unclipped: Tensor, variance: Tensor | None) -> Tensor:
        now, after = self.alphas(index)
        clean = x0 if self.options.use_clipped_model_output else unclipped
        noise = (x - now**0.5 * clean) / (1 - now) ** 0.5
        return after**0.5 * x0 + (1 - after) ** 0.5 * noise


class DDPMSteps(DiscreteSteps):
    """A draw from the posterior q(x' | x, x0), with the variance that the options name; the last step adds no noise."""

    def step(self, index: int, x: Tensor, x0: Tensor, unclipped: Tensor, variance: Tensor | None) -> Tensor:
        now, after = self.alphas(index)
        beta = 1 - now / after
        mean = after**0.5 * beta / (1 - now) * x0 + (now / after) ** 0.5 * (1 - after) / (1 - now) * x
        if index + 1 == len(self.times):
            return mean
        kind = self.options.variance_type or ("fixed_small" if variance is None else "learned_range")
        if kind == "learned_range" and variance is None:
            raise ValueError(
                "variance_type: got 'learned_range' for a network that predicts no variance; expected 'fixed_small' or "
                "'fixed_large'"
            )
        small = torch.tensor(beta * (1 - after) / (1 - now), dtype=torch.float64)
        noise = fresh_noise(self.generators, x.shape[1:], x.device)
        if kind == "learned_range":
            fraction = (variance + 1) / 2
            log_beta = float(torch.tensor(beta, dtype=torch.float64).log())
            return mean + torch.exp(0.5 * (fraction * log_beta + (1 - fraction) * float(small.log()))) * noise
        return mean + (beta if kind == "fixed_large" else float(small)) ** 0.5 * noise


class EulerSteps(Steps):
    """Euler's steps along x_t = (1 - t)·x0 + t·noise."""

    def prepare(self, count: int) -> None:
        times = self.options.times(self.diffusion.config, count)
        self.times, self.lengths = torch.tensor(times), [a - b for a, b in zip(times, [*times[1:], 0.0], strict=True)]

    def step(self, index: int, x: Tensor, x0: Tensor, unclipped: Tensor, variance: Tensor | None) -> Tensor:
        return x - self.lengths[index] / float(self.times[index]) * (x - x0)


class SolverSteps(Steps):
    """diffusers' DPM-Solver++ (second order, midpoint), over discrete levels or along a flow from t = 1 to 0."""

    def prepare(self, count: int) -> None:
        from diffusers import DPMSolverMultistepScheduler  # a second, and nothing else here needs it

        config = self.diffusion.config
        fixed = {"num_train_timesteps": config.num_train_timesteps, "prediction_type": "sample"}
        if not config.is_discrete:
            self.scheduler = DPMSolverMultistepScheduler(**fixed, use_flow_sigmas=True)
            self.scheduler.set_timesteps(count)
            self.times = self.scheduler.sigmas[:-1].float()
            return
        levels = self.options.levels(config, count)
        self.scheduler = DPMSolverMultistepScheduler(**fixed, trained_betas=self.diffusion.betas.numpy())
        self.scheduler.set_timesteps(timesteps=levels)
        self.times = torch.tensor(levels)

    def step(self, index: int, x: Tensor, x0: Tensor, unclipped: Tensor, variance: Tensor | None) -> Tensor:
        return self.scheduler.step(x0, self.scheduler.timesteps[index], x).prev_sample


class RenoiseSteps(Steps):
    """Predict the image, then noise it afresh to the next of evenly spaced levels."""

    def prepare(self, count: int) -> None:
        self.times = torch.linspace(*_RENOISE_LEVELS, count)

    def step(self, index: int, x: Tensor, x0: Tensor, unclipped: Tensor, variance: Tensor | None) -> Tensor:
        if index + 1 == len(self.times):
            return x0
        t = self.times[index + 1].to(x.device).expand(len(x))
        return self.diffusion.add_noise(x0, fresh_noise(self.generators, x.shape[1:], x.device), t)


STEPS: dict[str, type[Steps]] = {
    "ddim": DDIMSteps,
    "ddpm": DDPMSteps,
    "dpm-solver++": SolverSteps,
    "euler": EulerSteps,
    "renoise": RenoiseSteps,
}


def fresh_noise(generators: list[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise, one generator per sample, drawn on the CPU: the same on every device."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(device)
