"""Grids of images with the classes' names beside them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.data.images import to_bytes

_GAP = 2  # pixels between images
_BACKGROUND = 255


def save_sample_grid(images: Tensor, labels: Tensor | Sequence[int], class_names: Sequence[str], path: str | Path, *,
                     columns: int = 8, title: str | None = None) -> Path:
    """Writes a PNG with one block of rows a class, the class's name at the left.

    Args:
        images: float [N, C, H, W] in [-1, 1] (values beyond are clipped), C 1 or 3.
        labels: N class labels; classes appear in the order of their labels.
        class_names: by label.
        path: of the PNG.
        columns: images a row; a class with more takes several rows.
        title: above the grid.

    Raises:
        ValueError: no images, or shapes that do not fit.
    """
    labels = torch.as_tensor(labels).cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or len(images) != len(labels):
        raise ValueError(f"images has shape {tuple(images.shape)} and labels {tuple(labels.shape)}; expected "
                         "[N, 1 or 3, H, W] with N >= 1, and [N]")
    rows: list[tuple[int, Tensor]] = []  # label, images of the row
    for label in labels.unique().tolist():
        members = images[labels == label]
        rows += [(label, members[start:start + columns]) for start in range(0, len(members), columns)]
    columns = max(len(members) for _, members in rows)
    sheet = _sheet([members for _, members in rows], columns)
    return _draw(sheet, [(label, len(members)) for label, members in rows], class_names, columns, images.shape, path,
                 title)


def _sheet(rows: list[Tensor], columns: int) -> Tensor:  # uint8 [height, width, C]
    channels, height, width = rows[0].shape[1:]
    sheet = torch.full((len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels), _BACKGROUND,
                       dtype=torch.uint8)
    for r, members in enumerate(rows):
        for c, image in enumerate(to_bytes(members)):
            top, left = r * (height + _GAP), c * (width + _GAP)
            sheet[top:top + height, left:left + width] = image.permute(1, 2, 0)
    return sheet


def _draw(sheet: Tensor, rows: list[tuple[int, int]], class_names: Sequence[str], columns: int,
          shape: torch.Size, path: str | Path, title: str | None) -> Path:
    cell = max(0.45, min(1.0, shape[-1] / 64))  # inches an image: small ones are enlarged
    names = [class_names[label] for label, _ in rows]
    margin = 0.25 + 0.095 * max(len(name) for name in names)
    top = 0.45 if title else 0.1
    width, height = columns * cell + margin + 0.1, len(rows) * cell * shape[-2] / shape[-1] + top + 0.1
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((margin / width, 0.1 / height, columns * cell / width, 1 - (top + 0.1) / height))
    axes.imshow(sheet.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    pitch = shape[-2] + _GAP
    first = [index for index, (label, _) in enumerate(rows) if index == 0 or rows[index - 1][0] != label]
    axes.set_yticks([index * pitch + shape[-2] / 2 - 0.5 for index in first], [names[index] for index in first])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=11)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=9, color="0.35", y=1 - 0.12 / height, va="top")
    path = Path(path)
    figure.savefig(path, dpi=160, format="png")
    return path
