"""Decoding of masked diffusion language models."""

from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.decoding import GenerationOutput, GenerationStatistics, generate

__all__ = ["GenerationOutput", "GenerationStatistics", "MaskedDiffusionGenerationConfig", "generate"]
