"""One call for a QGFD diffusion model of a modality, with what prepares its data and its noise schedule."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastdiff.data.tokenization import ids_without_text, vocabulary_size
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.models.qgfd.adapters import MODALITIES, AudioProcessor, ImageProcessor, VideoProcessor
from fastdiff.models.qgfd.adapters.base import AdapterConfig
from fastdiff.models.qgfd.adapters.huggingface import check_type, load_processor
from fastdiff.models.qgfd.model import QGFDModel, QGFDModelConfig

_OWN = (ImageProcessor, AudioProcessor, VideoProcessor)
_CONFIGS = {
    field.name: next(kind for kind in field.type.__args__ if kind is not type(None))
    for field in dataclasses.fields(QGFDModelConfig)
    if field.name in MODALITIES
}


def create_qgfd_model(
    modality: str | Sequence[str],
    backbone_name: str | None | Mapping[str, str | None] = None,
    config: QGFDModelConfig | None = None,
    *,
    processor: Any = None,
) -> tuple[QGFDModel, Any, Diffusion]:
    """A model with random weights (but for a pretrained encoder), its processor and its noise schedule.

    Args:
        modality: "text", "image", "audio", "video" or "tabular"; or several, which share one backbone. The
            configuration's adapters of other modalities are left out.
        backbone_name: a Hugging Face encoder of the modality, by hub id or folder (T5's, ViT, Wav2Vec2, …); for several
            modalities a name for each that has one. None: the configuration's, else a small encoder trained along.
        config: sizes and options; None is `QGFDModelConfig` with the adapters' defaults. It is not changed.
        processor: what prepares the data, where it is at hand (for several modalities: by modality). Without a Hugging
            Face encoder text needs a tokenizer, given here or named in config.text.tokenizer (its number of tokens
            becomes vocab_size), and a table a `fastdiff.data.TableSchema` (its columns become the configuration's).

    Returns:
        (model, processor, schedule): the processor is the tokenizer, an `ImageProcessor`, `VideoProcessor`,
        `AudioProcessor` or `TableSchema`; a dict of them by modality where there are several. They give what the
        adapters take, with a Hugging Face encoder and without (pixels in [-1, 1], waveforms as they are): an encoder's
        own normalisation happens in the adapter. The schedule is `Diffusion(config.diffusion)`.

    Raises:
        ValueError: an unknown modality, an encoder of another modality or sampling rate, a tokenizer or table processor
            that is missing.
        TypeError: `config` is not a QGFDModelConfig.
        FileNotFoundError: the encoder cannot be found.
    """
    several = not isinstance(modality, str)
    names = tuple(modality) if several else (modality,)
    for name in names:
        if name not in MODALITIES:
            raise ValueError(f"modality: got {name!r}; expected one of {', '.join(MODALITIES)}")
    if not names:
        raise ValueError(f"modality: got none; expected one or more of {', '.join(MODALITIES)}")
    backbones = _by_modality("backbone_name", backbone_name, names, several)
    processors = _by_modality("processor", processor, names, several)
    config = QGFDModelConfig() if config is None else config
    if not isinstance(config, QGFDModelConfig):
        raise TypeError(
            f"config: got a {type(config).__name__}; expected a QGFDModelConfig, whose field backbone is a QGFDConfig"
        )
    adapters: dict[str, AdapterConfig | None] = dict.fromkeys(MODALITIES)
    for name in names:
        given = getattr(config, name)
        adapter = _CONFIGS[name]() if given is None else dataclasses.replace(given)
        if backbones.get(name) is not None:
            adapter = dataclasses.replace(adapter, backbone_name=backbones[name], backbone_config=None)
        processors[name] = _prepare(name, adapter, processors.get(name))
        adapters[name] = adapter
    model = QGFDModel(dataclasses.replace(config, **adapters))
    if processors.get("text") is not None:
        text = model.config.text
        text.silent_token_ids = ids_without_text(processors["text"], text.vocab_size)
    return model, processors if several else processors[names[0]], model.diffusion


def _by_modality(argument: str, value: Any, names: tuple[str, ...], several: bool) -> dict[str, Any]:
    if not several:
        return {names[0]: value}
    if value is None:
        return {}
    if not isinstance(value, Mapping) or any(name not in names for name in value):
        given = list(value) if isinstance(value, Mapping) else repr(value)
        raise ValueError(f"{argument}: got {given}; with several modalities a dict by name, of {', '.join(names)}")
    return dict(value)


def _prepare(modality: str, config: Any, processor: Any) -> Any:
    """The processor of an adapter; what only the processor knows is written into the adapter's configuration."""
    if modality == "tabular":
        return _prepare_table(config, processor)
    if config.backbone_name is not None and not isinstance(processor, _OWN):
        return _prepare_pretrained(modality, config, processor)
    if modality == "text":
        return _prepare_text(config, processor)
    return _own_processor(modality, config) if processor is None else processor


def _prepare_pretrained(modality: str, config: Any, processor: Any) -> Any:
    """What the encoder's own processor says of normalisation and rate becomes the adapter's business."""
    # The model is looked at first: "of another modality" says more than a processor that is not there.
    check_type(config.backbone_name, modality)
    if processor is None:
        processor = load_processor(config.backbone_name, modality)
    if modality == "text":
        if processor.pad_token_id is not None:
            config.pad_token_id = processor.pad_token_id
        return copy.copy(processor)
    if modality == "audio":
        rate = processor.sampling_rate
        if config.sampling_rate not in (rate, type(config)().sampling_rate):
            raise ValueError(
                f"AudioAdapterConfig.sampling_rate: got {config.sampling_rate}; the encoder {config.backbone_name} "
                f"expects {rate} Hz audio: leave it out, and count num_samples at that rate"
            )
        config.sampling_rate, config.normalise = rate, bool(processor.do_normalize)
    elif getattr(processor, "do_normalize", True):
        config.image_mean, config.image_std = tuple(processor.image_mean), tuple(processor.image_std)
    else:
        config.image_mean, config.image_std = (0.0,) * 3, (1.0,) * 3
    return _own_processor(modality, config)


def _own_processor(modality: str, config: Any) -> Any:
    if modality == "audio":
        return AudioProcessor(config.sampling_rate)
    return (ImageProcessor if modality == "image" else VideoProcessor)(config.size, config.channels)


def _prepare_text(config: Any, tokenizer: Any) -> Any:
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_processor(config.tokenizer, "text")
    if tokenizer is None:
        if config.vocab_size is None:
            raise ValueError(
                "processor: got None for text without a backbone; pass a tokenizer, or name its folder or hub id in "
                "config.text.tokenizer"
            )
        return None
    config.vocab_size = vocabulary_size(tokenizer)
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _prepare_table(config: Any, processor: Any) -> Any:
    if processor is not None:
        config.num_numbers, config.category_sizes = len(processor.numbers), processor.category_sizes
    elif config.num_numbers + len(config.category_sizes) == 0:
        raise ValueError(
            "processor: got None for a table of unknown columns; pass fastdiff.data.TableSchema.fit(table), or set "
            "config.tabular.num_numbers and category_sizes"
        )
    return processor
