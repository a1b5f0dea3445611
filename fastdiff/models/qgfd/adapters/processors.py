"""From raw data to batches, where no Hugging Face processor does it: images, sound, videos.

Tables have `fastdiff.data.TableSchema`.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.data.pictures import flattened
from fastdiff.data.waveforms import mono, resample


class ImageProcessor:
    """Images of any size and mode to {"pixel_values" [B, C, H, W] in [-1, 1]}, scaled with a bilinear filter.

    Images are PIL's, taken as `fastdiff.data.pictures.flattened` says (turned by EXIF, 16 bits scaled, alpha on white),
    or arrays [H, W] or [H, W, C] of uint8. Raises ValueError for other arrays or channels.
    """

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}; expected 1 (grey) or 3 (RGB)")
        self.size, self.mode = size, "L" if channels == 1 else "RGB"

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        _check_several(images, "images")
        return {"pixel_values": torch.stack([self._pixels(image) for image in images])}

    def _pixels(self, image: Any) -> Tensor:  # [C, H, W]
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
                raise ValueError(
                    f"images: got {array.dtype} of shape {list(array.shape)}; expected uint8 [H, W] or [H, W, C]"
                )
            image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        image = flattened(image, 1 if self.mode == "L" else 3).resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return pixels[None] if self.mode == "L" else pixels.permute(2, 0, 1).contiguous()


class VideoProcessor:
    """Videos, each a sequence of frames as `ImageProcessor` takes them, to {"pixel_values" [B, F, C, H, W]}.

    Frames are scaled to one size. Raises ValueError where frames of one video differ in size, or videos in length.
    """

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.frames = ImageProcessor(size, channels)

    def __call__(self, videos: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        _check_several(videos, "videos")
        if not all(len(video) for video in videos):
            raise ValueError("videos: got one without frames; expected 1 or more")
        if len({len(video) for video in videos}) > 1:
            lengths = sorted({len(video) for video in videos})
            raise ValueError(f"videos: got {lengths} frames; expected one number in a batch: cut them to the shortest")
        for video in videos:
            sizes = sorted(
                {frame.size if isinstance(frame, Image.Image) else np.shape(frame)[1::-1] for frame in video}
            )
            if len(sizes) > 1:
                given = ", ".join(f"{width} x {height}" for width, height in sizes)
                raise ValueError(f"videos: got frames of {given} pixels in one video; expected one: scale them first")
        return {"pixel_values": torch.stack([self.frames(list(video))["pixel_values"] for video in videos])}


class AudioProcessor:
    """Waveforms to {"input_values" [B, S] in [-1, 1], "attention_mask" [B, S] where lengths differ}.

    Waveforms are arrays [S] or [S, channels] of floats in [-1, 1] or of int16; channels are averaged. Audio of another
    rate is resampled; the first call with such audio warns.
    """

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate, self._warned = sampling_rate, False

    def __call__(self, waves: Sequence[Any], sampling_rate: int | None = None) -> dict[str, Tensor]:
        """`sampling_rate` is the waveforms', in Hz; None is the processor's. Raises ValueError for other arrays."""
        _check_several(waves, "waves")
        rate = self.sampling_rate if sampling_rate is None else sampling_rate
        if rate < 1:
            raise ValueError(f"sampling_rate: got {rate}; expected a positive number of audio samples a second")
        if rate != self.sampling_rate and not self._warned:
            self._warned = True
            warnings.warn(f"audio of {rate} Hz is resampled to the model's {self.sampling_rate} Hz", stacklevel=2)
        arrays = [resample(_wave(wave).double().numpy(), rate, self.sampling_rate) for wave in waves]
        tensors = [torch.from_numpy(array).float() for array in arrays]
        lengths = [len(wave) for wave in tensors]
        values = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        batch = {"input_values": values}
        if len(set(lengths)) > 1:
            batch["attention_mask"] = (torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]).long()
        return batch


def _check_several(examples: Any, name: str) -> None:
    if not isinstance(examples, (list, tuple)):
        shape = getattr(examples, "shape", None)
        given = type(examples).__name__ + ("" if shape is None else f" of shape {list(shape)}")
        raise ValueError(f"{name}: got one {given}; expected a list of {name}")
    if not examples:
        raise ValueError(f"{name}: got none; expected 1 or more")


def _wave(wave: Any) -> Tensor:  # [S], float32
    wave = torch.as_tensor(np.asarray(wave))
    if wave.ndim not in (1, 2) or not (wave.is_floating_point() or wave.dtype == torch.int16):
        raise ValueError(f"waves: got {wave.dtype} of shape {list(wave.shape)}; expected float or int16 [S] or [S, C]")
    wave = wave.float() / (32768 if wave.dtype == torch.int16 else 1)
    if not torch.isfinite(wave).all():
        raise ValueError("waves: got values that are not finite; expected numbers in [-1, 1]")
    if wave.ndim == 1:
        return wave
    try:
        return torch.from_numpy(mono(wave.numpy())).float()
    except ValueError as error:
        raise ValueError(f"waves: got one that {error}") from None
