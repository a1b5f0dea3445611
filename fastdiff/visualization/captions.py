"""Captions that a masked diffusion model wrote for pictures: a grid of them, and where each word looks."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.data.pictures import flattened
from fastdiff.visualization.figures import any_names, monospace, save_figure, shown
from fastdiff.visualization.terminal import printable
from fastdiff.visualization.text import NOTHING, TextSample, coloured_lines, step_colour

if TYPE_CHECKING:
    from PIL.Image import Image

_DPI, _POINTS = 150, 7.5
_COLUMNS = 36  # characters of a caption's line
_CHARACTER, _LINE = 10 / _DPI, 0.15  # inches of a character (10 pixels, hinted) and of a line
_PICTURE, _GAP, _EDGE, _TITLE, _LEGEND = 1.7, 0.26, 0.18, 0.34, 0.42  # inches
_MOST_LINES = 6  # of a reference, and of a caption; what follows is left out
_WIDEST = 9.4  # inches of a grid
_GREY, _NONE, _FRAME = "#6b6b6b", "#c1542d", "#c8c8c8"
_MOST_SWATCHES = 16  # of the legend; more steps share them

Run = tuple[int, str, object]  # column, text, colour


@any_names()
def caption_grid(
    images: "Tensor | Sequence[Image]",
    references: Sequence[str | Sequence[str]],
    samples: Sequence[TextSample],
    path: str | Path,
    *,
    columns: int | None = None,
    title: str | None = None,
) -> Path:
    """Writes a PNG of pictures, each with its reference (grey) and what was generated, coloured by step.

    One scale of colours serves all captions, from dark (first step) to light (last); the legend shows it. Line breaks
    are shown as spaces, characters that a terminal would obey as escapes, and what goes beyond 6 lines not at all.

    Args:
        images: uint8 [N, C, H, W], C 1 or 3, or N pictures of Pillow, of any mode and size.
        references: a text for each picture, or several, of which the first is shown; "" or none is left out.
        samples: N · k generated captions; those of the first picture come first. Prompts are shown grey.
        path: path of the PNG.
        columns: pictures side by side; None takes as many as fit on a page.
        title: above the grid.

    Raises:
        ValueError: no pictures, numbers that do not fit, or a sample without a step for each piece.
    """
    pictures = _as_arrays(images)
    _check_captions(len(pictures), references, samples)
    each = len(samples) // len(pictures)
    last = max((step for sample in samples for step in sample.steps), default=0)
    cells = [
        _lines_of(reference, samples[index * each : (index + 1) * each], last)
        for index, reference in enumerate(references)
    ]
    width = _COLUMNS * _CHARACTER
    columns = min(columns or max(1, int((_WIDEST - 2 * _EDGE + _GAP) / (width + _GAP))), len(pictures))
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    heights = [_PICTURE + 0.08 + _LINE * max(len(cells[index]) for index in row) for row in rows]
    total_width = max(2 * _EDGE + columns * (width + _GAP) - _GAP, 2 * _EDGE + 0.075 * len(title or ""), 3.2)
    top = _EDGE + (_TITLE if title else 0)
    figure = Figure(figsize=(total_width, top + sum(heights) + _GAP * (len(rows) - 1) + _LEGEND + _EDGE))
    if title:
        y = 1 - (_EDGE + 0.08) / figure.get_figheight()
        figure.text(0.5, y, printable(title), fontsize=10, ha="center", va="center")
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = _EDGE + column * (width + _GAP)
            _show(figure, pictures[index], left + (width - _PICTURE) / 2, top, _PICTURE, _PICTURE)
            _write(figure, cells[index], left, top + _PICTURE + 0.08)
        top += height + _GAP
    _draw_legend(figure, last)
    return save_figure(figure, path, dpi=_DPI)


def _as_arrays(images: "Tensor | Sequence[Image]") -> list[np.ndarray]:  # uint8 [H, W, 3] each
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"images: got {images.dtype} {list(images.shape)}; expected torch.uint8 [N, 1 or 3, H, W], or pictures "
                "of Pillow"
            )
        return list(images.detach().cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())
    return [np.asarray(flattened(image, 3)) for image in images]


def _check_captions(count: int, references: Sequence, samples: Sequence[TextSample]) -> None:
    if not count or len(references) != count or not samples or len(samples) % count:
        raise ValueError(
            f"images: got {count} with {len(references)} references and {len(samples)} samples; expected at least one, "
            "as many references, and as many samples or a multiple"
        )
    for index, sample in enumerate(samples):
        if len(sample.pieces) != len(sample.steps):
            raise ValueError(
                f"samples[{index}]: got {len(sample.pieces)} pieces and {len(sample.steps)} steps; expected a step for "
                "each piece"
            )


def _lines_of(reference: str | Sequence[str], samples: Sequence[TextSample], last: int) -> list[list[Run]]:
    """The lines below a picture: its reference, and its captions, the second and later ones after a thin space."""
    text = reference if isinstance(reference, str) else next(iter(reference), "")
    lines = _wrapped([(text, _GREY)]) if text.strip() else []
    for sample in samples:
        pieces = zip(sample.pieces, sample.steps, strict=True)
        coloured = [(piece, step_colour(step, last)) for piece, step in pieces]
        if not "".join(sample.pieces).strip():
            coloured = [(NOTHING, _NONE)]
        lines += _wrapped([(sample.prompt, _GREY), *coloured])
    return lines


def _wrapped(runs: Sequence[tuple[str, object]]) -> list[list[Run]]:
    shown_runs = [(_drawable(text), colour) for text, colour in runs]
    lines = coloured_lines(shown_runs, _COLUMNS, whole_words=True)
    lines = [line for line in lines if any(text.strip() for _, text, _ in line)]
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], [(0, "…", _GREY)]]


def _drawable(text: str) -> str:
    """A piece of text in one line; its spaces stay, as they part it from its neighbours."""
    text = printable(text.replace("\n", " ").replace("\t", " "))
    return "".join(character if character.isprintable() else "·" for character in text)


def _show(figure: Figure, picture: np.ndarray, left: float, top: float, wide: float, tall: float) -> None:
    """Draws a picture, framed, in the middle of a place at (left, top), in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    axes.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=_FRAME, linewidth=0.6)


def _write(figure: Figure, lines: Sequence[Sequence[Run]], left: float, top: float) -> None:
    width, height = figure.get_size_inches()
    for line, (column, text, colour) in ((n, run) for n, runs in enumerate(lines) for run in runs):
        x, y = (left + column * _CHARACTER) / width, 1 - (top + (line + 0.5) * _LINE) / height
        figure.text(x, y, text, color=colour, family=monospace(), fontsize=_POINTS, va="center")


def _draw_legend(figure: Figure, last: int) -> None:
    """The colours of the steps, counted from 1, at the lower left; of many steps a few."""
    width, height = figure.get_size_inches()
    shown_steps = sorted({round(each) for each in np.linspace(0, last, min(last + 1, _MOST_SWATCHES))})
    swatch, bottom = 0.22, _EDGE
    label = "step that chose a token"
    figure.text(_EDGE / width, (bottom + 0.09) / height, label, fontsize=7.5, color=_GREY, va="center")
    left = _EDGE + 1.4
    size = min(swatch, (width - left - _EDGE) / len(shown_steps))
    place = (left / width, bottom / height, size * len(shown_steps) / width, 0.18 / height)
    axes = figure.add_axes(place)
    axes.imshow([[step_colour(step, last)[:3] for step in shown_steps]], aspect="auto", interpolation="nearest")
    ends = sorted({0, len(shown_steps) // 2, len(shown_steps) - 1}) if len(shown_steps) > 6 else range(len(shown_steps))
    for index in ends:
        light = sum(step_colour(shown_steps[index], last)[:3]) > 1.5
        axes.text(index, 0, str(shown_steps[index] + 1), fontsize=6.5, ha="center", va="center",
                  color="black" if light else "white")  # fmt: skip
    axes.set_axis_off()


@any_names()
def caption_attention(
    image: "Tensor | Image",
    words: Sequence[str],
    maps: Tensor,
    grid: tuple[int, int, int],
    path: str | Path,
    *,
    columns: int = 6,
    title: str | None = None,
) -> Path:
    """Writes a PNG of a picture, and of where in it each word of its caption looks: a heat map a word.

    Each map has a scale of its own from 0, as in DAAM (Tang et al. 2022, "What the DAAM"). Where the encoder has
    leading tokens (a class token), which are no places of the picture, their share of a word's attention is written
    beside the word.

    Args:
        image: uint8 [C, H, W], C 1 or 3, or a picture of Pillow.
        words: W words or tokens.
        maps: float [W, M], attention of each word to the M tokens of the picture, 0 or above, such as
            the mean of layers and heads.
        grid: (rows, columns, leading tokens) of the M tokens, as `VisionEncoder.grid`.
        path: path of the PNG.
        columns: panels side by side; the picture itself is the first.
        title: above all.

    Raises:
        ValueError: no words, shapes that do not fit, or maps with negative or infinite numbers.
    """
    (picture,) = _as_arrays(image[None] if isinstance(image, Tensor) else [image])
    rows, across, leading = grid
    maps = maps.detach().float().cpu()
    if not words or tuple(maps.shape) != (len(words), leading + rows * across):
        raise ValueError(
            f"maps: got {list(maps.shape)} for {len(words)} words and a grid of {rows} x {across} behind {leading} "
            f"tokens; expected [{len(words)}, {leading + rows * across}], at least one word"
        )
    if not bool(torch.isfinite(maps).all()) or bool((maps < 0).any()):
        raise ValueError("maps: got negative or infinite numbers; expected attention, 0 or above")
    columns = min(columns, len(words) + 1)
    lines = -(-(len(words) + 1) // columns)
    cell, label = 1.45, 0.42 if leading else 0.28
    tall = cell * min(picture.shape[0] / picture.shape[1], 1.5)
    width = max(2 * _EDGE + columns * (cell + 0.12) - 0.12, 2 * _EDGE + 0.075 * len(title or ""))
    top = _EDGE + (_TITLE if title else 0)
    figure = Figure(figsize=(width, top + lines * (tall + label) + _EDGE / 2))
    if title:
        y = 1 - (_EDGE + 0.08) / figure.get_figheight()
        figure.text(0.5, y, printable(title), fontsize=10, ha="center", va="center")
    shares = maps[:, :leading].sum(1) / maps.sum(1).clamp_min(1e-12)
    panels = itertools.chain([None], zip(words, maps[:, leading:].view(-1, rows, across), shares, strict=True))
    for index, panel in enumerate(panels):
        left, y = _EDGE + index % columns * (cell + 0.12), top + index // columns * (tall + label)
        _show(figure, picture, left, y, cell, tall)
        if panel is not None:
            _overlay(figure, picture, panel[1].numpy())
            name = shown(_drawable(panel[0])) or "␣"
            note = f"{name}\n{float(panel[2]):.0%} on leading tokens" if leading else name
            _label(figure, note, left + cell / 2, y + tall)
    return save_figure(figure, path, dpi=_DPI)


def _overlay(figure: Figure, picture: np.ndarray, heat: np.ndarray) -> None:
    """A heat map over the picture that was drawn last, which fades under it."""
    axes, (height, width) = figure.axes[-1], picture.shape[:2]
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    axes.images[0].set_data((0.5 * grey + 0.5 * 255).astype(np.uint8))
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    strength = heat / max(float(heat.max()), 1e-12)
    axes.imshow(strength, cmap="YlOrRd", vmin=0, vmax=1, alpha=0.85 * strength, extent=extent,
                interpolation="nearest")  # fmt: skip


def _label(figure: Figure, text: str, x: float, y: float) -> None:
    width, height = figure.get_size_inches()
    first, _, rest = text.partition("\n")
    figure.text(x / width, 1 - (y + 0.11) / height, first, fontsize=8.5, ha="center", va="center")
    figure.text(x / width, 1 - (y + 0.25) / height, rest, fontsize=6.5, color=_GREY, ha="center", va="center")
