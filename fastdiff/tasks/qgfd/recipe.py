"""The recipe of a QGFD diffusion model of one modality, or of several that share a backbone."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fastdiff.data import (
    AudioDataConfig,
    DataConfig,
    TabularDataConfig,
    TextDataConfig,
    TokenizerConfig,
    VideoDataConfig,
)
from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.sampler_config import SamplerConfig, check_sampler
from fastdiff.errors import named, section
from fastdiff.models.qgfd.adapters import (
    MODALITIES,
    AudioAdapterConfig,
    ImageAdapterConfig,
    TabularAdapterConfig,
    TextAdapterConfig,
    VideoAdapterConfig,
)
from fastdiff.models.qgfd.backbone import QGFDConfig
from fastdiff.training.config import TrainingConfig


@dataclass
class QGFDObjectiveConfig:
    """What is trained, and how modalities take turns.

    Attributes:
        order: how several modalities alternate: "in_turn" (a step's batch is of one of them, and the next step's of the
            next) or "mixed" (each batch has samples of all).
        reconstruction_weight: weight of the adapters' reconstruction loss beside the diffusion's.
        adapters_from: a run, or one of its checkpoints, whose adapters (encoders and decoders) are taken as they are
            and not trained: the second stage of latent diffusion. Then reconstruction_weight is 0.
        condition_on_labels: whether images, sounds and videos are conditioned on their classes.
        validation_samples: held-out samples that a preview measures the loss on.
    """

    order: Literal["in_turn", "mixed"] = "in_turn"
    reconstruction_weight: float = 1.0
    adapters_from: str | None = None
    condition_on_labels: bool = True
    validation_samples: int = 256

    def __post_init__(self):
        if self.order not in ("in_turn", "mixed"):
            raise ValueError(f"{named('order')}: got {self.order!r}; expected 'in_turn' or 'mixed'")
        if not 0 <= self.reconstruction_weight < math.inf:
            raise ValueError(f"{named('reconstruction_weight')}: got {self.reconstruction_weight}; expected 0 or more")
        if self.validation_samples < 1:
            raise ValueError(f"{named('validation_samples')}: got {self.validation_samples}; expected at least 1")


@dataclass
class QGFDSamplingConfig(SamplerConfig):
    """How a run draws its samples, where a command does not say otherwise, beside the fields of `SamplerConfig`.

    Attributes:
        num_samples: samples in a preview, of each class where there are classes; null: 8 images of a class, one sound
            or video of a class, 6 texts, as many rows of a table as it is trained on.
        evaluation_samples: samples for the measures at the run's end (`fastdiff.evaluate`); 0 for none.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("num_samples", "evaluation_samples")

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    num_samples: int | None = None
    evaluation_samples: int = 500

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"{named('num_samples')}: got {self.num_samples}; expected at least 1")
        if self.evaluation_samples < 0 or self.evaluation_samples == 1:
            raise ValueError(f"{named('evaluation_samples')}: got {self.evaluation_samples}; expected 0, or at least 2")


@dataclass
class QGFDRecipe:
    """Everything a run of fastdiff.train on QGFD diffusion is made from; it has the modalities that are not null.

    Sizes that the data decides (of images, windows, tables, vocabularies, classes) are left out of the adapters.

    Attributes:
        task: names the kind of recipe.
        backbone: the denoiser, shared where there are several modalities.
        diffusion: what it predicts, at which noise levels.
        objective: what is trained.
        text: adapter of text; null for no text. The same holds of the other modalities.
        tokenizer: the tokenizer of text, where its adapter has no Hugging Face backbone, which brings its own.
        text_data: its texts.
        image: adapter of images.
        image_data: its images.
        audio: adapter of sound.
        audio_data: its sounds.
        video: adapter of videos.
        video_data: its videos.
        tabular: adapter of tables.
        tabular_data: its table.
        training: the course of training.
        sampling: samples, at previews and at the end.
    """

    task: Literal["qgfd"] = "qgfd"
    backbone: QGFDConfig = field(default_factory=QGFDConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: QGFDObjectiveConfig = field(default_factory=QGFDObjectiveConfig)
    text: TextAdapterConfig | None = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text_data: TextDataConfig = field(default_factory=TextDataConfig)
    image: ImageAdapterConfig | None = None
    image_data: DataConfig = field(default_factory=DataConfig)
    audio: AudioAdapterConfig | None = None
    audio_data: AudioDataConfig = field(default_factory=AudioDataConfig)
    video: VideoAdapterConfig | None = None
    video_data: VideoDataConfig = field(default_factory=VideoDataConfig)
    tabular: TabularAdapterConfig | None = None
    tabular_data: TabularDataConfig = field(default_factory=TabularDataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: QGFDSamplingConfig = field(default_factory=QGFDSamplingConfig)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that have an adapter."""
        return tuple(name for name in MODALITIES if getattr(self, name) is not None)

    @property
    def evaluated_after_training(self) -> bool:
        """Whether `fastdiff.train` measures the run at its end."""
        return self.sampling.evaluation_samples > 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without the data of modalities that it does not have."""
        left_out = {f"{name}_data" for name in MODALITIES if name not in self.modalities}
        left_out |= set(MODALITIES) - set(self.modalities) | (set() if self.text else {"tokenizer"})
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}


def check_recipe(recipe: QGFDRecipe) -> None:
    """Raises ValueError where the parts of a recipe do not fit each other."""
    if not recipe.modalities:
        raise ValueError(
            f"recipe: got no modality; expected a section of one or more of {', '.join(MODALITIES)}, as in image: {{}}"
        )
    with section("sampling"):
        check_sampler(recipe.sampling, recipe.diffusion)
    count = len(recipe.modalities)
    if recipe.objective.order == "mixed" and recipe.training.batch_size < count:
        raise ValueError(
            f"training.batch_size: got {recipe.training.batch_size}; a mixed batch of {count} modalities needs at "
            f"least {count}"
        )
