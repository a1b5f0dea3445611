"""The data of a QGFD recipe's modalities, and the model that fits it."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdiff.data import (
    LabelledData,
    TableSchema,
    load_audio_data,
    load_data,
    load_tabular_data,
    load_text_data,
    load_video_data,
)
from fastdiff.data.text_examples import text_examples
from fastdiff.errors import section
from fastdiff.models.qgfd.adapters.huggingface import check_type, load_processor
from fastdiff.tasks.qgfd.recipe import QGFDRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.models import QGFDModel


@dataclass(frozen=True)
class Source:
    """The data of one modality.

    Attributes:
        data: its examples.
        processor: what `create_qgfd_model` takes: the tokenizer of text, the columns of a table; else None.
        fields: the fields of the adapter's configuration that the data decides.
    """

    data: LabelledData
    processor: "PreTrainedTokenizerBase | TableSchema | None"
    fields: dict[str, Any]


def load_source(recipe: QGFDRecipe, modality: str, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Source:
    """Loads the data of a modality.

    Args:
        tokenizer: the tokenizer of text where there is one already, such as a finished run's.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError, ValueError: it is missing or unusable, or does not fit the
            recipe's adapter; one line.
    """
    with section(f"{modality}_data"):
        source = _LOADERS[modality](recipe, tokenizer)
    _check_fields(recipe, modality, source)
    return source


def build_model(recipe: QGFDRecipe, sources: dict[str, Source]) -> "QGFDModel":
    """The recipe's model, of random weights (but for pretrained encoders), in the sizes of its data."""
    from fastdiff.models import QGFDModelConfig, create_qgfd_model

    adapters = {name: dataclasses.replace(getattr(recipe, name), **source.fields) for name, source in sources.items()}
    fixed = recipe.objective.adapters_from is not None
    weight = 0.0 if fixed else recipe.objective.reconstruction_weight
    config = QGFDModelConfig(recipe.backbone, recipe.diffusion, **adapters, reconstruction_weight=weight)
    processors = {name: source.processor for name, source in sources.items() if source.processor is not None}
    model = create_qgfd_model(recipe.modalities, config=copy.deepcopy(config), processor=processors)[0]
    if recipe.text is not None and recipe.text.token_posterior:
        model.adapters["text"].set_token_prior(sources["text"].data.train.token_counts())
    return model


def check_backbones(recipe: QGFDRecipe) -> None:
    """Looks at the Hugging Face encoders that a recipe names, before any data is loaded.

    Raises FileNotFoundError where one cannot be loaded, ValueError where it is of another modality or rate.
    """
    for name in recipe.modalities:
        backbone = getattr(recipe, name).backbone_name
        if backbone is None:
            continue
        check_type(backbone, name)
        if name != "audio":
            continue
        rate, data = load_processor(backbone, name).sampling_rate, recipe.audio_data
        if rate != data.sampling_rate:
            raise ValueError(
                f"audio_data.sampling_rate: got {data.sampling_rate}; the encoder {backbone} expects {rate} Hz "
                f"audio: set it to that, and audio_data.num_samples from {data.num_samples} to "
                f"{round(data.num_samples * rate / data.sampling_rate)} for windows that last as long"
            )


def _text(recipe: QGFDRecipe, tokenizer: "PreTrainedTokenizerBase | None") -> Source:
    config, backbone = recipe.text_data, recipe.text.backbone_name
    if tokenizer is None and backbone is not None:
        tokenizer = load_processor(backbone, "text")
    data = load_text_data(config, recipe.tokenizer if tokenizer is None else tokenizer)
    pairs = data.train.conditions is not None
    return Source(text_examples(data, config), data.tokenizer, {"max_length": config.max_length, "conditional": pairs})


def _image(recipe: QGFDRecipe, _: None) -> Source:
    data = load_data(recipe.image_data)
    channels, *size = data.image_shape
    return Source(data, None, {"image_size": tuple(size), "channels": channels, **_classes(recipe, data)})


def _audio(recipe: QGFDRecipe, _: None) -> Source:
    data = load_audio_data(recipe.audio_data)
    fields = {"sampling_rate": data.sampling_rate, "num_samples": data.num_samples}
    return Source(data, None, fields | _classes(recipe, data))


def _video(recipe: QGFDRecipe, _: None) -> Source:
    data = load_video_data(recipe.video_data)
    frames, channels, *size = data.video_shape
    fields = {"image_size": tuple(size), "channels": channels, "num_frames": frames}
    return Source(data, None, fields | _classes(recipe, data))


def _tabular(recipe: QGFDRecipe, _: None) -> Source:
    data = load_tabular_data(recipe.tabular_data)
    sizes = tuple(len(column.values) for column in data.schema.categories)
    return Source(data, data.schema, {"num_numbers": len(data.schema.numbers), "category_sizes": sizes})


def _classes(recipe: QGFDRecipe, data: LabelledData) -> dict[str, Any]:
    labelled = recipe.objective.condition_on_labels and len(data.class_names) > 0
    return {"num_classes": len(data.class_names) if labelled else None}


_LOADERS = {"text": _text, "image": _image, "audio": _audio, "video": _video, "tabular": _tabular}


def _check_fields(recipe: QGFDRecipe, modality: str, source: Source) -> None:
    """What the recipe says of sizes must be what the data has, or be left out."""
    adapter = getattr(recipe, modality)
    defaults = type(adapter)()
    for name, value in source.fields.items():
        given = getattr(adapter, name)
        both = (given, given) if name == "image_size" and isinstance(given, int) else given
        if given != getattr(defaults, name) and both != value:
            raise ValueError(
                f"{modality}.{name}: got {given}; the data set {source.data.name} has {value}: leave it out of the "
                "recipe"
            )
