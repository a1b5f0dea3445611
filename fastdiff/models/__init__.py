"""Models: one family a file. Those that need transformers are imported when they are first asked for."""

from typing import Any

from fastdiff.models.dit import PRESETS, DiT, DiTConfig, preset_config

__all__ = [
    "PRESETS",
    "DiT",
    "DiTConfig",
    "MaskedDiffusionLM",
    "MaskedDiffusionLMConfig",
    "preset_config",
]


def __getattr__(name: str) -> Any:
    if name == "MaskedDiffusionLM":
        from fastdiff.models.masked_lm import MaskedDiffusionLM

        return MaskedDiffusionLM
    if name == "MaskedDiffusionLMConfig":
        from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig

        return MaskedDiffusionLMConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
