"""From raw data to batches, where no Hugging Face processor does it: images, sound, films, tables."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.models.checkpoints import read_json, write_atomically

_TABLE_NAME = "tabular_processor.json"


class ImageProcessor:
    """Images of any size and mode to {"pixel_values" [B, C, H, W] in [-1, 1]}, scaled with a bilinear filter.

    Images are PIL's, or arrays [H, W] or [H, W, C] of uint8. Raises ValueError for other arrays or channels.
    """

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels: got {channels}; expected 1 (grey) or 3 (RGB)")
        self.size, self.mode = size, "L" if channels == 1 else "RGB"

    def __call__(self, images: Sequence[Any]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([self._pixels(image) for image in images])}

    def _pixels(self, image: Any) -> Tensor:  # [C, H, W]
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
                raise ValueError(
                    f"images: got {array.dtype} of shape {list(array.shape)}; expected uint8 [H, W] or [H, W, C]"
                )
            image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
        image = image.convert(self.mode).resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        return pixels[None] if self.mode == "L" else pixels.permute(2, 0, 1).contiguous()


class VideoProcessor:
    """Films, each a sequence of frames as `ImageProcessor` takes them, to {"pixel_values" [B, F, C, H, W]}.

    Frames are scaled to one size. Raises ValueError where frames of one film differ in size, or films in length.
    """

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.frames = ImageProcessor(size, channels)

    def __call__(self, films: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        if len({len(film) for film in films}) > 1:
            lengths = sorted({len(film) for film in films})
            raise ValueError(f"films: got {lengths} frames; expected one number in a batch: cut them to the shortest")
        for film in films:
            sizes = sorted({frame.size if isinstance(frame, Image.Image) else np.shape(frame)[1::-1] for frame in film})
            if len(sizes) > 1:
                given = ", ".join(f"{width} x {height}" for width, height in sizes)
                raise ValueError(f"films: got frames of {given} pixels in one film; expected one: scale them first")
        return {"pixel_values": torch.stack([self.frames(film)["pixel_values"] for film in films])}


class AudioProcessor:
    """Waveforms to {"input_values" [B, S] in [-1, 1], "attention_mask" [B, S] where lengths differ}.

    Waveforms are arrays [S] or [S, channels] of floats in [-1, 1] or of int16; channels are averaged. Audio of another
    rate is resampled, of which the first call with such warns.
    """

    def __init__(self, sampling_rate: int) -> None:
        self.sampling_rate, self._warned = sampling_rate, False

    def __call__(self, waves: Sequence[Any], sampling_rate: int | None = None) -> dict[str, Tensor]:
        """`sampling_rate`: of the waveforms, in Hz; None is the processor's. Raises ValueError for other arrays."""
        rate = self.sampling_rate if sampling_rate is None else sampling_rate
        if rate < 1:
            raise ValueError(f"sampling_rate: got {rate}; expected a positive number of audio samples a second")
        if rate != self.sampling_rate and not self._warned:
            self._warned = True
            warnings.warn(f"audio of {rate} Hz is resampled to the model's {self.sampling_rate} Hz", stacklevel=2)
        tensors = [resample(_wave(wave), rate, self.sampling_rate) for wave in waves]
        lengths = [len(wave) for wave in tensors]
        values = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        batch = {"input_values": values}
        if len(set(lengths)) > 1:
            batch["attention_mask"] = (torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]).long()
        return batch


def resample(wave: Tensor, rate: int, wanted: int) -> Tensor:  # [S] -> [about S * wanted / rate], float32
    """scipy's polyphase resampling. Raises ModuleNotFoundError where scipy is not installed."""
    if rate == wanted or len(wave) == 0:
        return wave
    try:
        from scipy.signal import resample_poly
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"audio of {rate} Hz for a model of {wanted} Hz needs scipy: pip install 'fastdiff-kernels[data]'"
        ) from None
    return torch.from_numpy(resample_poly(wave.double().numpy(), wanted, rate)).float()


def _wave(wave: Any) -> Tensor:  # [S], float32
    wave = torch.as_tensor(np.asarray(wave))
    if wave.ndim not in (1, 2) or not (wave.is_floating_point() or wave.dtype == torch.int16):
        raise ValueError(f"waves: got {wave.dtype} of shape {list(wave.shape)}; expected float or int16 [S] or [S, C]")
    wave = wave.float() / (32768 if wave.dtype == torch.int16 else 1)
    if not torch.isfinite(wave).all():
        raise ValueError("waves: got values that are not finite; expected numbers in [-1, 1]")
    return wave if wave.ndim == 1 else wave.mean(1)


class TabularProcessor:
    """Rows of a table to {"numbers" [B, N], standardised, "categories" int64 [B, K]}, and back.

    Made by `fit` from the training rows, whose means, deviations and categories it keeps.
    """

    def __init__(
        self,
        numbers: Mapping[str, tuple[float, float]],
        categories: Mapping[str, Sequence[Any]],
        whole: Sequence[str] = (),
    ) -> None:
        """`numbers`: mean and standard deviation by column; `categories`: values by column; `whole`: whole numbers."""
        self.numbers = {name: (float(mean), float(std)) for name, (mean, std) in numbers.items()}
        self.categories = {name: [str(value) for value in values] for name, values in categories.items()}
        self.whole = tuple(whole)

    @classmethod
    def fit(cls, table: Mapping[str, Sequence[Any]], categories: Sequence[str] = ()) -> "TabularProcessor":
        """Learns from a table, column by column.

        Args:
            table: values by column name, of one length.
            categories: the columns that are categories; columns of strings are, too.

        Raises:
            ValueError: a value is missing, a column is constant, has another length or is not there; it is named.
        """
        if not table or any(name not in table for name in categories):
            missing = [name for name in categories if name not in table]
            raise ValueError(f"table: got columns {list(table)}; expected some, with those of categories, {missing}")
        numbers, values, whole = {}, {}, []
        lengths = {name: len(column) for name, column in table.items()}
        for name, column in table.items():
            if lengths[name] != max(lengths.values()):
                raise ValueError(f"table: column {name!r} has {lengths[name]} rows; expected {max(lengths.values())}")
            _check_present(name, column)
            distinct = sorted({str(value) for value in column})
            if len(distinct) < 2:
                raise ValueError(
                    f"table: column {name!r} is constant ({distinct[0] if distinct else 'empty'}) and says nothing; "
                    "drop it"
                )
            if name in categories or any(isinstance(value, str) for value in column):
                values[name] = distinct
            else:
                array = np.asarray(column, dtype=np.float64)
                numbers[name] = (float(array.mean()), float(array.std()))
                whole += [name] if np.all(array == np.round(array)) else []
        return cls(numbers, values, whole)

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """Number of values of each column of categories."""
        return tuple(len(values) for values in self.categories.values())

    def __call__(self, table: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        """Raises ValueError for a missing column or value, or a category that `fit` did not see; it is named."""
        batch = {}
        for name in (*self.numbers, *self.categories):
            if name not in table:
                raise ValueError(f"table: no column {name!r}; expected {[*self.numbers, *self.categories]}")
            _check_present(name, table[name])
        if self.numbers:
            columns = [(np.asarray(table[name], np.float64) - m) / s for name, (m, s) in self.numbers.items()]
            batch["numbers"] = torch.from_numpy(np.stack(columns, 1)).float()
        if self.categories:
            columns = [self._ids(name, table[name]) for name in self.categories]
            batch["categories"] = torch.tensor(columns).reshape(len(columns), -1).T.contiguous()
        return batch

    def decode(self, batch: Mapping[str, Tensor]) -> dict[str, list[Any]]:
        """A batch as a table: numbers in their own units (whole ones rounded), categories as strings."""
        table: dict[str, list[Any]] = {}
        for index, (name, (mean, std)) in enumerate(self.numbers.items()):
            values = batch["numbers"][:, index].double() * std + mean
            table[name] = values.round().long().tolist() if name in self.whole else values.tolist()
        for index, (name, values) in enumerate(self.categories.items()):
            table[name] = [values[i] for i in batch["categories"][:, index].tolist()]
        return table

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes tabular_processor.json."""
        content = {"numbers": self.numbers, "categories": self.categories, "whole": self.whole}
        Path(directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(Path(directory) / _TABLE_NAME, lambda path: path.write_text(text))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "TabularProcessor":
        """Reads it. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
        path = Path(directory) / _TABLE_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected what TabularProcessor.save_pretrained wrote")
        try:
            return cls(**read_json(path))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a TabularProcessor's file") from error

    def _ids(self, name: str, column: Sequence[Any]) -> list[int]:
        ids = {value: index for index, value in enumerate(self.categories[name])}
        unknown = sorted({str(value) for value in column} - set(ids))
        if unknown:
            raise ValueError(f"table: column {name!r} has {unknown[0]!r}, which was not in the rows fitted on")
        return [ids[str(value)] for value in column]


def _check_present(name: str, column: Sequence[Any]) -> None:
    missing = sum(value is None or value == "" or (isinstance(value, float) and math.isnan(value)) for value in column)
    if missing:
        raise ValueError(
            f"table: column {name!r} misses {missing} of {len(column)} values; drop those rows, or fill them in first"
        )
