"""Pictures of an autoencoder: what it makes of images, and what noise does to images and to latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.models.autoencoder import decode, encode
from fastdiff.training.randomness import normal_noise

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
_COLUMNS = 10


def reconstruction_sheet(vae: "AutoencoderKL", images: Tensor, path: Path, title: str | None = None) -> Path:
    """Rows of images, of what is decoded from their latents, and of the absolute error (white is none, black is 1/2 of
    the range or more).

    Args:
        images: [N, C, H, W] in -1 … 1, C 1 or 3.
    """
    from fastdiff.visualization import save_sample_grid  # matplotlib: a second that other uses need not wait

    made = decode(vae, encode(vae, images), None).clamp(-1, 1)
    errors = 1 - 2 * (made - images).abs().clamp(max=1)  # 1 of 2, the range, is black
    rows, labels, names = [], [], []
    for part in torch.arange(len(images)).split(_COLUMNS):
        for name, shown in (("original", images), ("reconstruction", made), ("error", errors)):
            rows.append(shown[part])
            labels += [len(names)] * len(part)
            names.append(name)
    psnr = 10 * torch.log10(4 / (made - images).square().mean().clamp(min=1e-12))
    told = f"{len(images)} images, PSNR {psnr:.1f} dB"
    return save_sample_grid(
        torch.cat(rows), labels, names, path, columns=_COLUMNS, title=f"{title}, {told}" if title else told
    )


def noise_sheet(
    vae: "AutoencoderKL", images: Tensor, path: Path, *, levels: Sequence[float] = NOISE_LEVELS, seed: int = 0
) -> Path:
    """A row for each noise level t: x_t = (1 - t)·x_0 + t·noise of latents, decoded, and beside them of the images.

    Args:
        images: [N, C, H, W] in -1 … 1.
        levels: in 0 … 1.
        seed: seed of the noise, which is the same at each level.
    """
    from fastdiff.visualization import save_sample_grid

    latents, slots = encode(vae, images), range(len(images))
    noises = [normal_noise(slots, x0.shape[1:], seed, part) for part, x0 in enumerate((latents, images))]
    shown, labels = [], []
    for number, level in enumerate(levels):
        in_latents, in_images = (
            torch.lerp(x0, noise, level) for x0, noise in zip((latents, images), noises, strict=True)
        )
        shown += [decode(vae, in_latents, None), in_images]
        labels += [number] * 2 * len(images)
    return save_sample_grid(
        torch.cat(shown),
        labels,
        [f"t = {level:g}" for level in levels],
        path,
        columns=2 * len(images),
        title="left: noise on latents, decoded; right: noise on pixels",
    )
