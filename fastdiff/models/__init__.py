"""Models: one family a file. Those that need transformers are imported when they are first asked for."""

import importlib
from typing import Any

from fastdiff.models.dit import PRESETS, DiT, DiTConfig, preset_config

__all__ = [
    "PRESETS",
    "DiT",
    "DiTConfig",
    "MaskedDiffusionLM",
    "MaskedDiffusionLMConfig",
    "QGFDBackbone",
    "QGFDConfig",
    "QGFDDecoderBlock",
    "QGFDEncoderBlock",
    "QGFDModel",
    "QGFDModelConfig",
    "create_qgfd_model",
    "preset_config",
]


_LAZY = {
    "QGFDBackbone": "qgfd",
    "QGFDConfig": "qgfd",
    "QGFDDecoderBlock": "qgfd",
    "QGFDEncoderBlock": "qgfd",
    "QGFDModel": "qgfd_model",
    "QGFDModelConfig": "qgfd_model",
    "create_qgfd_model": "qgfd_factory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"fastdiff.models.{_LAZY[name]}"), name)
    if name == "MaskedDiffusionLM":
        from fastdiff.models.masked_lm import MaskedDiffusionLM

        return MaskedDiffusionLM
    if name == "MaskedDiffusionLMConfig":
        from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig

        return MaskedDiffusionLMConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
