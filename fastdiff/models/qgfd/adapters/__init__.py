"""Adapters of `fastdiff.models.QGFDModel`: text, images, audio, video and tables as latent tokens, and back."""

from fastdiff.models.qgfd.adapters.audio import AudioAdapter, AudioAdapterConfig
from fastdiff.models.qgfd.adapters.base import Adapter, AdapterConfig, Latents, LatentShape
from fastdiff.models.qgfd.adapters.huggingface import MODALITIES
from fastdiff.models.qgfd.adapters.image import ImageAdapter, ImageAdapterConfig
from fastdiff.models.qgfd.adapters.processors import AudioProcessor, ImageProcessor, VideoProcessor
from fastdiff.models.qgfd.adapters.tabular import TabularAdapter, TabularAdapterConfig
from fastdiff.models.qgfd.adapters.text import TextAdapter, TextAdapterConfig
from fastdiff.models.qgfd.adapters.video import VideoAdapter, VideoAdapterConfig

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.modality: adapter for adapter in (TextAdapter, ImageAdapter, AudioAdapter, VideoAdapter, TabularAdapter)
}

__all__ = [
    "ADAPTERS",
    "MODALITIES",
    "Adapter",
    "AdapterConfig",
    "AudioAdapter",
    "AudioAdapterConfig",
    "AudioProcessor",
    "ImageAdapter",
    "ImageAdapterConfig",
    "ImageProcessor",
    "LatentShape",
    "Latents",
    "TabularAdapter",
    "TabularAdapterConfig",
    "TextAdapter",
    "TextAdapterConfig",
    "VideoAdapter",
    "VideoAdapterConfig",
    "VideoProcessor",
]
