"""Models: one family per file or folder. Those that need transformers are imported when they are first asked for."""

import importlib
from typing import Any

from fastdiff.models.dit import DiT
from fastdiff.models.dit_config import PRESETS, DiTConfig, preset_config
from fastdiff.models.pretrained import Pretrained, read_config

__all__ = [
    "PRESETS",
    "DiT",
    "DiTConfig",
    "MaskedDiffusionLM",
    "MaskedDiffusionLMConfig",
    "Pretrained",
    "QGFDBackbone",
    "QGFDConfig",
    "QGFDDecoderBlock",
    "QGFDEncoderBlock",
    "QGFDModel",
    "QGFDModelConfig",
    "create_qgfd_model",
    "preset_config",
    "read_config",
]

_LAZY = {
    "MaskedDiffusionLM": "masked_lm",
    "MaskedDiffusionLMConfig": "masked_lm_config",
    "QGFDBackbone": "qgfd.backbone",
    "QGFDConfig": "qgfd.backbone",
    "QGFDDecoderBlock": "qgfd.backbone",
    "QGFDEncoderBlock": "qgfd.backbone",
    "QGFDModel": "qgfd.model",
    "QGFDModelConfig": "qgfd.model",
    "create_qgfd_model": "qgfd.factory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"fastdiff.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
