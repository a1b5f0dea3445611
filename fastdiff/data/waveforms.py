"""Sound files read as mono waveforms of one sampling rate."""

import math
import mmap
import struct
from pathlib import Path

import numpy as np

from fastdiff.reading import reading

PEAK = 0.9  # of a recording that is scaled; room for what a vocoder or resampler overshoots
_SILENCE = 0.02  # of the peak: quieter ends of a recording are cut off
_CREST = 10.0  # times the loudest RMS: peaks beyond it are clicks, which say nothing about how loud a recording is
_FRAME = 0.005  # s, of the RMS
_CANCELLED = 0.01  # of the loudest channel's RMS: what is left of channels in antiphase
MAX_RATE = 768_000  # Hz, the highest that converters have
MAX_SAMPLES = 2**28  # of a recording: 2 GiB as float64
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


def read_wav(path: Path) -> tuple[int, np.ndarray]:
    """Sampling rate and float64 [S] of a WAV file, PCM of 8 to 32 bits in [-1, 1] or float; channels are averaged.

    Raises:
        ValueError: not a WAV file, damaged, cut short, empty, with values that are not finite, or with channels that
            cancel each other; one line. OSError where it is missing.
    """
    with reading(path, " cannot be read as a WAV file", "; convert or remove it"):
        rate, samples = _parsed(path)
    if not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"{path} has no samples, or some that are not finite; convert or remove it")
    try:
        return rate, mono(samples)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def mono(samples: np.ndarray) -> np.ndarray:
    """The mean [S] of channels [S, C]. Raises ValueError where they cancel each other, as stereo in antiphase does."""
    if samples.ndim == 1 or samples.shape[1] == 1:
        return samples.reshape(-1).astype(np.float64)
    mean = samples.mean(axis=1, dtype=np.float64)
    loudest = max(_rms(samples[:, channel]) for channel in range(samples.shape[1]))
    if loudest and _rms(mean) < _CANCELLED * loudest:
        raise ValueError(
            f"has {samples.shape[1]} channels that cancel each other when they are averaged (antiphase); invert one, "
            "or keep one"
        )
    return mean


def _rms(samples: np.ndarray) -> float:
    return math.sqrt(np.square(samples, dtype=np.float64).mean())


def _parsed(path: Path) -> tuple[int, np.ndarray]:
    """Rate and samples [S, C], float64. Sizes are compared with the file before anything is made of them."""
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ValueError("it is empty") from None
    with content:
        kind, end, form = struct.unpack("<4sI4s", content[:12]) if len(content) >= 12 else (b"", 0, b"")
        if kind not in (b"RIFF", b"RIFX") or form != b"WAVE":
            raise ValueError("it does not begin as one")
        order = "<" if kind == b"RIFF" else ">"
        (end,) = struct.unpack(f"{order}I", content[4:8])
        if end + 8 > len(content) + 1:  # a last byte of padding is often left out
            raise ValueError(f"its header says {end + 8} bytes, and it has {len(content)}: it was cut short")
        layout = None
        start = 12
        while start + 8 <= min(end + 8, len(content)):
            name, size = struct.unpack(f"{order}4sI", content[start : start + 8])
            start += 8
            if start + size > len(content):
                raise ValueError(f"its part {name!r} has {size} bytes, {len(content) - start} of them in the file")
            if name == b"fmt ":
                layout = _layout(content[start : start + min(size, 40)], order)
            elif name == b"data":
                if layout is None:
                    raise ValueError("its samples come before their format")
                return layout[0], _samples(content, start, size, order, *layout[1:])
            start += size + size % 2
        raise ValueError("it has no samples, or is longer than its header says")


def _layout(content: bytes, order: str) -> tuple[int, int, int, bool]:
    """Rate, channels, bytes of a sample, and whether samples are floats."""
    kind, channels, rate, _, block, _ = struct.unpack(f"{order}HHIIHH", content[:16])
    if kind == _EXTENSIBLE:
        kind = struct.unpack(f"{order}H", content[24:26])[0]
    if not 1 <= rate <= MAX_RATE:
        raise ValueError(f"its sampling rate is {rate} Hz; expected 1 … {MAX_RATE}")
    if not channels or block % channels:
        raise ValueError(f"it has {channels} channels in {block} bytes")
    width = block // channels
    if (kind, width) not in {(_PCM, 1), (_PCM, 2), (_PCM, 3), (_PCM, 4), (_FLOAT, 4), (_FLOAT, 8)}:
        raise ValueError(f"it has samples of format {kind} in {width} bytes; expected PCM or float")
    return rate, channels, width, kind == _FLOAT


def _samples(
    content: mmap.mmap, start: int, size: int, order: str, channels: int, width: int, is_float: bool
) -> np.ndarray:  # float64 [S, C]
    if size % (channels * width):
        raise ValueError(f"it has {size} bytes of samples, which are no whole number of {channels * width}")
    if size // width > MAX_SAMPLES:
        raise ValueError(f"it has {size // width} samples; expected at most {MAX_SAMPLES}: cut it")
    raw = content[start : start + size]
    if is_float:
        samples = np.frombuffer(raw, f"{order}f{width}").astype(np.float64)
        if np.abs(samples).max(initial=0) > 1000 and np.isfinite(samples).all():
            raise ValueError(f"it has floats up to {np.abs(samples).max():g}; expected about -1 … 1")
    elif width == 1:
        samples = (np.frombuffer(raw, np.uint8).astype(np.float64) - 128) / 128
    elif width == 3:  # as the upper bytes of four
        wide = np.zeros((size // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)[:, :: 1 if order == "<" else -1]
        samples = wide.reshape(-1).view("<i4") / 2.0**31
    else:
        samples = np.frombuffer(raw, f"{order}i{width}") / 2.0 ** (8 * width - 1)
    return samples.reshape(-1, channels)


def resample(
    waveforms: np.ndarray,  # [..., S]
    rate: int,
    target_rate: int,
) -> np.ndarray:  # [..., S · target_rate / rate]
    """The waveforms at another rate in Hz, by scipy's polyphase filter.

    Raises ModuleNotFoundError without scipy, ValueError for more than 2^28 samples.
    """
    if rate == target_rate or waveforms.shape[-1] == 0:  # scipy refuses empty ones
        return waveforms
    if waveforms.size * target_rate > MAX_SAMPLES * rate:
        raise ValueError(f"audio of {rate} Hz at {target_rate} Hz has more than {MAX_SAMPLES} samples; cut it")
    try:
        from scipy.signal import resample_poly
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"audio of {rate} Hz at {target_rate} Hz needs scipy: pip install 'fastdiff-kernels[data]'"
        ) from None
    divisor = math.gcd(rate, target_rate)
    return resample_poly(waveforms, target_rate // divisor, rate // divisor, axis=-1)


def trimmed(waveform: np.ndarray, rate: int) -> np.ndarray:
    """Without the quiet at both ends, scaled to a peak of 0.9. Empty where there is nothing but silence.

    Quiet is what lies below 2 % of the peak. Where the peak is a click (more than ten times the loudest RMS of 5 ms, of
    which single ones are not heard), it is below 2 % of that, and the click is no sound to begin or end with.
    """
    level = np.abs(waveform)
    peak = level.max(initial=0)
    if peak == 0:
        return waveform[:0]
    loud = level >= _SILENCE * peak
    loudness = _loudness(waveform, max(1, round(_FRAME * rate)))
    reference = _CREST * loudness.max()
    if 0 < reference < peak:
        loud = (level >= _SILENCE * reference) & (loudness >= _SILENCE * loudness.max())
    (found,) = np.nonzero(loud)
    return waveform[found[0] : found[-1] + 1] * (PEAK / peak)


def _loudness(waveform: np.ndarray, frame: int) -> np.ndarray:  # [S]
    """The RMS of each frame, of five neighbours the third largest: one frame alone, a click, does not count."""
    count = -(-len(waveform) // frame)
    squares = np.square(np.pad(waveform, (0, count * frame - len(waveform)))).reshape(count, frame).mean(axis=1)
    padded = np.pad(squares, 2)
    median = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    return np.sqrt(median).repeat(frame)[: len(waveform)]


def window(waveform: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` samples from `start` on, zeros after the end; int16, as WAV files of 16 bit have them."""
    cut = waveform[start : start + length]
    cut = np.pad(cut, (0, length - len(cut)))
    return np.rint(np.clip(cut, -1, 1) * 32767).astype(np.int16)
