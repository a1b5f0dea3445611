"""Training of an autoencoder: its task. The recipe is in recipe.py."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.data import EpochStream, ImageData, load_data
from fastdiff.data.images import flip_some
from fastdiff.errors import section
from fastdiff.models.autoencoder import AutoencoderTraining, deviation_of
from fastdiff.models.pretrained import CONFIG_NAME, WEIGHTS_NAME
from fastdiff.recipes import plain
from fastdiff.tasks.autoencoder.pictures import reconstruction_sheet
from fastdiff.tasks.autoencoder.recipe import AutoencoderRecipe, check_fit
from fastdiff.tasks.autoencoder.run import SCALES
from fastdiff.training.randomness import derive_seed, generator, normal_noise
from fastdiff.training.task import Batch

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _NOISE, _FLIPS = 2, 3, 4
SCALE_IMAGES = 1024  # training images whose latents' deviation becomes 1
_VALIDATED = 512  # held-out images


class AutoencoderTask:
    """Reconstruction of images from latents, as the trainer sees it.

    Args:
        recipe: the run's recipe.
        data: the images, where they are loaded already.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: the data is missing, or does not fit the model; one line.
    """

    unit = "images"
    partial_gradients = False

    def __init__(self, recipe: AutoencoderRecipe, data: ImageData | None = None):
        self.config = recipe
        with section("data"):
            self.data = load_data(recipe.data) if data is None else data
        check_fit(recipe, self.data)
        training = recipe.training
        self.stream = EpochStream(len(self.data.train), training.batch_size, derive_seed(training.seed, _ORDER))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = AutoencoderTraining(recipe.model)

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step: images [n, C, H, W] and noise [n, c, h, w]."""
        seed, mine = self.config.training.seed, slice(slots.start, slots.stop)
        images = self.data.train.images(self.stream.indices(step)[mine])
        if self.config.data.horizontal_flip:
            draws = torch.rand(self.config.training.batch_size, generator=generator(seed, step, _FLIPS))
            images = flip_some(images, draws[mine])
        return {"images": images, "noise": normal_noise(slots, self.config.model.latent_shape, seed, step, _NOISE)}

    def weight(self, batch: Batch) -> float:
        """The number of images."""
        return float(len(batch["images"]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the images' losses."""
        error, divergence = self._parts(*model(batch["images"], batch["noise"]), batch["images"])
        return (error + self.config.objective.kl_weight * divergence).sum()

    def _parts(self, made: Tensor, mean: Tensor, logvar: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image, the error of its reconstruction and the divergence of its posterior: float32 [n] each."""
        error = made.float() - images
        error = error.square() if self.config.objective.reconstruction == "mse" else error.abs()
        mean, logvar = mean.float(), logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        return error.mean(dim=(1, 2, 3)), divergence.mean(dim=(1, 2, 3))

    def sample_ids(self, step: int) -> list[int]:
        """Indices in the training part of the data."""
        return self.stream.indices(step).tolist()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Weights, and diffusers' config.json with the scaling_factor that makes their latents' deviation 1."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()},
            folder / WEIGHTS_NAME,
            metadata={"format": "pt"},
        )
        self._write_config(model, folder, {"model": self._scale(model)})

    def save_averaged(self, model: nn.Module, folder: Path) -> None:
        """The averaged weights' scaling_factor, which is the one that `fastdiff.load` takes where nobody says else."""
        scales = json.loads((folder / CONFIG_NAME).read_text())[SCALES]
        self._write_config(model, folder, {**scales, "ema": self._scale(model)})

    def _scale(self, model: nn.Module) -> float:
        """1 over the deviation of the latents of training images that are spread evenly over the set."""
        train = self.data.train
        count = min(SCALE_IMAGES, len(train))
        deviation = deviation_of(model.vae, train.images, torch.arange(count) * len(train) // count)
        return 1 / max(deviation, 1e-6)

    def _write_config(self, model: nn.Module, folder: Path, scales: dict[str, float]) -> None:
        config = json.loads(model.vae.to_json_string())
        config = {name: value for name, value in config.items() if name != "_name_or_path"}
        config |= {"scaling_factor": scales.get("ema", scales["model"]), SCALES: scales}
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss, PSNR in dB and divergence in nats per number of the latents, of held-out images, in float32."""
        held_out, count = self.data.held_out, min(_VALIDATED, len(self.data.held_out))
        shape, device = self.config.model.latent_shape, next(model.parameters()).device
        errors, squares, divergences = [], [], []
        for slots in torch.arange(count).split(64):
            images = held_out.images(slots * len(held_out) // count).to(device)
            noise = normal_noise(range(int(slots[0]), int(slots[-1]) + 1), shape, self.config.training.seed, _NOISE)
            made, mean, logvar = model(images, noise.to(device))
            error, divergence = self._parts(made, mean, logvar, images)
            errors.append(error.cpu())
            divergences.append(divergence.cpu())
            plain_images = model.vae.decode(mean).sample.clamp(-1, 1)
            squares.append((plain_images - images).square().mean(dim=(1, 2, 3)).cpu())
        error, square, divergence = (torch.cat(each).mean().item() for each in (errors, squares, divergences))
        loss = error + self.config.objective.kl_weight * divergence
        psnr = 10 * torch.log10(torch.tensor(4 / max(square, 1e-12))).item()
        return {"loss": loss, "psnr": psnr, "divergence": divergence}

    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images, their reconstructions and the error."""
        images = self.data.held_out.images(torch.arange(min(20, len(self.data.held_out))))
        reconstruction_sheet(model.vae, images, path)

    def data_sets(self) -> dict[str, ImageData]:
        """The images."""
        return {"data": self.data}

    def facts(self) -> dict[str, Any]:
        """The classes' names, by label."""
        return {"class_names": list(self.data.class_names)}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(self.config.to_dict())
