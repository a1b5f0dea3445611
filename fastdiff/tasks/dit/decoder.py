"""The decoder of a pipeline of latents: diffusers' AutoencoderKL, which makes images of what a DiT draws."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.errors import reason_of
from fastdiff.files import read_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FOLDER = "vae"  # of a pipeline, where the decoder lies
_CLASS = "AutoencoderKL"
_NOT_APPLIED = ("shift_factor", "latents_mean", "latents_std")  # DiTPipeline scales latents, and nothing else


def load_decoder(folder: Path, channels: int, device: torch.device) -> "AutoencoderKL | None":
    """The autoencoder in the folder vae/ of a model's folder, in float32 and eval mode; None where there is none.

    Args:
        folder: the pipeline, or a folder that fastdiff saved.
        channels: those of the latents, which it must take.

    Raises ValueError for another kind of autoencoder, other channels, and weights that are missing, damaged or not
    those of its configuration; the message names the file.
    """
    file = folder / FOLDER / "config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    if config.get("_class_name") != _CLASS:
        raise ValueError(f"{file}: _class_name: got {config.get('_class_name')!r}; expected {_CLASS!r}")
    if (theirs := config.get("latent_channels", 4)) != channels:
        raise ValueError(f"{file}: latent_channels: got {theirs}; expected {channels}, as the DiT beside it has")
    for key in _NOT_APPLIED:
        if config.get(key) is not None:
            raise ValueError(
                f"{file}: {key}: got {config[key]!r}; expected null: DiTPipeline applies scaling_factor alone"
            )
    from diffusers import AutoencoderKL

    try:
        vae, told = AutoencoderKL.from_pretrained(str(file.parent), local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{file.parent}: not an {_CLASS} that can be loaded: {reason_of(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told.get(kind):
            raise ValueError(
                f"{file.parent}: the weights are not those of its configuration: {kind.partition('_')[0]}: "
                f"{', '.join(map(str, told[kind][:3]))}"
            )
    return vae.to(device).eval()


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor, batch_size: int = 8) -> Tensor:
    """Images of latents [N, C, H, W], as diffusers' DiTPipeline makes them: float32 [N, 3, 8·H, 8·W] on the CPU, around
    -1 … 1. `batch_size` of them are in memory at a time."""
    device = next(vae.parameters()).device
    parts = (latents / vae.config.scaling_factor).split(batch_size)
    return torch.cat([vae.decode(part.to(device)).sample.float().cpu() for part in parts])
