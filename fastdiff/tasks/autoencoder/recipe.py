"""The recipe of an autoencoder."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastdiff.data import DataConfig, ImageData
from fastdiff.errors import named
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.training.config import TrainingConfig


@dataclass
class ObjectiveConfig:
    """The loss of an image: its reconstruction's error + kl_weight · KL.

    Attributes:
        reconstruction: the mean over an image's values of the squared ("mse") or absolute ("l1") error, in -1 … 1.
        kl_weight: weight of the divergence of the posterior from a standard normal distribution, in nats per number of
            the latents. More makes latents smoother and pictures worse.
    """

    reconstruction: Literal["mse", "l1"] = "mse"
    kl_weight: float = 1e-4

    def __post_init__(self):
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"{named('kl_weight')}: got {self.kl_weight}; expected 0 or more")


@dataclass
class AutoencoderRecipe:
    """Everything a run of fastdiff.train that trains an autoencoder is made from.

    Attributes:
        task: names the kind of recipe.
        model: the shape of the AutoencoderKL.
        objective: the loss.
        data: the images.
        training: the course of training.
    """

    task: Literal["autoencoder"] = "autoencoder"
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def check_fit(recipe: AutoencoderRecipe, data: ImageData) -> None:
    """Raises ValueError where the model and the data do not fit each other."""
    channels, height, width = data.image_shape
    if height != width:
        raise ValueError(f"data: got images of {height} x {width} in {data.name}; expected square ones")
    for name, value in {"in_channels": channels, "sample_size": height}.items():
        if getattr(recipe.model, name) != value:
            raise ValueError(
                f"model.{name}: got {getattr(recipe.model, name)}; the data set {data.name} has {value}; set "
                f"--model.{name} to that"
            )
