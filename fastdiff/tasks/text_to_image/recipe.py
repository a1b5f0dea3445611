"""The recipe of a text-to-image model."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastdiff.data import DataConfig
from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.sampler_config import SamplerConfig, check_sampler
from fastdiff.errors import named, section
from fastdiff.models.dit_config import DiTConfig, recipe_values
from fastdiff.models.text_encoder import TextEncoderConfig
from fastdiff.nn.q_former import QFormerConfig
from fastdiff.tasks.latents import LatentsConfig
from fastdiff.tasks.texts import check_weights
from fastdiff.training.config import TrainingConfig


@dataclass
class TextObjectiveConfig:
    """What the loss is beside the diffusion's, and which texts stand for an image.

    Attributes:
        text_dropout_prob: probability with which training hides a text, for classifier-free guidance.
        entry_weights: how often an image's texts are chosen, by their entry: {base: 1, caption: 3}. An entry that is
            not named has weight 1; empty chooses among all alike.
        attention_entropy_weight: by how much a nat of entropy of the cross-attention over the text lowers the loss,
            against attention that sinks into one token; 0 leaves it out.
    """

    text_dropout_prob: float = 0.1
    entry_weights: dict[str, float] = field(default_factory=dict)
    attention_entropy_weight: float = 0.0

    def __post_init__(self):
        if not 0 <= self.text_dropout_prob <= 1:
            raise ValueError(f"{named('text_dropout_prob')}: got {self.text_dropout_prob}; expected 0 to 1")
        if not 0 <= self.attention_entropy_weight < math.inf:
            raise ValueError(
                f"{named('attention_entropy_weight')}: got {self.attention_entropy_weight}; expected 0 or more"
            )
        check_weights(self.entry_weights)


@dataclass
class TextToImageSamplingConfig(SamplerConfig):
    """How a run draws its samples, where a command does not say otherwise, beside the fields of `SamplerConfig`.

    Attributes:
        prompts: texts of samples.png; empty takes held-out ones.
        images_per_prompt: images of each prompt in samples.png.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("prompts", "images_per_prompt")

    prompts: list[str] = field(default_factory=list)
    images_per_prompt: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.images_per_prompt < 1:
            raise ValueError(f"{named('images_per_prompt')}: got {self.images_per_prompt}; expected at least 1")
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"{named('prompts')}: got {prompt!r}; expected texts")


@dataclass
class TextToImageRecipe:
    """Everything a run of fastdiff.train on images and their texts is made from.

    Attributes:
        task: names the kind of recipe.
        train: "q_former" trains the Q-Former alone, with the diffusion transformer of dit_from as it is; "all" trains
            both.
        dit_from: a run of `task: dit`, one of its checkpoints, or another model that `DiT.from_pretrained` reads: the
            diffusion transformer to begin with, whose shape counts then. null: random weights in the shape of `model`.
        model: the diffusion transformer. Its `conditioning` says how it gets the text: "adaln" through a Q-Former, as
            in LLM2DiT; "cross_attention" to the text's tokens, as in latent Fashion-MNIST diffusion.
        q_former: what reads the text for a model with conditioning "adaln".
        text_encoder: the language model that reads the texts, once.
        objective: the loss beside the diffusion's, and the choice of texts.
        diffusion: what the model predicts, at which noise levels.
        data: the images and their texts; of data sets without texts the names of the classes.
        latents: the autoencoder of a model of latents; null: the model draws pixels.
        training: the course of training.
        sampling: the pictures of samples.
    """

    task: Literal["text_to_image"] = "text_to_image"
    train: Literal["q_former", "all"] = "all"
    dit_from: str | None = None
    model: DiTConfig = field(default_factory=DiTConfig)
    q_former: QFormerConfig = field(default_factory=QFormerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    objective: TextObjectiveConfig = field(default_factory=TextObjectiveConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    latents: LatentsConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: TextToImageSamplingConfig = field(default_factory=TextToImageSamplingConfig)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without a Q-Former or latents where there are none."""
        values = dataclasses.asdict(self)
        if self.model.conditioning != "adaln":
            del values["q_former"]
        if self.latents is None:
            del values["latents"]
        return values | {"model": recipe_values(self.model)}


def check_recipe(recipe: TextToImageRecipe) -> None:
    """Raises ValueError where the parts of a recipe do not fit each other; before any data or model is loaded."""
    if recipe.train == "q_former" and recipe.dit_from is None:
        raise ValueError(
            "train: got 'q_former' without dit_from; expected a run of a trained DiT there, which stays as it is: set "
            "dit_from, or train to 'all'"
        )
    if recipe.train == "q_former" and recipe.model.conditioning != "adaln":
        raise ValueError(
            f"train: got 'q_former' with model.conditioning {recipe.model.conditioning!r}, which has no Q-Former; "
            "expected 'all'"
        )
    model, dropped = recipe.model, recipe.objective.text_dropout_prob
    if recipe.dit_from is None and model.conditioning == "adaln" and not model.null_label and dropped:
        raise ValueError(
            f"objective.text_dropout_prob: got {dropped} with model.null_label false, and no other label stands for no "
            "text; expected 0, or model.null_label true"
        )
    with section("sampling"):
        check_sampler(recipe.sampling, recipe.diffusion)
    if recipe.sampling.guidance_scale != 1 and not dropped and recipe.train != "q_former":
        raise ValueError(
            f"sampling.guidance_scale: got {recipe.sampling.guidance_scale}; with objective.text_dropout_prob 0 the "
            "model never learns to draw without a text: set it to 1, or the probability above 0"
        )


def check_fit(recipe: TextToImageRecipe, image_shape: tuple[int, ...], name: str) -> None:
    """Raises ValueError where the model does not fit what it is to draw.

    Args:
        image_shape: (C, H, W) of images, or of their latents.
        name: of the data set.
    """
    channels, *size = image_shape
    what = f"the latents of {name}" if recipe.latents is not None else f"the data set {name}"
    for field_name, value, key in (("in_channels", channels, None), ("image_size", tuple(size), "input_size")):
        if getattr(recipe.model, field_name) != value:
            key = key or field_name
            advice = "train another DiT" if recipe.dit_from else f"set --model.{key} to that"
            raise ValueError(f"model.{key}: got {getattr(recipe.model, key)}; {what} has {value}; {advice}")
    if recipe.model.learn_sigma and not recipe.diffusion.is_discrete:
        raise ValueError(
            "model.learn_sigma: got true; diffusion.noise_levels "
            f"{recipe.diffusion.noise_levels!r} has no variance to learn; set it to false"
        )
    for key in ("horizontal_flip", "random_shift", "random_scale") if recipe.latents is not None else ():
        if value := getattr(recipe.data, key):
            raise ValueError(f"data.{key}: got {value} with latents, which are made once; leave it out")
