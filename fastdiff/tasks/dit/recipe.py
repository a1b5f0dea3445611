"""The recipe of a class-conditional DiT."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastdiff.data import DataConfig, ImageData
from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.guidance import check_guidance
from fastdiff.diffusion.sampler_config import SamplerConfig, check_sampler
from fastdiff.errors import named, naming_section, section
from fastdiff.models.dit_config import DiTConfig, recipe_values
from fastdiff.training.config import TrainingConfig


@dataclass
class SamplingConfig(SamplerConfig):
    """How a run draws its samples, where a command does not say otherwise, beside the fields of `SamplerConfig`.

    Attributes:
        guidance_channels: guides this many of the first channels only, as facebookresearch/DiT does with 3; null guides
            all.
        images_per_class: images of each class in samples.png.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("images_per_class",)

    guidance_channels: int | None = None
    images_per_class: int = 8

    def __post_init__(self):
        super().__post_init__()
        with naming_section():
            check_guidance(self.guidance_scale, self.guidance_interval, self.guidance_channels)
        if self.images_per_class < 1:
            raise ValueError(f"{named('images_per_class')}: got {self.images_per_class}; expected at least 1")


@dataclass
class DiTRecipe:
    """Everything a run of fastdiff.train that trains a DiT is made from.

    Attributes:
        task: names the kind of recipe; may be left out.
        model: the DiT.
        diffusion: what it predicts, at which noise levels.
        data: the images.
        training: the course of training.
        sampling: the pictures of samples.
    """

    task: Literal["dit"] = "dit"
    model: DiTConfig = field(default_factory=DiTConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without `task` and what `recipe_values` leaves out: resuming compares with older recipes."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "task"}
        return values | {"model": recipe_values(self.model)}


def check_fit(recipe: DiTRecipe, data: ImageData) -> None:
    """Raises ValueError where the parts of a recipe do not fit each other or the data."""
    channels, *size = data.image_shape
    expected = {"in_channels": channels, "image_size": tuple(size), "num_classes": len(data.class_names)}
    for name, value in expected.items():
        if getattr(recipe.model, name) != value:
            key = "input_size" if name == "image_size" else name
            raise ValueError(
                f"model.{key}: got {getattr(recipe.model, key)}; the data set {data.name} has {value}; "
                f"set --model.{key} to that"
            )
    with section("sampling"):
        check_sampler(recipe.sampling, recipe.diffusion)
    if not recipe.model.null_label and recipe.sampling.guidance_scale != 1:
        raise ValueError(
            f"sampling.guidance_scale: got {recipe.sampling.guidance_scale}; with model.null_label false there is no "
            "guidance: set it to 1"
        )
    if recipe.model.learn_sigma and not recipe.diffusion.is_discrete:
        raise ValueError(
            "model.learn_sigma: got true; diffusion.noise_levels "
            f"{recipe.diffusion.noise_levels!r} has no variance to learn; set it to false"
        )
