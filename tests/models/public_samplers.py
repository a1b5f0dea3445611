"""Public samplers as plain loops, written from their mathematics: facebookresearch/DiT's DDPM and DDIM (the Gaussian
diffusion of Improved DDPM with respaced steps), and diffusers' DDIM, DDPM, DPM-Solver++ and flow matching by Euler.

`network(x, t, labels)` gives [B, 2·C, ...]: predicted noise, then the learnt variance. `noises` draws what a sampler
adds, [B, C, ...] a call; the first is what it starts from.
"""

import numpy as np
import torch


def betas(total=1000):
    return np.linspace(1e-4, 2e-2, total)


def noises(seeds, shape):
    """Draws noise with one generator a sample, as `fastdiff.diffusion.sample` does with these seeds."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def guided_network(network, null, scale, channels):
    """DiT's forward_with_cfg with its first `channels` channels guided; None guides all of the noise."""
    if scale == 1:
        return network

    def guided(x, t, labels):
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, null)]))
        first = x.shape[1] if channels is None else channels
        conditional, unconditional = both[: len(x)], both[len(x) :]
        mixed = unconditional[:, :first] + scale * (conditional[:, :first] - unconditional[:, :first])
        return torch.cat([mixed, conditional[:, first:]], dim=1)

    return guided


# ------------------------------------------------------------------------------------------ facebookresearch/DiT


def respaced(text, total=1000):
    """The levels that timestep_respacing names: "ddimN" by a whole stride, "N" by N even fractions of 0 … total - 1."""
    if text.startswith("ddim"):
        wanted = int(text.removeprefix("ddim"))
        for stride in range(1, total):
            levels = range(0, total, stride)
            if len(levels) == wanted:
                return list(levels)
        raise ValueError(text)
    count = int(text)
    stride = 1 if count <= 1 else (total - 1) / (count - 1)
    levels, place = [], 0.0
    for _ in range(count):
        levels.append(round(place))
        place += stride
    return levels


class SpacedDiffusion:
    """Improved DDPM's tables for the levels that are left: each new β spans the levels between two of them."""

    def __init__(self, text):
        self.levels = respaced(text)
        every, last, kept = np.cumprod(1 - betas()), 1.0, []
        for level in self.levels:
            kept.append(1 - every[level] / last)
            last = every[level]
        self.betas = np.array(kept)
        self.cumulative = np.cumprod(1 - self.betas)
        self.before = np.append(1.0, self.cumulative[:-1])
        posterior = self.betas * (1 - self.before) / (1 - self.cumulative)
        self.posterior = posterior
        self.log_clipped = np.log(np.append(posterior[1], posterior[1:])) if len(posterior) > 1 else np.array([])

    def image(self, x, noise, index):
        return np.sqrt(1 / self.cumulative[index]) * x - np.sqrt(1 / self.cumulative[index] - 1) * noise

    def log_variance(self, kind, index, learnt):
        if kind == "learned_range":
            share = (learnt + 1) / 2
            return share * np.log(self.betas[index]) + (1 - share) * self.log_clipped[index]
        if kind == "fixed_large":
            return torch.tensor(np.log(np.append(self.posterior[1], self.betas[1:])[index]))
        return torch.tensor(self.log_clipped[index])

    def draw(self, network, labels, fresh, *, ddim=False, kind="learned_range", clip=None):
        x = fresh()
        for index in reversed(range(len(self.levels))):
            t = torch.full((len(x),), float(self.levels[index]))
            noise, learnt = network(x, t, labels).split(x.shape[1], dim=1)
            x0 = self.image(x, noise, index)
            x0 = x0 if clip is None else x0.clamp(-clip, clip)
            if ddim:
                back = (np.sqrt(1 / self.cumulative[index]) * x - x0) / np.sqrt(1 / self.cumulative[index] - 1)
                x = x0 * np.sqrt(self.before[index]) + np.sqrt(1 - self.before[index]) * back
                continue
            first = self.betas[index] * np.sqrt(self.before[index]) / (1 - self.cumulative[index])
            second = (1 - self.before[index]) * np.sqrt(1 - self.betas[index]) / (1 - self.cumulative[index])
            mean = first * x0 + second * x
            x = mean if index == 0 else mean + torch.exp(0.5 * self.log_variance(kind, index, learnt)) * fresh()
            x = x.float()
        return x


# ------------------------------------------------------------------------------------------------------ diffusers


def spaced(spacing, count, offset=0, *, solver=False, total=1000):
    """The levels of diffusers' schedulers, falling; `solver` where it is DPM-Solver++."""
    if spacing == "linspace":
        more = np.linspace(0, total - 1, count + solver).round()
        return [int(level) for level in more[::-1][:count]]
    if spacing == "leading":
        stride = total // (count + solver)
        return [int(index * stride + offset) for index in range(count - 1 + solver, -1 + solver, -1)]
    return [int(np.round(total - index * total / count)) - 1 for index in range(count)]


def ddim(network, labels, fresh, levels, *, final_one=True, clip=None, total=1000):
    """diffusers' DDIM: from t to t - total // steps, wherever the next of the levels stands."""
    cumulative, x, stride = np.cumprod(1 - betas(total)), fresh(), total // len(levels)
    for level in levels:
        now, before = cumulative[level], level - stride
        ahead = cumulative[before] if before >= 0 else (1.0 if final_one else cumulative[0])
        noise = network(x, torch.full((len(x),), float(level)), labels)[:, : x.shape[1]]
        x0 = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        x = np.sqrt(ahead) * x0 + np.sqrt(1 - ahead) * noise
    return x


def ddpm(network, labels, fresh, levels, kind, *, clip=None, total=1000):
    """diffusers' DDPM, but for the noise that it adds in a last step from above level 0."""
    cumulative, x = np.cumprod(1 - betas(total)), fresh()
    for level, before in zip(levels, [*levels[1:], None], strict=True):
        now, ahead = cumulative[level], 1.0 if before is None else cumulative[before]
        beta = 1 - now / ahead
        noise, learnt = network(x, torch.full((len(x),), float(level)), labels).split(x.shape[1], dim=1)
        x0 = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        mean = np.sqrt(ahead) * beta / (1 - now) * x0 + np.sqrt(1 - beta) * (1 - ahead) / (1 - now) * x
        if before is None:
            return mean
        small = (1 - ahead) / (1 - now) * beta
        if kind == "learned_range":
            spread = torch.exp(0.5 * ((learnt + 1) / 2 * np.log(beta) + (1 - learnt) / 2 * np.log(small)))
        else:
            spread = np.sqrt(beta if kind == "fixed_large" else small)
        x = mean + spread * fresh()
    return x


def dpm_solver(network, labels, fresh, levels, total=1000):
    """DPM-Solver++ (2M): the image is extrapolated from this step's and the one before, in λ = log(α / σ)."""
    cumulative, x, last = np.cumprod(1 - betas(total)), fresh(), None
    alphas = [np.sqrt(cumulative[level]) for level in levels] + [1.0]
    sigmas = [np.sqrt(1 - cumulative[level]) for level in levels] + [0.0]
    with np.errstate(divide="ignore"):
        lambdas = [np.log(a) - np.log(s) for a, s in zip(alphas, sigmas, strict=True)]
    for index, level in enumerate(levels):
        noise = network(x, torch.full((len(x),), float(level)), labels)[:, : x.shape[1]]
        x0 = (x - sigmas[index] * noise) / alphas[index]
        step, slope = lambdas[index + 1] - lambdas[index], 0.0
        if last is not None and index + 1 < len(levels):  # the first and the last step are of first order
            slope = (x0 - last) * (step / (lambdas[index] - lambdas[index - 1]))
        x = sigmas[index + 1] / sigmas[index] * x - alphas[index + 1] * np.expm1(-step) * (x0 + 0.5 * slope)
        last = x0
    return x


def flow_euler(velocity, labels, fresh, times):
    """Euler's steps of dx/dt = velocity from t = 1 to 0; the network gets 1000·t."""
    x = fresh()
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        x = x + (after - t) * velocity(x, torch.full((len(x),), 1000 * t), labels)
    return x
