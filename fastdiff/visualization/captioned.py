"""Pictures with the texts that they were drawn from: grids, tables with headings, and animations of denoising."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

from fastdiff.data.images import to_bytes
from fastdiff.files import write_atomically
from fastdiff.visualization.figures import any_names, drawable, save_figure, width_of

_CHARACTER, _LINE = 0.066, 0.14  # inches of a caption's character and line, at 8 points
_ALONE, _IN_STRIP = 1.25, 0.62  # inches of a picture with a caption of its own, and of one of several
_GAP, _EDGE, _TITLE = 0.15, 0.12, 0.3  # inches between cells, at the edges, and of the title
_WIDEST, _STRIP = 8.2, 8  # inches of a grid, and pictures in a line of a strip
_MOST_LINES = 5  # of a caption; what follows is left out
_LEFT = 24  # columns of the texts at the left of a table


@any_names()
def save_captioned_grid(
    images: Tensor,
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int | None = None,
    headings: Sequence[str] = (),
    title: str | None = None,
) -> Path:
    """Writes a PNG of pictures with the text that each was drawn from under them, long ones wrapped.

    Args:
        images: float [N, C, H, W] in [-1, 1] (values beyond are clipped), C 1 or 3; N is a multiple of the captions:
            those of the first caption come first.
        captions: the texts.
        path: path of the PNG.
        columns: captions side by side; None takes as many as there are headings, or as fit on a page.
        headings: a text above each column.
        title: above the grid.

    Raises:
        ValueError: no images, shapes that do not fit, or not a heading a column.
    """
    if headings and (columns not in (None, len(headings)) or len(headings) > len(captions)):
        expected = min(columns or len(captions), len(captions))
        raise ValueError(f"headings: got {len(headings)} for {expected} columns; expected one a column")
    figure, _ = _grid(_checked(images, len(captions)), captions, columns, title, headings)
    return save_figure(figure, Path(path), dpi=160)


@any_names()
def save_captioned_gif(
    frames: Tensor,
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: int | None = None,
    title: str | None = None,
    frames_per_second: float = 8.0,
    hold_seconds: float = 2.0,
) -> Path:
    """Writes a GIF of a captioned grid that changes from frame to frame, over and over: pictures as they are denoised.

    Args:
        frames: float [F, N, C, H, W], each as the images of `save_captioned_grid`.
        frames_per_second: of all frames but the last.
        hold_seconds: how long the last one stays.

    Raises:
        ValueError: no frames, or shapes that do not fit.
    """
    if frames.ndim != 5 or not len(frames) or frames_per_second <= 0:
        raise ValueError(
            f"frames: got shape {tuple(frames.shape)} at {frames_per_second} a second; expected [F, N, C, H, W] with "
            "F >= 1, at a positive rate"
        )
    figure, drawn = _grid(_checked(frames[0], len(captions)), captions, columns, title)
    figure.set_dpi(110)
    canvas, pictures = FigureCanvasAgg(figure), []
    for frame in frames:
        for artist, strip in zip(drawn, _strips(frame, len(captions)), strict=True):
            artist.set_data(strip)
        canvas.draw()
        pictures.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    # one palette for all: else colours flicker from frame to frame
    palette = pictures[-1].quantize(255)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for picture in pictures]
    durations = [10 * max(round(100 / frames_per_second), 2)] * (len(pictures) - 1) + [round(1000 * hold_seconds)]
    content = io.BytesIO()
    pictures[0].save(
        content, format="gif", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
    )
    write_atomically(Path(path), content.getvalue())
    return Path(path)


@any_names()
def save_picture_table(
    images: Tensor,
    row_names: Sequence[str],
    column_names: Sequence[str],
    path: str | Path,
    *,
    title: str | None = None,
) -> Path:
    """Writes a PNG of pictures in rows and columns, with texts at the left and headings above.

    Args:
        images: float [R, K, C, H, W] in [-1, 1] (values beyond are clipped), C 1 or 3; NaN throughout is no picture.
        row_names: R texts; long ones are wrapped.
        column_names: K texts.
        path: path of the PNG.
        title: above all.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    if images.ndim != 5 or tuple(images.shape[:2]) != (len(row_names), len(column_names)) or not images.numel():
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, {len(row_names)} rows' and {len(column_names)} columns' names; "
            "expected [R, K, 1 or 3, H, W], R and K names"
        )
    rows = [_wrapped(name, _LEFT) for name in row_names]
    heads = [_wrapped(name, int(_IN_STRIP * 1.4 / _CHARACTER)) for name in column_names]
    height, width = images.shape[-2:]
    size = max(_IN_STRIP, min(1.0, width / 64)) * (1.4 if len(column_names) <= 8 else 1.0)
    left = _EDGE + _CHARACTER * max((width_of(line) for lines in rows for line in lines), default=0) + 0.08
    top = _EDGE + (_TITLE if title else 0) + _LINE * max(map(len, heads)) + 0.05
    pitch = max(size * height / width, max(map(len, rows)) * _LINE) + 0.06
    across = size + 0.06
    figure = Figure(figsize=(left + len(column_names) * across + _EDGE, top + len(rows) * pitch + _EDGE))
    total_width, total_height = figure.get_size_inches()
    for column, lines in enumerate(heads):
        x = (left + column * across + size / 2) / total_width
        figure.text(x, 1 - (top - 0.04) / total_height, "\n".join(lines), fontsize=8, ha="center", va="bottom")
    for row, lines in enumerate(rows):
        middle = 1 - (top + row * pitch + size * height / width / 2) / total_height
        figure.text((left - 0.06) / total_width, middle, "\n".join(lines), fontsize=8, ha="right", va="center")
        for column, image in enumerate(images[row]):
            if not bool(image.isnan().all()):
                place = (left + column * across, top + row * pitch, size, size * height / width)
                _shown(figure, place, _sheet(image[None], 1))
    _write_title(figure, title)
    return save_figure(figure, Path(path), dpi=160)


def _checked(images: Tensor, captions: int) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or not captions or len(images) % captions:
        raise ValueError(
            f"images: got shape {tuple(images.shape)} and {captions} captions; expected [N, 1 or 3, H, W], N a "
            "multiple of the captions"
        )
    return images.detach().cpu()


def _grid(
    images: Tensor,
    captions: Sequence[str],
    columns: int | None,
    title: str | None,
    headings: Sequence[str] = (),
) -> tuple[Figure, list[AxesImage]]:
    """The figure of a captioned grid, and what is drawn in each of its cells."""
    each = len(images) // len(captions)
    across, down = min(each, _STRIP), -(-each // _STRIP)
    size, ratio = _ALONE if each == 1 else _IN_STRIP, images.shape[-2] / images.shape[-1]
    cell, tall = across * size, down * size * ratio
    columns = columns or len(headings) or max(1, int((_WIDEST - 2 * _EDGE + _GAP) / (cell + _GAP)))
    columns = min(columns, len(captions))
    texts = [_wrapped(caption, int(cell / _CHARACTER)) for caption in captions]
    rows = [texts[start : start + columns] for start in range(0, len(texts), columns)]
    below = [0.05 + _LINE * max(map(len, row)) + _GAP for row in rows]
    heads = [_wrapped(heading, int(cell / _CHARACTER)) for heading in headings]
    top = _EDGE + (_TITLE if title else 0) + (_LINE * max(map(len, heads)) + 0.05 if heads else 0)
    least = 2 * _EDGE + 0.07 * len(title or "")
    total_width = max(columns * (cell + _GAP) - _GAP + 2 * _EDGE, least)
    total_height = top + sum(tall + each for each in below) + _EDGE - _GAP / 2
    figure = Figure(figsize=(total_width, total_height))
    shift = (total_width - columns * (cell + _GAP) + _GAP) / 2
    for column, lines in enumerate(heads):
        x = (shift + column * (cell + _GAP) + cell / 2) / total_width
        figure.text(x, 1 - (top - 0.04) / total_height, "\n".join(lines), fontsize=8, ha="center", va="bottom")
    drawn, strips = [], _strips(images, len(captions))
    for row, lines_of_row in enumerate(rows):
        for column, lines in enumerate(lines_of_row):
            left = shift + column * (cell + _GAP)
            drawn.append(_shown(figure, (left, top, cell, tall), strips[row * columns + column]))
            x, y = (left + cell / 2) / total_width, 1 - (top + tall + 0.05) / total_height
            figure.text(x, y, "\n".join(lines), fontsize=8, ha="center", va="top", linespacing=1.15)
        top += tall + below[row]
    _write_title(figure, title)
    return figure, drawn


def _write_title(figure: Figure, title: str | None) -> None:
    if title:
        y = 1 - (_EDGE + 0.08) / figure.get_figheight()
        figure.text(0.5, y, drawable(title), fontsize=9, color="0.35", ha="center", va="center")


def _shown(figure: Figure, place: tuple[float, float, float, float], sheet: np.ndarray) -> AxesImage:
    """Draws a sheet at (left, top, width, height), in inches from the upper left corner."""
    width, height = figure.get_size_inches()
    left, top, wide, tall = place
    axes = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
    axes.set_axis_off()
    return axes.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")


def _strips(images: Tensor, captions: int) -> list[np.ndarray]:
    """The sheet of each caption's pictures."""
    each = len(images) // captions
    return [_sheet(part, min(each, _STRIP)) for part in images.detach().cpu().split(each)]


def _sheet(images: Tensor, across: int) -> np.ndarray:  # [N, C, H, W] -> uint8 [height, width] or [height, width, 3]
    count, channels, height, width = images.shape
    gap = 0 if count == 1 else max(1, width // 16)
    lines = -(-count // across)
    sheet = torch.full((lines * (height + gap) - gap, across * (width + gap) - gap, channels), 255, dtype=torch.uint8)
    for index, image in enumerate(to_bytes(images)):
        top, left = index // across * (height + gap), index % across * (width + gap)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet.squeeze(-1).numpy()


def _wrapped(text: str, columns: int) -> list[str]:
    """A text in lines of so many columns, at most five."""
    text = drawable(text)
    wide = max(1.0, width_of(text) / max(len(text), 1))  # letters of Chinese, Japanese and Korean take two columns
    lines = textwrap.wrap(text, max(4, int(columns / wide))) or [""]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], lines[_MOST_LINES - 1][:-1] + "…"]
    return lines
