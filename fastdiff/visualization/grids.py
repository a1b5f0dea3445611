"""Grids of images with the classes' names beside them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.data.images import to_bytes
from fastdiff.visualization.figures import any_names, save_figure, shown, width_of

_BACKGROUND = 255


@any_names()
def save_sample_grid(
    images: Tensor,
    labels: Tensor | Sequence[int],
    class_names: Sequence[str],
    path: str | Path,
    *,
    columns: int = 8,
    title: str | None = None,
) -> Path:
    """Writes a PNG with one block of rows per class, the class's name at the left.

    Args:
        images: float [N, C, H, W] in [-1, 1] (values beyond are clipped), C 1 or 3.
        labels: N class labels; classes appear in the order of their labels.
        class_names: names by label.
        path: path of the PNG.
        columns: images per row; a class with more takes several rows.
        title: above the grid.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    labels = torch.as_tensor(labels).cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or len(images) != len(labels):
        raise ValueError(
            f"images: got shape {tuple(images.shape)} and labels {tuple(labels.shape)}; expected "
            "[N, 1 or 3, H, W] with N >= 1, and [N]"
        )
    rows: list[tuple[int, Tensor]] = []  # label, images of the row
    for label in dict.fromkeys(labels.tolist()):  # in the order of their first images
        members = images[labels == label]
        rows += [(label, members[start : start + columns]) for start in range(0, len(members), columns)]
    columns = max(len(members) for _, members in rows)
    firsts = [
        (index, shown(class_names[label]))
        for index, (label, _) in enumerate(rows)
        if index == 0 or rows[index - 1][0] != label
    ]
    sheet = _sheet([members for _, members in rows], columns)
    _draw(sheet, firsts, tuple(images.shape[-2:]), Path(path), title)
    return Path(path)


def _gap(width: int) -> int:
    """Pixels between images: a sixteenth of one, at least 1."""
    return max(1, width // 16)


def _sheet(rows: list[Tensor], columns: int) -> Tensor:  # uint8 [height, width, C]
    channels, height, width = rows[0].shape[1:]
    gap = _gap(width)
    sheet = torch.full(
        (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, channels), _BACKGROUND, dtype=torch.uint8
    )
    for r, members in enumerate(rows):
        for c, image in enumerate(to_bytes(members)):
            top, left = r * (height + gap), c * (width + gap)
            sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet


def _draw(
    sheet: Tensor, rows: list[tuple[int, str]], image_size: tuple[int, int], path: Path, title: str | None
) -> None:
    """The sheet at a whole scale, names at its left and the title above, in inches from the sheet's own size.

    Args:
        rows: (index, class name) of the first row of each class.
        image_size: (height, width) of an image.
    """
    height, width = sheet.shape[:2]
    inch = max(0.45, min(1.0, image_size[1] / 64)) / image_size[1]  # a pixel: small images are enlarged
    left = 0.2 + 0.095 * max(width_of(name) for _, name in rows)
    top, edge = 0.4 if title else 0.1, 0.1
    title_width = 0.2 + 0.07 * len(title or "")  # at 9 points; a narrow sheet gets room for it at its right
    total_width, total_height = max(width * inch + left + edge, title_width), height * inch + top + edge
    figure = Figure(figsize=(total_width, total_height))
    axes = figure.add_axes(
        (left / total_width, edge / total_height, width * inch / total_width, height * inch / total_height)
    )
    axes.imshow(sheet.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    pitch = image_size[0] + _gap(image_size[1])
    axes.set_yticks([index * pitch + (image_size[0] - 1) / 2 for index, _ in rows], [name for _, name in rows])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=11)
    axes.spines[:].set_visible(False)
    if title:
        figure.text(
            max(left + width * inch / 2, title_width / 2) / total_width,
            1 - 0.2 / total_height,
            title,
            fontsize=9,
            color="0.35",
            ha="center",
            va="center",
        )
    save_figure(figure, path, dpi=160)
