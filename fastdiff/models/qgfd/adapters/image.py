"""Images: patches through a small encoder of one's own, or the patch states of a Hugging Face vision transformer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.qgfd.adapters.base import (
    Adapter,
    AdapterConfig,
    Batch,
    Latents,
    LatentShape,
    TokenStack,
    grid_positions,
    no_lengths,
    unit_scale,
)
from fastdiff.models.qgfd.adapters.huggingface import encoder_of
from fastdiff.models.qgfd.backbone import QGFDConfig
from fastdiff.nn import PatchEmbed


@dataclass
class ImageAdapterConfig(AdapterConfig):
    """Settings of `ImageAdapter`, beside those of `AdapterConfig`.

    Attributes:
        image_size: Height and width of the images, in pixels; one number for a square.
        channels: 1 (grey) or 3 of the images, or any number without a Hugging Face encoder.
        patch_size: Side of a patch of the adapter's own encoder; images are padded to multiples of it.
        image_mean: By channel, what a Hugging Face encoder wants subtracted from pixels in [0, 1].
        image_std: By channel, what it then wants them divided by.
    """

    image_size: int | tuple[int, int] = 32
    channels: int = 3
    patch_size: int = 4
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "image_mean", "image_std"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        self.at_least(1, "image_size", "channels", "patch_size")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size


class ImageAdapter(Adapter):
    """Diffusion over the states of image patches.

    Batches are {"pixel_values" [B, C, H, W] in [-1, 1], "labels" int64 [B] (optional)}. A Hugging Face encoder gets
    them in its own size, number of channels and normalisation; its class tokens are dropped.
    """

    modality = "image"
    fields = ("pixel_values",)

    def __init__(self, config: ImageAdapterConfig, qgfd: QGFDConfig) -> None:
        super().__init__(config, qgfd)
        self.backbone = encoder_of(config, "image")
        height, width = config.size
        if self.backbone is None:
            self.patch = (config.patch_size, config.patch_size)
            self.grid = (math.ceil(height / config.patch_size), math.ceil(width / config.patch_size))
            self.patch_embed = PatchEmbed(config.channels, config.hidden_size, config.patch_size)
            self.encoder = TokenStack(config.hidden_size, self.latent_dim, self.block_config, config.encoder_layers)
        else:
            self.grid = self._backbone_grid()
            self.patch = (math.ceil(height / self.grid[0]), math.ceil(width / self.grid[1]))
            self.latent_proj = nn.Linear(self.backbone.config.hidden_size, self.latent_dim)
        pixels = self.patch[0] * self.patch[1] * config.channels
        self.decoder = TokenStack(self.latent_dim, pixels, self.block_config, config.decoder_layers)

    def encode(self, batch: Batch) -> Latents:
        pixels = self._pixels(batch)
        return Latents(self._encode_images(pixels), None, grid_positions(*self.grid, device=pixels.device))

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"pixel_values" [B, C, H, W]}, clamped to [-1, 1]."""
        return {"pixel_values": self._decode_images(tokens).clamp(-1, 1)}

    def reconstruction_loss(self, batch: Batch, latents: Latents) -> Tensor:  # [B]
        """Mean squared error of the pixels."""
        error = self._decode_images(latents.tokens).float() - batch["pixel_values"]
        return error.square().flatten(1).mean(1)

    def latent_length(self, batch: Batch) -> int:
        return self.grid[0] * self.grid[1]

    def sample_shape(
        self, count: int, length: int | Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> LatentShape:
        no_lengths(self.modality, length)
        return LatentShape(self.grid[0] * self.grid[1], None, grid_positions(*self.grid, device=device))

    def _pixels(self, batch: Batch) -> Tensor:
        pixels, expected = batch["pixel_values"], [self.config.channels, *self.config.size]
        if pixels.ndim != 4 or list(pixels.shape[1:]) != expected:
            raise ValueError(f"pixel_values: got shape {list(pixels.shape)}; expected [B, {str(expected)[1:]}")
        return pixels

    def _encode_images(self, pixels: Tensor) -> Tensor:  # [B, C, H, W] -> [B, L, latent_dim]
        if self.backbone is not None:
            return unit_scale(self.latent_proj(self._backbone_states(pixels)))
        (height, width), (rows, columns), (p, q) = self.config.size, self.grid, self.patch
        padded = F.pad(pixels, (0, columns * q - width, 0, rows * p - height))
        positions = grid_positions(*self.grid, device=pixels.device)
        return unit_scale(self.encoder(self.patch_embed(padded), None, positions))

    def _decode_images(self, tokens: Tensor) -> Tensor:  # [B, L, latent_dim] -> [B, C, H, W]
        (rows, columns), (p, q), channels = self.grid, self.patch, self.config.channels
        patches = self.decoder(tokens, None, grid_positions(*self.grid, device=tokens.device))
        images = patches.view(len(tokens), rows, columns, channels, p, q).permute(0, 3, 1, 4, 2, 5)
        height, width = self.config.size
        return images.reshape(len(tokens), channels, rows * p, columns * q)[:, :, :height, :width]

    def _backbone_grid(self) -> tuple[int, int]:
        config, channels = self.backbone.config, self.config.channels
        if channels not in (1, config.num_channels):
            raise ValueError(
                f"ImageAdapterConfig.channels: got {channels}; the backbone takes {config.num_channels}, or 1 (grey)"
            )
        size, patch = _pair(config.image_size), _pair(config.patch_size)
        return size[0] // patch[0], size[1] // patch[1]

    def _backbone_states(self, pixels: Tensor) -> Tensor:  # [B, C, H, W] -> [B, rows * columns, hidden_size]
        config, size = self.backbone.config, _pair(self.backbone.config.image_size)
        pixels = pixels.expand(-1, config.num_channels, -1, -1)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (
            torch.tensor(values, device=pixels.device, dtype=pixels.dtype).view(1, -1, 1, 1)
            for values in (self.config.image_mean, self.config.image_std)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_backbone):
            states = self.backbone(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state
        return states[:, -self.grid[0] * self.grid[1] :]  # class and register tokens come first


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
