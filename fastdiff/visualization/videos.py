"""Videos as moving GIFs and as sheets of their frames."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastdiff.data.images import to_bytes
from fastdiff.files import write_atomically
from fastdiff.visualization.grids import save_sample_grid


def save_video_gif(
    videos: Tensor,
    path: str | Path,
    *,
    columns: int = 8,
    frames_per_second: float = 8.0,
    scale: int = 3,
) -> Path:
    """Writes a GIF that plays all videos side by side, over and over.

    Args:
        videos: float [F, C, H, W] or [N, F, C, H, W] in [-1, 1] (values beyond are clipped), C 1 or 3.
        path: path of the GIF.
        columns: videos per row.
        frames_per_second: a GIF counts in hundredths of a second: frames last 100/frames_per_second of them, rounded,
            at least 2.
        scale: pixels of the GIF a pixel of the videos, along each edge.

    Raises:
        ValueError: another shape, or a rate or scale that is not positive.
    """
    videos = _checked(videos[None] if videos.ndim == 4 else videos)
    if frames_per_second <= 0 or scale < 1 or columns < 1:
        raise ValueError(
            f"frames_per_second: got {frames_per_second}, scale {scale}, columns {columns}; expected positive numbers"
        )
    frames = [Image.fromarray(_tiled(videos[:, f], columns)) for f in range(videos.shape[1])]
    size = (frames[0].width * scale, frames[0].height * scale)
    frames = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    duration = 10 * max(round(100 / frames_per_second), 2)  # ms
    content = io.BytesIO()
    frames[0].save(content, format="gif", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    write_atomically(Path(path), content.getvalue())
    return Path(path)


def save_contact_sheet(
    videos: Tensor, path: str | Path, *, names: Sequence[str] | None = None, title: str | None = None
) -> Path:
    """Writes a PNG with a row per video, its frames from left to right.

    Args:
        videos: float [N, F, C, H, W] in [-1, 1] (values beyond are clipped), C 1 or 3.
        path: path of the PNG.
        names: written at the left of each row; numbers from 1 if None.
        title: above the rows.

    Raises:
        ValueError: another shape, or not as many names.
    """
    videos = _checked(videos)
    count, frames = videos.shape[:2]
    names = [str(index + 1) for index in range(count)] if names is None else names
    if len(names) != count:
        raise ValueError(f"names: got {len(names)} for {count} videos; expected as many")
    rows = torch.arange(count).repeat_interleave(frames)
    return save_sample_grid(videos.flatten(0, 1), rows, names, path, columns=frames, title=title)


def _checked(videos: Tensor) -> Tensor:
    if videos.ndim != 5 or videos.shape[2] not in (1, 3) or not videos.numel():
        raise ValueError(f"videos: got shape {tuple(videos.shape)}; expected [N, F, 1 or 3, H, W], not empty")
    return videos.detach().cpu()


def _tiled(images: Tensor, columns: int) -> np.ndarray:  # [N, C, H, W] -> uint8 [height, width] or [height, width, 3]
    count, channels, height, width = images.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    sheet = torch.full((lines * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=torch.uint8)
    for index, image in enumerate(to_bytes(images)):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet.squeeze(-1).numpy()
