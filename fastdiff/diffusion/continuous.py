"""Gaussian diffusion: noise levels, targets and the loss.

A noisy sample is x_t = α(t)·x0 + σ(t)·noise. With discrete levels ("linear", "cosine", "scaled_linear": the β tables
of DDPM, Improved DDPM and latent diffusion) t is an integer 0 … T - 1, α² = Π(1 - β) and σ² = 1 - α². With continuous
levels ("uniform", "logit_normal", "beta": the distribution that t is drawn from) t is in [0, 1], 0 is the image and
1 is noise: x_t = (1 - t)·x0 + t·noise, as in rectified flow and diffusers' FlowMatchEulerDiscreteScheduler.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion.config import DISCRETE_LEVELS, DiffusionConfig, discrete_betas
from fastdiff.diffusion.sampler_options import SamplerOptions
from fastdiff.diffusion.scheduler_config import read_scheduler_config, write_scheduler_config

Predict = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, C, ...], time [B] as `model_time` gives it) -> prediction


class Diffusion:
    """Adds noise, says what the network should predict, and scores what it did predict.

    Times `t` are `[B]`: int64 levels with discrete noise, float32 in [0, 1] with continuous noise.
    """

    def __init__(self, config: DiffusionConfig, sampler_options: SamplerOptions | None = None) -> None:
        """`sampler_options` is how `sample` draws where it is not told otherwise. Raises ValueError for a misfit."""
        self.config = config
        self.sampler_options = SamplerOptions() if sampler_options is None else sampler_options
        self.sampler_options.sampler_of(config)
        self.betas = discrete_betas(config) if config.is_discrete else None  # [T], float64
        self._tables: dict[torch.device, Tensor] = {}

    def sample_times(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:  # [B]
        """Training times, drawn on the generator's device (the CPU without one) and moved to `device`."""
        config = self.config
        options: dict[str, Any] = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        if config.is_discrete:
            t = torch.randint(config.num_train_timesteps, (batch_size,), **options)
        elif config.noise_levels == "uniform":
            t = torch.rand(batch_size, **options)
        elif config.noise_levels == "logit_normal":
            t = torch.sigmoid(config.logit_normal_mean + config.logit_normal_std * torch.randn(batch_size, **options))
        else:  # X / (X + Y) of two Gamma variables is Beta distributed; torch.distributions takes no generator
            shapes = torch.tensor([config.beta_a, config.beta_b], device=options["device"]).expand(batch_size, 2)
            t = torch._sample_dirichlet(shapes, generator)[:, 0]
        return (t if config.time_range is None else t.clamp(*config.time_range)).to(device)

    def model_time(self, t: Tensor) -> Tensor:  # [B] -> [B], float32
        """The time as the network gets it: the level itself, or continuous t times `time_scale` (1000).

        With a `time_scale` discrete levels are given as (level + 1) / T times it.
        """
        scale = self.config.time_scale
        if self.config.is_discrete:
            return t.float() if scale is None else self.noise_share(t) * scale
        return t.float() * (self.config.num_train_timesteps if scale is None else scale)

    def level(self, time: Tensor) -> Tensor:  # [B], float32 -> [B]
        """The t that `model_time` made this of."""
        scale = self.config.time_scale
        if self.config.is_discrete:
            level = time if scale is None else time / scale * self.config.num_train_timesteps - 1
            return level.round().long()
        return time / self.model_time(torch.ones((), device=time.device))

    def noise_share(self, t: Tensor) -> Tensor:  # [B] -> [B], float32
        """How far t lies on the way from the image (0) to pure noise (1): t itself, or (t + 1) / T of a level."""
        return (t + 1) / self.config.num_train_timesteps if self.config.is_discrete else t.float()

    def time_at(self, noise_share: float) -> Tensor:  # a scalar
        """The t that lies nearest to a share of noise in [0, 1]: the share itself, or the level of it."""
        if not self.config.is_discrete:
            return torch.tensor(noise_share, dtype=torch.float32)
        levels = self.config.num_train_timesteps
        return torch.tensor(min(max(round(noise_share * levels) - 1, 0), levels - 1))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α(t) and σ(t), float32, of t's shape."""
        if not self.config.is_discrete:
            return 1 - t.float(), t.float()
        rows = self._table(t.device)[:2, t.long()]
        return rows[0], rows[1]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = α·x0 + σ·noise, of x0's shape. Raises ValueError where the shapes do not fit."""
        if noise.shape != x0.shape:
            raise ValueError(f"noise: got shape {list(noise.shape)}; expected x0's, {list(x0.shape)}")
        alpha, sigma = self._broadcast(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict: noise, x0, α·noise - σ·x0, or noise - x0 (flow)."""
        prediction = self.config.prediction_type
        if prediction == "epsilon":
            return noise
        if prediction == "sample":
            return x0
        if prediction == "flow":
            return noise - x0
        alpha, sigma = self._broadcast(t, x0)
        return alpha * noise - sigma * x0

    def predicted_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image that a prediction at x_t stands for; for "epsilon" undefined where α = 0 (continuous t = 1)."""
        alpha, sigma = self._broadcast(t, x_t)
        if self.config.prediction_type == "epsilon":
            return (x_t - sigma * prediction) / alpha
        if self.config.prediction_type == "sample":
            return prediction
        if self.config.prediction_type == "flow":  # α = 1 - σ
            return x_t - sigma * prediction
        return (alpha * x_t - sigma * prediction) / (alpha.square() + sigma.square())

    def loss(
        self,
        predict: Predict,
        x0: Tensor,  # [B, C, ...]
        t: Tensor,  # [B]
        noise: Tensor,  # [B, C, ...]
    ) -> Tensor:  # [B], float32
        """Mean squared error of each sample, in float32.

        `predict(x_t, time)` gives the prediction, [B, C, ...]. The caller binds what it is conditioned on, as in
        `functools.partial(model, class_labels=labels)`.

        A model that returns 2·C channels predicts a variance in the second half (`learn_sigma`). It is trained as in
        Nichol & Dhariwal (2021): KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) in bits per dimension, weighted by
        T / 1000 and with the mean detached, is added to the error. At t = 0, where they take the likelihood of 8-bit
        pixels, the KL with the variance of t = 1 stands in: latents have no bins.

        Raises ValueError where shapes do not fit or a variance comes with continuous noise, which has none to learn.
        """
        x_t = self.add_noise(x0, noise, t)
        prediction, variance = split_variance(predict(x_t, self.model_time(t)).float(), x0.shape[1])
        error = (prediction - self.target(x0, noise, t).float()).square().flatten(1).mean(1)
        if variance is None:
            return error
        return error + self._variance_loss(prediction.detach(), variance, x0, x_t, t)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes scheduler_config.json, whole or not at all, in diffusers' terms and with our exact configuration.

        Where diffusers has a scheduler of this process and sampler (`fastdiff.diffusion.scheduler_config` says where),
        its `from_pretrained` reads the folder, too. Raises OSError where the file cannot be written.
        """
        write_scheduler_config(directory, self.config, self.sampler_options)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> "Diffusion":
        """Reads what `save_pretrained` wrote, or the scheduler of a diffusers model.

        Args:
            directory: a folder with scheduler_config.json in it, or in `scheduler/` as a diffusers pipeline has it.

        The noise levels become `config`; the scheduler's class, spacing of steps, variance and clipping become
        `sampler_options`, so that `sample` draws as that scheduler does. A file of diffusers does not say how training
        times are distributed: flow matching gets the default of `DiffusionConfig`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a scheduler's configuration, or one that fastdiff cannot follow exactly; the message names
                file, key and value.
        """
        return cls(*read_scheduler_config(directory))

    def _variance_loss(self, prediction: Tensor, variance: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if not self.config.is_discrete:
            raise ValueError(
                f"model: it predicts a variance (learn_sigma), which noise_levels {self.config.noise_levels!r} cannot "
                f"train; expected one of {', '.join(DISCRETE_LEVELS)}"
            )
        shape = (-1,) + (1,) * (x0.ndim - 1)
        log_beta, log_posterior, coefficient = (row.view(shape) for row in self._table(t.device)[2:, t.long()])
        fraction = (variance + 1) / 2
        log_variance = fraction * log_beta + (1 - fraction) * log_posterior
        mean_error = coefficient * (x0 - self.predicted_x0(prediction, x_t, t))
        kl = log_variance - log_posterior - 1 + torch.exp(log_posterior - log_variance)
        kl = 0.5 * (kl + mean_error.square() * torch.exp(-log_variance))
        return kl.flatten(1).mean(1) / math.log(2) * (self.config.num_train_timesteps / 1000)

    def _broadcast(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if t.shape != x.shape[:1]:
            raise ValueError(f"t: got shape {list(t.shape)}; expected [{x.shape[0]}], one time per sample")
        alpha, sigma = self.alpha_sigma(t)
        shape = (-1,) + (1,) * (x.ndim - 1)
        return alpha.view(shape), sigma.view(shape)

    def _table(self, device: torch.device) -> Tensor:  # [5, T], float32
        """Rows: α, σ, log β, log of the posterior variance, and the weight of x0 in the posterior mean."""
        if device not in self._tables:
            cumulative = torch.cumprod(1 - self.betas, 0)
            previous = torch.cat([cumulative.new_ones(1), cumulative[:-1]])
            posterior = self.betas * (1 - previous) / (1 - cumulative)
            posterior[0] = posterior[1] if len(posterior) > 1 else self.betas[0]  # it is 0, which has no logarithm
            weight = self.betas * previous.sqrt() / (1 - cumulative)
            rows = [cumulative.sqrt(), (1 - cumulative).sqrt(), self.betas.log(), posterior.log(), weight]
            self._tables[device] = torch.stack(rows).to(device, torch.float32)
        return self._tables[device]


def split_variance(prediction: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """A model's output as (prediction, variance): the second is None where the model has `channels` channels."""
    if prediction.shape[1] == channels:
        return prediction, None
    if prediction.shape[1] != 2 * channels:
        raise ValueError(f"model: got {prediction.shape[1]} output channels; expected {channels} or {2 * channels}")
    return prediction[:, :channels], prediction[:, channels:]
