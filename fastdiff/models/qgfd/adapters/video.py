"""Video: the patches of each frame, encoded and decoded as images are; time is one more axis of position."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.models.qgfd.adapters.base import (
    Batch,
    Latents,
    LatentShape,
    grid_positions,
    sample_lengths,
)
from fastdiff.models.qgfd.adapters.image import ImageAdapter, ImageAdapterConfig


@dataclass
class VideoAdapterConfig(ImageAdapterConfig):
    """Settings of `VideoAdapter`: those of `ImageAdapterConfig`, for the frames.

    Attributes:
        num_frames: Frames of a sample where no length is asked for.
    """

    num_frames: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "num_frames")


class VideoAdapter(ImageAdapter):
    """Diffusion over the states of the patches of all frames.

    Batches are {"pixel_values" [B, F, C, H, W] in [-1, 1], "labels" int64 [B] (optional)}; F may differ from batch to
    batch, the frames' size is the configuration's. A Hugging Face encoder is one of images, and sees frame by frame.
    """

    modality = "video"
    fields = ("pixel_values",)

    def encode(self, batch: Batch) -> Latents:
        frames = self._pixels(batch)
        tokens = self._encode_images(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).flatten(1, 2)
        return Latents(tokens, None, grid_positions(frames.shape[1], *self.grid, device=frames.device))

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"pixel_values" [B, F, C, H, W]}, clamped to [-1, 1]; F = L / patches of a frame."""
        return {"pixel_values": self._decode_frames(tokens).clamp(-1, 1)}

    def reconstruction_loss(self, batch: Batch, latents: Latents) -> Tensor:  # [B]
        """Mean squared error of the pixels."""
        error = self._decode_frames(latents.tokens).float() - batch["pixel_values"]
        return error.square().flatten(1).mean(1)

    def latent_length(self, batch: Batch) -> int:
        return batch["pixel_values"].shape[1] * self.grid[0] * self.grid[1]

    def sample_shape(
        self, count: int, length: int | Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> LatentShape:
        frames = set(sample_lengths(count, length, self.config.num_frames)) or {self.config.num_frames}
        if len(frames) > 1:
            raise ValueError(f"length: got {length}; the samples of one batch of videos have one number of frames")
        positions = grid_positions(frames.pop(), *self.grid, device=device)
        return LatentShape(len(positions), None, positions)

    def _decode_frames(self, tokens: Tensor) -> Tensor:  # [B, L, latent_dim] -> [B, F, C, H, W]
        frames = tokens.unflatten(1, (-1, self.grid[0] * self.grid[1]))
        return self._decode_images(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

    def _pixels(self, batch: Batch) -> Tensor:
        pixels, expected = batch["pixel_values"], [self.config.channels, *self.config.size]
        if pixels.ndim != 5 or list(pixels.shape[2:]) != expected or pixels.shape[1] == 0:
            raise ValueError(f"pixel_values: got shape {list(pixels.shape)}; expected [B, F, {str(expected)[1:]}")
        return pixels
