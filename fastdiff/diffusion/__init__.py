"""Noise: what is added in training, what the network is asked to predict, and how samples are drawn."""

from fastdiff.diffusion.classes import sample_classes
from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.guidance import Guided
from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig, MaskedTokens, maskable_tokens
from fastdiff.diffusion.prompt_attention import PromptAttention, prompt_attention
from fastdiff.diffusion.prompts import sample_prompts
from fastdiff.diffusion.sampler_options import SAMPLERS, SamplerOptions, samplers_for
from fastdiff.diffusion.sampling import sample

__all__ = [
    "SAMPLERS",
    "Diffusion",
    "DiffusionConfig",
    "Guided",
    "MaskedDiffusion",
    "MaskedDiffusionConfig",
    "MaskedTokens",
    "PromptAttention",
    "SamplerOptions",
    "maskable_tokens",
    "prompt_attention",
    "sample",
    "sample_classes",
    "sample_prompts",
    "samplers_for",
]
