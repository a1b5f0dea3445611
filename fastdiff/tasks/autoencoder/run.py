"""Runs of autoencoders, loaded to encode and decode images."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastdiff.device import check_device
from fastdiff.files import read_json
from fastdiff.models.autoencoder import (
    AutoencoderConfig,
    AutoencoderTraining,
    check_scale,
    decode,
    encode,
    fingerprint_of,
    latent_shape,
    load_autoencoder,
)
from fastdiff.models.pretrained import CONFIG_NAME, check_overrides, naming_config
from fastdiff.models.weights import check_counts, header_of
from fastdiff.recipes import load_recipe
from fastdiff.tasks.autoencoder.recipe import AutoencoderRecipe
from fastdiff.tasks.run import Found, Run, check_count, find
from fastdiff.training.checkpoint import load_weights
from fastdiff.training.randomness import normal_noise

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_HUB_FILES = (CONFIG_NAME, "diffusion_pytorch_model*", "README.md", "samples.png")
SCALES = "scaling_factors"  # in a checkpoint's config.json: of both of its weights


@dataclass(frozen=True)
class AutoencoderRun(Run):
    """An autoencoder. `model` is diffusers' AutoencoderKL, in float32."""

    kind: ClassVar[str] = "autoencoder"

    model: "AutoencoderKL"

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied with."""
        return self.model.config.scaling_factor

    @cached_property
    def fingerprint(self) -> str:
        """A hash of weights, shape and scaling_factor: what latents depend on."""
        return fingerprint_of(self.model)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(c, h, w) of the latents of images (C, H, W). Raises ValueError for images that it does not take."""
        return latent_shape(self.model, image_shape)

    def encode(self, images: Tensor, *, seed: int | None = None, batch_size: int | None = None) -> Tensor:
        """Latents of images, times `scaling_factor`.

        Args:
            images: float [N, C, H, W] in -1 … 1.
            seed: latents are drawn from the posterior, image i by seed + i. None gives the posterior's mean.
            batch_size: images at a time; None takes as many as have 2^18 pixels together.

        Returns:
            float32 [N, c, h, w] on the CPU.

        Raises:
            TypeError, ValueError: not images that it takes, or no images; one line.
        """
        _check_tensor("images", images, "[N, C, H, W]")
        shape = self.latent_shape(tuple(images.shape[1:]))
        check_count("batch_size", batch_size)
        noise = None if seed is None else normal_noise(range(seed, seed + len(images)), shape)
        return encode(self.model, images, noise=noise, batch_size=batch_size)

    def decode(self, latents: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Images of latents, as `encode` scales them.

        Args:
            latents: float [N, c, h, w].
            batch_size: images at a time; None takes as many as have 2^18 pixels together.

        Returns:
            float32 [N, C, H, W] on the CPU, around -1 … 1.

        Raises:
            TypeError, ValueError: not latents of this autoencoder, or none; one line.
        """
        _check_tensor("latents", latents, "[N, c, h, w]")
        check_count("batch_size", batch_size)
        if latents.shape[1] != self.model.config.latent_channels:
            raise ValueError(
                f"latents: got {latents.shape[1]} channels; expected {self.model.config.latent_channels}, as the "
                "autoencoder's latents have"
            )
        return decode(self.model, latents, batch_size)

    def usage(self) -> str:
        channels, size = self.model.config.in_channels, self.model.config.sample_size
        return (
            "import torch\n"
            f"latents = run.encode(torch.zeros(1, {channels}, {size}, {size}))  # images in -1 … 1\n"
            "images = run.decode(latents)"
        )

    def _save(self, directory: Path) -> None:
        self.model.save_pretrained(directory)


def _check_tensor(name: str, value: Any, shape: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {kind}; expected a float tensor {shape}")
    if value.ndim != 4 or not len(value):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; expected {shape} with N >= 1")


def load_run(
    path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None, **fields: Any
) -> AutoencoderRun:
    """Loads an autoencoder; arguments and errors are those of `fastdiff.load`.

    Of a run, the newest checkpoint or the one named. Of anything else, a folder or hub id that diffusers'
    `AutoencoderKL.from_pretrained` reads, such as stabilityai/sd-vae-ft-mse.
    """
    device = check_device(device)
    check_overrides(fields, ())
    found = find(path, "autoencoder", weights, _HUB_FILES)
    recipe = None if found.folder is None else load_recipe(AutoencoderRecipe, found.folder.config)
    model = load_autoencoder(found.source, device) if found.state is None else _of_checkpoint(found).to(device)
    return AutoencoderRun(model=model, **found.origin, recipe=recipe)


def _of_checkpoint(found: Found) -> "AutoencoderKL":
    """The model of a checkpoint of fastdiff.train, with the scaling_factor of the weights that are wanted."""
    file, weights = found.source / CONFIG_NAME, found.source / found.weights_file
    content = read_json(file)
    check_counts(content, header_of([weights]), file)
    with naming_config(found.source, "an autoencoder of fastdiff.train"):
        config = AutoencoderConfig(**{name: content[name] for name in AutoencoderConfig.__dataclass_fields__})
        scale = content[SCALES][found.weights]
    check_scale(scale, str(file))
    with torch.random.fork_rng(devices=[]):  # its first weights are replaced
        model = AutoencoderTraining(config)
    load_weights(model, weights)
    model.vae.register_to_config(scaling_factor=scale)
    return model.vae.eval()
