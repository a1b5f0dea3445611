"""Samples of QGFD models as things that people use: images, texts, waveforms, videos, tables."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastdiff.tasks.images import to_pil
from fastdiff.tasks.qgfd.samples import Samples, Shown, table_columns, texts_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class QGFDSamples:
    """N samples of one modality.

    Attributes:
        modality: "text", "image", "audio", "video" or "tabular".
        samples: of text a list of N strings; of images a list of N PIL images (float32 [N, C, H, W] in -1 … 1 where an
            image has other channels than grey or RGB); of sound float32 [N, samples] at `sampling_rate`; of videos a
            list of N lists of PIL images, the frames; of tables the columns by name, arrays of N values each.
        batch: the same as tensors on the CPU, as the modality's adapter takes them.
        labels: the label of each sample; None where there are no classes.
        sampling_rate: of sound, in Hz; else None.
    """

    modality: str
    samples: "list[Image] | list[str] | list[list[Image]] | np.ndarray | dict[str, np.ndarray]"
    batch: dict[str, Tensor]
    labels: list[int] | None = None
    sampling_rate: int | None = None

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))


def decoded(samples: Samples, modality: str, shown: Shown, config: Any) -> QGFDSamples:
    """What `draw_samples` gave, as `QGFDSamples`. `config` is that of the modality's adapter."""
    batch, rate = samples.batch, None
    if modality == "text":
        data: Any = texts_of(samples, shown)
    elif modality == "image":
        pixels = batch["pixel_values"]
        data = to_pil(pixels) if pixels.shape[1] in (1, 3) else pixels.numpy()
    elif modality == "audio":
        data, rate = batch["input_values"].numpy(), config.sampling_rate
    elif modality == "video":
        data = [to_pil(frames) for frames in batch["pixel_values"]]
    else:
        data = shown.schema.decode(*table_columns(samples))
    return QGFDSamples(modality, data, batch, None if samples.labels is None else samples.labels.tolist(), rate)
