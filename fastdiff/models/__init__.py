"""Models: one family per file or folder. Those that need transformers are imported when they are first asked for."""

from fastdiff.lazy import exports
from fastdiff.models.dit import DiT
from fastdiff.models.dit_config import PRESETS, DiTConfig, preset_config
from fastdiff.models.pretrained import Pretrained, read_config
from fastdiff.models.text_to_image import TextToImage, TextToImageConfig

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
    "TextEncoder",
    "TextEncoderConfig",
    "TextToImage",
    "TextToImageConfig",
    "create_qgfd_model",
    "load_text_encoder",
    "preset_config",
    "read_config",
]

__getattr__ = exports(
    __name__,
    {
        "MaskedDiffusionLM": "fastdiff.models.masked_lm",
        "MaskedDiffusionLMConfig": "fastdiff.models.masked_lm_config",
        "QGFDBackbone": "fastdiff.models.qgfd.backbone",
        "QGFDConfig": "fastdiff.models.qgfd.backbone",
        "QGFDDecoderBlock": "fastdiff.models.qgfd.backbone",
        "QGFDEncoderBlock": "fastdiff.models.qgfd.backbone",
        "QGFDModel": "fastdiff.models.qgfd.model",
        "QGFDModelConfig": "fastdiff.models.qgfd.model",
        "TextEncoder": "fastdiff.models.text_encoder",
        "TextEncoderConfig": "fastdiff.models.text_encoder",
        "create_qgfd_model": "fastdiff.models.qgfd.factory",
        "load_text_encoder": "fastdiff.models.text_encoder",
    },
)
