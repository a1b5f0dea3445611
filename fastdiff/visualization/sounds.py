"""Waveforms as WAV files, and pictures of their spectrograms."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.files import write_atomically
from fastdiff.visualization.figures import any_names, save_figure, shown

_RANGE = 60  # dB below the loudest that are drawn


def save_wav(waveforms: Tensor, sampling_rate: int, path: str | Path, *, gap: float = 0.25) -> Path:
    """Writes a WAV file of 16 bit, mono; several waveforms follow each other with a pause between.

    Args:
        waveforms: float [S] or [N, S] in [-1, 1] (values beyond are clipped).
        sampling_rate: Hz.
        path: path of the file.
        gap: length of the pauses, in seconds.

    Raises:
        ValueError: another shape, nothing to write, or values that are not finite.
    """
    from scipy.io import wavfile

    rows = _rows(waveforms)
    pause = np.zeros(round(gap * sampling_rate))
    parts = [part for row in rows for part in (row, pause)][:-1]
    content = io.BytesIO()
    wavfile.write(content, sampling_rate, np.rint(np.clip(np.concatenate(parts), -1, 1) * 32767).astype(np.int16))
    write_atomically(Path(path), content.getvalue())
    return Path(path)


@any_names()
def save_spectrograms(
    waveforms: Tensor,
    sampling_rate: int,
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    columns: int = 5,
    title: str | None = None,
) -> Path:
    """Writes a PNG with a panel per waveform: time across, frequency up, power in dB below the loudest of all panels.

    Windows of about 32 ms (a power of two of samples), a quarter apart.

    Args:
        waveforms: float [N, S].
        sampling_rate: Hz.
        path: path of the PNG.
        names: above each panel.
        columns: panels per row.
        title: above them all.

    Raises:
        ValueError: another shape, no waveforms, values that are not finite, or not as many names.
    """
    rows = _rows(waveforms)
    if names is not None and len(names) != len(rows):
        raise ValueError(f"names: got {len(names)} for {len(rows)} waveforms; expected as many")
    images = _decibels(rows, sampling_rate)
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(0.9 + 1.9 * columns, 0.7 + 1.65 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    extent = (0, rows.shape[1] / sampling_rate, 0, sampling_rate / 2000)
    for index, (axes, image) in enumerate(zip(panels.flat, images, strict=False)):
        drawn = axes.imshow(
            image, origin="lower", aspect="auto", extent=extent, vmin=-_RANGE, vmax=0, cmap="magma", rasterized=True
        )
        if names is not None:
            axes.set_title(shown(names[index]), fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for column in range(columns):  # the lowest panel of each column has the numbers
        panels[(len(rows) - 1 - column) // columns, column].tick_params(labelbottom=True)
    figure.supxlabel("time, s", fontsize=9)
    figure.supylabel("frequency, kHz", fontsize=9)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.8, pad=0.02)
    bar.set_label("dB, 0 = the loudest", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return save_figure(figure, path, dpi=110)


def _rows(waveforms: Tensor) -> np.ndarray:  # float64 [N, S]
    if waveforms.ndim not in (1, 2) or not waveforms.numel():
        raise ValueError(f"waveforms: got shape {tuple(waveforms.shape)}; expected [S] or [N, S], not empty")
    rows = waveforms.detach().cpu().double().numpy()
    if not np.isfinite(rows).all():
        raise ValueError("waveforms: got values that are not finite; the model that made them has diverged")
    return np.atleast_2d(rows)


def _decibels(rows: np.ndarray, sampling_rate: int) -> np.ndarray:  # [N, frequencies, times], at most 0
    from scipy.signal import ShortTimeFFT, get_window

    length = min(2 ** max(round(np.log2(0.032 * sampling_rate)), 4), rows.shape[1])
    transform = ShortTimeFFT(get_window("hann", length), max(length // 4, 1), fs=sampling_rate)
    power = transform.spectrogram(rows)
    return 10 * np.log10(np.maximum(power / max(power.max(), 1e-30), 10.0 ** (-_RANGE / 10)))
