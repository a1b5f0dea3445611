"""Noise: what is added in training, what the network is asked to predict, and how samples are drawn."""

from fastdiff.diffusion.continuous import Diffusion, DiffusionConfig
from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig, MaskedTokens, maskable_tokens
from fastdiff.diffusion.sampling import SAMPLERS, sample, samplers_for

__all__ = [
    "SAMPLERS",
    "Diffusion",
    "DiffusionConfig",
    "MaskedDiffusion",
    "MaskedDiffusionConfig",
    "MaskedTokens",
    "maskable_tokens",
    "sample",
    "samplers_for",
]
