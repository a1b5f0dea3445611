"""Decoding of masked diffusion language models."""

from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.decoding import GenerationOutput, GenerationStatistics, Streamer, generate
from fastdiff.generation.text import Continuation, TextGenerator

__all__ = [
    "Continuation",
    "GenerationOutput",
    "GenerationStatistics",
    "MaskedDiffusionGenerationConfig",
    "Streamer",
    "TextGenerator",
    "generate",
]
