"""The latents that a recipe asks for: an autoencoder of any origin, checked, and a data set encoded by it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastdiff.data.images import ImageData
from fastdiff.data.latents import Encode, Shape, cached_latents
from fastdiff.errors import named, section
from fastdiff.tasks.kinds import kind_named, kind_of, load

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Data = TypeVar("Data", bound=ImageData)
_HASH = 16  # hexadecimal digits of a VAE's hash that a recipe names
_SPREAD = (0.5, 2.0)  # between which the deviation of latents must lie
_LOOKED_AT = 256  # images whose latents' deviation is taken


@dataclass
class LatentsConfig:
    """The autoencoder in whose latents a model draws.

    Attributes:
        vae: a run of `task: autoencoder`, a folder of diffusers' AutoencoderKL, or a hub id such as
            stabilityai/sd-vae-ft-mse. The images are encoded once, into the cache.
        vae_hash: the beginning of the VAE's hash, where no other will do; null takes any that fits the images.
    """

    vae: str = ""
    vae_hash: str | None = None

    def __post_init__(self):
        if not self.vae:
            raise ValueError(f"{named('vae')}: got ''; expected a run of task autoencoder, a folder, or a hub id")
        if self.vae_hash is not None and len(self.vae_hash) < 8:
            raise ValueError(f"{named('vae_hash')}: got {self.vae_hash!r}; expected 8 digits of the hash or more")


def load_latents(
    config: LatentsConfig,
    data: Data,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    check: Callable[[Shape], None] | None = None,
) -> "tuple[AutoencoderKL, Data]":
    """The autoencoder of a recipe, and the latents of a data set's images: encoded now, or from the cache.

    Args:
        config: the recipe's section `latents`.
        data: the images.
        device: where they are encoded; None takes a GPU where there is one.
        progress: shows a bar while they are.
        check: gets the shape of the latents (c, h, w) before any is made, and raises where they are of no use.

    Returns:
        The model in float32 and eval mode, as `fastdiff.models.autoencoder.decode` takes it, and the data with latents
        in the place of the images (see `fastdiff.data.latents.cached_latents`).

    Raises:
        FileNotFoundError: no such autoencoder, or a hub that cannot be reached.
        ValueError: what lies there is none; another one than vae_hash says; images of other channels or sizes than it
            takes; latents whose deviation is far from 1. One line, before the images are encoded.
        PermissionError, OSError: the cache cannot be written.
    """
    with section("latents"):
        name = f"{named('vae')}: got {config.vae!r}"
        if (kind := kind_of(config.vae)) != "autoencoder":
            raise ValueError(f"{name}, {kind_named(kind).about}; expected an autoencoder")
        run = load(config.vae, device=device)
        if config.vae_hash is not None and not run.fingerprint.startswith(config.vae_hash):
            raise ValueError(
                f"{named('vae_hash')}: got {config.vae_hash!r}; expected {run.fingerprint[:_HASH]!r}, the hash of "
                f"{config.vae}; name the VAE that was meant, or leave the hash out"
            )
        try:
            shape = run.latent_shape(data.image_shape)
        except ValueError as error:
            raise ValueError(f"{name}, which does not fit the images of {data.name}: {error}") from None
    if check is not None:
        check(shape)  # whose messages name other sections
    check_spread = functools.partial(_check_spread, f"{name}, whose latents of {data.name}", run.scaling_factor)
    encode = _after(lambda: check_spread(run.encode(_some(data))), run.encode)
    latents = cached_latents(data, shape, encode, run.fingerprint, progress=progress)
    check_spread(_some(latents))
    return run.model, latents


def _after(check: Callable[[], None], encode: Encode) -> Encode:
    """`encode`, with a check before its first call."""
    check_once = functools.cache(check)

    def checked(images: Tensor) -> Tensor:
        check_once()
        return encode(images)

    return checked


def _some(data: ImageData) -> Tensor:
    """Images to train on, or their latents, spread evenly over the set."""
    count = min(_LOOKED_AT, len(data.train))
    return data.train.images(torch.arange(count) * len(data.train) // count)


def _check_spread(what: str, scaling_factor: float, latents: Tensor) -> None:
    """Raises ValueError where noise of deviation 1 would be far too much, or too little, for the latents."""
    deviation = float(latents.std())
    if not _SPREAD[0] <= deviation <= _SPREAD[1]:
        raise ValueError(
            f"{what} have deviation {deviation:.3g}; expected about 1: its "
            f"scaling_factor, {scaling_factor:.4g}, is not of these images; set it to "
            f"{scaling_factor / max(deviation, 1e-9):.4g} in its config.json"
        )
