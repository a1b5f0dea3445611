"""Short sounds with labels: digits spoken by espeak-ng, the WAV files of alsa-utils, or a folder of WAV files."""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.config import check_class_names
from fastdiff.data.file_checks import class_folders, natural_order
from fastdiff.data.labelled import LabelledData
from fastdiff.data.splits import stratified_split
from fastdiff.data.spoken_digits import HELD_OUT_SPEAKERS, VOICES, WORDS, Utterances, load_utterances
from fastdiff.data.waveforms import read_wav, resample, trimmed, window
from fastdiff.errors import named

ALSA_FOLDER = Path("/usr/share/sounds/alsa")


@dataclass
class AudioDataConfig:
    """Which sounds to train on. Recordings are mono (channels averaged), trimmed (see
    `fastdiff.data.waveforms.trimmed`), and scaled to a peak of 0.9.

    Attributes:
        name: "spoken_digits" (0 … 9 by espeak-ng, 13 speakers, 4 accents, 2 pitches, 3 speeds: 3 120 sounds; two
            speakers are held out), "alsa" (the nine WAV files of Debian's alsa-utils, a class each; the end of each is
            held out) or "audio_folder" (WAV files, one subfolder per class; whole files are held out).
        folder: the folder of audio_folder; for alsa, a folder instead of /usr/share/sounds/alsa.
        sampling_rate: Hz. Sounds of other rates are resampled, which a line on stderr says.
        num_samples: length of a window; shorter sounds are followed by zeros. A longer spoken digit is cut, and counted
            on stderr (none at the 0.512 s of the default); longer files give several windows.
        hop: samples from one window of a file to the next; not used by spoken_digits.
        held_out_fraction: share of each class's files that audio_folder holds out.
        class_names: the names of audio_folder's subfolders in the order of their labels; null takes the natural order
            (2 before 10).
    """

    name: Literal["spoken_digits", "alsa", "audio_folder"] = "spoken_digits"
    folder: str | None = None
    sampling_rate: int = 8000
    num_samples: int = 4096
    hop: int = 1024
    held_out_fraction: float = 0.1
    class_names: list[str] | None = None

    def __post_init__(self):
        check_class_names(self.class_names, self.name, "audio_folder")
        for name in ("sampling_rate", "num_samples", "hop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected at least 1")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"{named('held_out_fraction')}: got {self.held_out_fraction}; expected a number between 0 and 1"
            )
        if self.name == "audio_folder" and not self.folder:
            raise ValueError(
                f"{named('folder')}: got none; audio_folder needs a folder with one subfolder of WAVs per class"
            )
        if self.name == "spoken_digits" and self.folder:
            raise ValueError(
                f"{named('folder')}: got {self.folder!r} with spoken_digits, which espeak-ng makes; leave it out"
            )


class Waveforms:
    """Sounds of one length, kept in memory at 16 bit.

    Args:
        samples: int16 [N, S].
        labels: int64 [N].
    """

    def __init__(self, samples: Tensor, labels: Tensor):
        assert samples.dtype == torch.int16 and samples.ndim == 2 and len(samples) == len(labels)
        self.samples, self.labels = samples, labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"input_values": float32 [n, S] in [-1, 1], "labels": int64 [n]}."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return {"input_values": self.samples[indices].float().div_(32767), "labels": self.labels[indices]}

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.samples.shape)).encode())
        digest.update(self.samples.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class AudioData(LabelledData):
    """Labelled sounds, all of them `num_samples` long at `sampling_rate` Hz."""

    train: Waveforms
    held_out: Waveforms
    sampling_rate: int
    num_samples: int


def load_audio_data(config: AudioDataConfig) -> AudioData:
    """Loads the sounds that a recipe names; spoken digits are synthesised the first time.

    Raises:
        FileNotFoundError, ValueError, OSError, RuntimeError: a program or file is missing, damaged, silent or too
            short; one line with what to install or change.
    """
    loaders = {"spoken_digits": _spoken_digits, "alsa": _alsa, "audio_folder": _audio_folder}
    if config.name not in loaders:
        raise ValueError(f"{named('name')}: got {config.name!r}; expected one of {', '.join(loaders)}")
    return loaders[config.name](config)


def _spoken_digits(config: AudioDataConfig) -> AudioData:
    spoken = load_utterances(VOICES)
    _say_resampled(config, [spoken.rate] * (len(spoken.limits) - 1))
    windows, cut = [], 0
    for waveform in _at_rate(spoken, config.sampling_rate):
        waveform = trimmed(waveform, config.sampling_rate)
        cut += len(waveform) > config.num_samples
        windows.append(window(waveform, 0, config.num_samples))
    if cut:
        print(
            f"data spoken_digits: {cut} of {len(windows)} sounds are longer than {named('num_samples')} = "
            f"{config.num_samples} and cut",
            file=sys.stderr,
        )
    labels = np.arange(len(windows)) % len(WORDS)
    held_out = np.repeat([voice.speaker in HELD_OUT_SPEAKERS for voice in VOICES], len(WORDS))
    parts = [[(windows[i], labels[i]) for i in np.flatnonzero(chosen)] for chosen in (~held_out, held_out)]
    return _data(config, *parts, tuple("0123456789"))


def _at_rate(spoken: Utterances, sampling_rate: int) -> Iterator[np.ndarray]:
    """Each utterance at another rate, zeros behind it: 256 are resampled at a time, as each call designs a filter."""
    longest = np.diff(spoken.limits).max()
    for first in range(0, len(spoken.limits) - 1, 256):
        limits = spoken.limits[first : first + 257]
        rows = np.zeros((len(limits) - 1, longest))
        for row, start, end in zip(rows, limits[:-1], limits[1:], strict=True):
            row[: end - start] = spoken.samples[start:end] / 32768
        yield from resample(rows, spoken.rate, sampling_rate)


def _alsa(config: AudioDataConfig) -> AudioData:
    folder = Path(config.folder).expanduser() if config.folder else ALSA_FOLDER
    files = natural_order(folder.glob("*.wav"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no .wav files; run `apt-get install alsa-utils`, or set {named('folder')}"
        )
    waveforms = _read(config, files)
    train, held_out = [], []
    for label, (path, waveform) in enumerate(zip(files, waveforms, strict=True)):
        end = len(waveform) - config.num_samples  # the last window is held out, and no window reaches into it
        if end < config.num_samples:
            raise ValueError(
                f"{path} has {len(waveform)} samples at {config.sampling_rate} Hz; expected two windows of "
                f"{named('num_samples')} = {config.num_samples}: lower it"
            )
        starts = range(0, end - config.num_samples + 1, config.hop)
        train += [(window(waveform, start, config.num_samples), label) for start in starts]
        held_out.append((window(waveform, end, config.num_samples), label))
    return _data(config, train, held_out, tuple(path.stem for path in files))


def _audio_folder(config: AudioDataConfig) -> AudioData:
    root = Path(config.folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(
            f"{named('folder')}: got {config.folder!r}, which is not a folder; expected one with a subfolder of WAV "
            "files per class"
        )
    classes = class_folders(root, config.class_names)
    files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() == ".wav") for folder in classes]
    if not classes:
        raise ValueError(
            f"{named('folder')}: got {config.folder!r}, which has no subfolders; expected one of WAVs per class"
        )
    for folder, found in zip(classes, files, strict=True):
        if len(found) < 2:
            raise ValueError(f"{folder} has {len(found)} WAV files; expected at least 2 (one is held out)")
    waveforms = _read(config, [path for found in files for path in found])
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(found) for found in files]))
    parts = []
    for indices in stratified_split(labels, config.held_out_fraction):
        part = []
        for index in indices.tolist():
            last = max(len(waveforms[index]) - config.num_samples, 0)
            starts = range(0, last + 1, config.hop)
            part += [(window(waveforms[index], s, config.num_samples), int(labels[index])) for s in starts]
        parts.append(part)
    return _data(config, *parts, tuple(folder.name for folder in classes))


def _read(config: AudioDataConfig, paths: Sequence[Path]) -> list[np.ndarray]:
    """Trimmed recordings at the config's rate."""
    waveforms, rates = [], []
    for path in paths:
        rate, waveform = read_wav(path)
        try:
            waveform = trimmed(resample(waveform, rate, config.sampling_rate), config.sampling_rate)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not len(waveform):
            raise ValueError(f"{path} is silent; remove it")
        waveforms.append(waveform)
        rates.append(rate)
    _say_resampled(config, rates)
    return waveforms


def _say_resampled(config: AudioDataConfig, rates: Iterable[int]) -> None:
    others = [rate for rate in rates if rate != config.sampling_rate]
    if others:
        found = ", ".join(map(str, sorted(set(others))))
        print(
            f"data {config.name}: {len(others)} sounds of {found} Hz are resampled to {config.sampling_rate} Hz",
            file=sys.stderr,
        )


def _data(
    config: AudioDataConfig,
    train: list[tuple[np.ndarray, int]],
    held_out: list[tuple[np.ndarray, int]],
    class_names: tuple[str, ...],
) -> AudioData:
    parts = []
    for examples in (train, held_out):
        samples = torch.from_numpy(np.stack([samples for samples, _ in examples]))
        parts.append(Waveforms(samples, torch.tensor([label for _, label in examples])))
    return AudioData(config.name, *parts, class_names, config.sampling_rate, config.num_samples)
