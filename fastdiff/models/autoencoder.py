"""Autoencoders of images: diffusers' AutoencoderKL, made, loaded, and used to encode and decode."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.errors import named, reason_of
from fastdiff.files import read_json
from fastdiff.models.weights import check_counts, check_dtypes, header_of, variant_of, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FOLDER = "vae"  # of a pipeline, where the decoder lies
CLASS = "AutoencoderKL"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_NOT_APPLIED = ("shift_factor", "latents_mean", "latents_std")  # DiTPipeline scales latents, and nothing else
_PIXELS = 2**18  # of images that are encoded or decoded at once


@dataclass
class AutoencoderConfig:
    """The shape of an AutoencoderKL, in diffusers' words.

    Attributes:
        in_channels: channels of the images: 1 grey, 3 colour.
        sample_size: edge of the images in pixels.
        latent_channels: channels of the latents.
        block_out_channels: width of each level. A level but the last halves the image: four levels make latents of
            8 x 8 from 64 x 64 pixels. stabilityai/sd-vae-ft-mse has [128, 256, 512, 512].
        layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
        norm_num_groups: groups of each GroupNorm; it divides all widths.
        mid_block_add_attention: whether the innermost level has self-attention.
    """

    in_channels: int = 3
    sample_size: int = 64
    latent_channels: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 64, 64])
    layers_per_block: int = 1
    norm_num_groups: int = 8
    mid_block_add_attention: bool = True

    def __post_init__(self):
        for name in ("in_channels", "sample_size", "latent_channels", "layers_per_block", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected at least 1")
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or not all(width > 0 and width % groups == 0 for width in widths):
            raise ValueError(
                f"{named('block_out_channels')}: got {widths}; expected multiples of norm_num_groups, {groups}"
            )
        if self.sample_size % self.reduction:
            raise ValueError(
                f"{named('sample_size')}: got {self.sample_size}; expected a multiple of {self.reduction}, as "
                f"block_out_channels has {len(widths)} levels"
            )

    @property
    def reduction(self) -> int:
        """The edge of an image over that of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image."""
        return (self.latent_channels, *(self.sample_size // self.reduction,) * 2)


def make_autoencoder(config: AutoencoderConfig) -> "AutoencoderKL":
    """A model of diffusers with random weights, and a scaling_factor of 1."""
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    return AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.sample_size,
        scaling_factor=1.0,
        mid_block_add_attention=config.mid_block_add_attention,
    )


class AutoencoderTraining(nn.Module):
    """An AutoencoderKL, in `vae`, with the forward pass that training takes: one that accelerate's autocast wraps.

    Args:
        config: the shape; the weights are random.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.vae = make_autoencoder(config)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes, draws from the posterior and decodes.

        Args:
            images: [B, C, H, W] in -1 … 1.
            noise: [B, c, h, w], standard normal: what the posterior's draw is made of.

        Returns:
            Reconstructions [B, C, H, W], the posterior's mean and the logarithm of its variance [B, c, h, w].
        """
        mean, logvar = _posterior(self.vae, images)
        latents = mean + torch.exp(0.5 * logvar) * noise
        return self.vae.decode(latents).sample, mean, logvar


def load_decoder(folder: Path, channels: int, device: torch.device) -> "AutoencoderKL | None":
    """The autoencoder in the folder vae/ of a pipeline, or of what fastdiff saved; None where there is none.

    `channels` are those of the latents, which it must take. Raises as `load_autoencoder` does, and ValueError for other
    channels.
    """
    file = folder / FOLDER / "config.json"
    if not file.is_file():
        return None
    if (theirs := _checked_config(file).get("latent_channels", 4)) != channels:
        raise ValueError(f"{file}: latent_channels: got {theirs}; expected {channels}, as the DiT beside it has")
    return load_autoencoder(file.parent, device)


def load_autoencoder(folder: Path, device: torch.device) -> "AutoencoderKL":
    """The AutoencoderKL that diffusers wrote into a folder, in float32 and eval mode.

    Raises ValueError for another kind of autoencoder, one whose latents are shifted, and weights that are missing,
    damaged or not those of its configuration; the message names the file.
    """
    file = folder / "config.json"
    config = _checked_config(file)
    from diffusers import AutoencoderKL

    try:
        state = header_of(weight_files(folder, _WEIGHTS))
        check_counts(config, state, file)
        check_dtypes(state, folder)
        options = dict(variant=variant_of(folder, _WEIGHTS), local_files_only=True, output_loading_info=True)
        vae, told = AutoencoderKL.from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: not an {CLASS} that can be loaded: {reason_of(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(kind):
            raise ValueError(
                f"{folder}: the weights are not those of its configuration: {kind.partition('_')[0]}: "
                f"{', '.join(map(str, told[kind][:3]))}"
            )
    return vae.float().to(device).eval()


def _checked_config(file: Path) -> dict[str, Any]:
    """The configuration of an AutoencoderKL whose latents are scaled, and nothing else. Raises ValueError."""
    config = read_json(file)
    if config.get("_class_name") != CLASS:
        raise ValueError(f"{file}: _class_name: got {config.get('_class_name')!r}; expected {CLASS!r}")
    for key in _NOT_APPLIED:
        if config.get(key) is not None:
            raise ValueError(
                f"{file}: {key}: got {config[key]!r}; expected null: DiTPipeline applies scaling_factor alone"
            )
    check_scale(config.get("scaling_factor", 1.0), str(file))
    return config


def check_scale(value: Any, where: str) -> None:
    """Raises ValueError for a scaling_factor that cannot be one; `where` begins the message."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ValueError(f"{where}: scaling_factor: got {value!r}; expected a number above 0")


def latent_shape(vae: "AutoencoderKL", image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(c, h, w) of the latents of images (C, H, W).

    Raises ValueError where the autoencoder does not take such images; the message begins with what does not fit.
    """
    channels, *size = image_shape
    config = vae.config
    if channels != config.in_channels:
        raise ValueError(f"channels: got images of {channels}; expected {config.in_channels}, as the VAE takes")
    reduction = 2 ** (len(config.block_out_channels) - 1)
    if any(edge % reduction or edge < reduction for edge in size):
        raise ValueError(
            f"image size: got {' x '.join(map(str, size))}; expected multiples of {reduction}, by which the VAE reduces"
        )
    return (config.latent_channels, *(edge // reduction for edge in size))


def fingerprint_of(vae: "AutoencoderKL") -> str:
    """A hash of weights, shape and scaling_factor: what the latents of an image depend on. Hexadecimal."""
    config = {name: value for name, value in vae.config.items() if name[:1] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ encode and decode


@torch.no_grad()
def encode(
    vae: "AutoencoderKL", images: Tensor, *, noise: Tensor | None = None, batch_size: int | None = None
) -> Tensor:
    """Latents of images, times scaling_factor.

    Args:
        images: [N, C, H, W] in -1 … 1.
        noise: [N, c, h, w], standard normal: the latents are draws from the posterior, made of it. None: its mean.
        batch_size: images at a time; None takes as many as have 2^18 pixels together.

    Returns:
        float32 [N, c, h, w] on the CPU.
    """
    device, parts = next(vae.parameters()).device, []
    for part in _parts(images, batch_size):
        mean, logvar = _posterior(vae, images[part].float().to(device))
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise[part].to(device)
        parts.append((mean * vae.config.scaling_factor).float().cpu().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor, batch_size: int | None = 8) -> Tensor:
    """Images of latents [N, c, h, w], as diffusers' DiTPipeline makes them: float32 [N, C, H, W] on the CPU, around
    -1 … 1. `batch_size` of them are in memory at a time; None takes as many as have 2^18 pixels together."""
    device = next(vae.parameters()).device
    reduction = 2 ** (len(vae.config.block_out_channels) - 1)
    scaled = latents / vae.config.scaling_factor
    parts = (scaled[part].to(device) for part in _parts(latents, batch_size, reduction))
    return torch.cat([vae.decode(part).sample.float().cpu().contiguous() for part in parts])


def _parts(images: Tensor, batch_size: int | None, reduction: int = 1) -> Iterator[slice]:
    pixels = images.shape[-2] * images.shape[-1] * reduction**2
    size = batch_size or max(1, _PIXELS // pixels)
    for start in range(0, len(images), size):
        yield slice(start, start + size)


def _posterior(vae: "AutoencoderKL", images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents, unscaled."""
    distribution = vae.encode(images).latent_dist
    return distribution.mean, distribution.logvar


def deviation_of(vae: "AutoencoderKL", images: Callable[[Tensor], Tensor], indices: Tensor) -> float:
    """The deviation of the unscaled latents of some images: 1 over it is the scaling_factor that makes it 1.

    Args:
        images: gives the images at some indices: [n, C, H, W] in -1 … 1.
        indices: int64 [N].
    """
    latents = torch.cat([encode(vae, images(part)) for part in indices.split(64)])
    return float((latents.double() / vae.config.scaling_factor).std())
