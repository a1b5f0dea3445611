"""Sound files read as mono waveforms of one sampling rate."""

import math
import struct
import warnings
from pathlib import Path

import numpy as np

PEAK = 0.9  # of a recording that is scaled; room for what a vocoder or resampler overshoots
_SILENCE = 0.02  # of the peak: quieter ends of a recording are cut off


def read_wav(path: Path) -> tuple[int, np.ndarray]:
    """Sampling rate and float64 [S] in [-1, 1] of a WAV file (PCM or float); channels are averaged.

    Raises:
        ValueError: not a WAV file that scipy reads, damaged, empty, or with values that are not finite; one line.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks beside the samples, such as titles
            rate, samples = wavfile.read(path)
    except (ValueError, EOFError, struct.error, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a WAV file ({reason}); convert or remove it") from None
    if samples.dtype == np.uint8:
        waveform = (samples.astype(np.float64) - 128) / 128
    elif samples.dtype.kind == "i":
        waveform = samples.astype(np.float64) / 2 ** (8 * samples.dtype.itemsize - 1)
    else:
        waveform = samples.astype(np.float64)
    if rate < 1 or not waveform.size or not np.isfinite(waveform).all():
        raise ValueError(f"{path} has no samples, or some that are not finite; convert or remove it")
    return rate, waveform.mean(axis=1) if waveform.ndim == 2 else waveform


def resample(
    waveforms: np.ndarray,  # [..., S]
    rate: int,
    target_rate: int,
) -> np.ndarray:  # [..., S · target_rate / rate]
    """The waveforms at another rate in Hz, by scipy's polyphase filter. Raises ModuleNotFoundError without scipy."""
    if rate == target_rate or waveforms.shape[-1] == 0:  # scipy refuses empty ones
        return waveforms
    try:
        from scipy.signal import resample_poly
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"audio of {rate} Hz at {target_rate} Hz needs scipy: pip install 'fastdiff-kernels[data]'"
        ) from None
    divisor = math.gcd(rate, target_rate)
    return resample_poly(waveforms, target_rate // divisor, rate // divisor, axis=-1)


def trimmed(waveform: np.ndarray) -> np.ndarray:
    """Without the quiet at both ends, scaled to a peak of 0.9. Empty where there is nothing but silence."""
    level = np.abs(waveform)
    peak = level.max(initial=0)
    if peak == 0:
        return waveform[:0]
    loud = np.flatnonzero(level >= _SILENCE * peak)
    return waveform[loud[0] : loud[-1] + 1] * (PEAK / peak)


def window(waveform: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` samples from `start` on, zeros after the end; int16, as WAV files of 16 bit have them."""
    cut = waveform[start : start + length]
    cut = np.pad(cut, (0, length - len(cut)))
    return np.rint(np.clip(cut, -1, 1) * 32767).astype(np.int16)
