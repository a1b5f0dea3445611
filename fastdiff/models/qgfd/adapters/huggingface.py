"""Hugging Face encoders under the adapters: which fit a modality, how they are loaded, how they are built again."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.data.tokenization import has_tokenizer

MODALITIES = ("text", "image", "audio", "video", "tabular")
# Encoders of a square grid of patches after any number of class tokens.
_IMAGE = (
    "vit", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "vit_msn", "ijepa",
    "clip_vision_model", "siglip_vision_model",
)  # fmt: skip
# Encoders of a waveform through strided convolutions.
_AUDIO = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
# Parameters that the states of the last layer do not depend on, and that would never get a gradient.
_UNUSED = ("pooler", "mask_token", "masked_spec_embed", "head.")
_UNUSED_OF = {"clip_vision_model": ("post_layernorm",)}


def model_types(modality: str) -> tuple[str, ...]:
    """Hugging Face's names of the architectures that a modality can have; () for tabular, which has none."""
    if modality == "text":  # what AutoModelForTextEncoding knows: T5's encoder, BERT's kind
        from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

        return tuple(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)
    return {"image": _IMAGE, "video": _IMAGE, "audio": _AUDIO, "tabular": ()}[modality]


def check_type(name: str, modality: str) -> Any:
    """The configuration of a pretrained encoder of a modality.

    Raises FileNotFoundError where there is none, ValueError where it is of another modality; one line.
    """
    from transformers import AutoConfig

    expected = model_types(modality)
    if not expected:
        raise ValueError(
            f"backbone_name: got {name!r}; modality {modality!r} has no Hugging Face encoder: leave it out"
        )
    config = _fetch(AutoConfig.from_pretrained, name, f"a model of type {', '.join(expected[:3])}, …")
    if config.model_type not in expected:
        raise ValueError(
            f"backbone_name: got {name!r}, a model of type {config.model_type!r}; modality {modality!r} takes one of "
            f"{', '.join(expected)}"
        )
    return config


def load_encoder(name: str, modality: str) -> tuple[nn.Module, dict[str, Any]]:
    """A pretrained encoder in float32 and its configuration as plain values. No code of the checkpoint is run.

    Raises as `check_type`.
    """
    config = check_type(name, modality)
    for field, value in (("apply_spec_augment", False), ("layerdrop", 0.0)):  # else its states are random in training
        if hasattr(config, field):
            setattr(config, field, value)
    load = _auto_class(modality).from_pretrained
    encoder = _fetch(load, name, "its weights", config=config, dtype=torch.float32)
    return encoder, config.to_dict()


def build_encoder(config: dict[str, Any], modality: str) -> nn.Module:
    """An encoder of random weights from a configuration that `load_encoder` gave."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "model_type"}
    config = AutoConfig.for_model(config["model_type"], **values)
    return _auto_class(modality).from_config(config).float()


def encoder_of(config: Any, modality: str) -> nn.Module | None:
    """The encoder that an adapter's configuration asks for; its `backbone_config` is filled in. None for none."""
    if config.backbone_config is not None:
        encoder = build_encoder(config.backbone_config, modality)
    elif config.backbone_name is not None:
        encoder, config.backbone_config = load_encoder(config.backbone_name, modality)
    else:
        return None
    unused = _UNUSED + _UNUSED_OF.get(encoder.config.model_type, ())
    for name, parameter in encoder.named_parameters():
        if config.freeze_backbone or any(part in name for part in unused):
            parameter.requires_grad_(False)
    return encoder


def load_processor(name: str, modality: str) -> Any:
    """The tokenizer, image processor or feature extractor of a checkpoint. Raises FileNotFoundError; one line."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    auto = {"text": AutoTokenizer, "audio": AutoFeatureExtractor}.get(modality, AutoImageProcessor)
    what = {"text": "a tokenizer", "audio": "a feature extractor"}.get(modality, "an image processor")
    folder = Path(name).expanduser()
    if modality == "text" and folder.is_dir() and not has_tokenizer(folder):
        # transformers would make a tokenizer that knows no words
        raise FileNotFoundError(
            f"backbone_name: got {name!r}, which has no tokenizer; expected a folder with one beside the model"
        )
    return _fetch(auto.from_pretrained, name, f"{what} beside the model")


def _auto_class(modality: str) -> Any:
    from transformers import AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if modality == "text" else AutoModel


def _fetch(load: Any, name: str, expected: str, **options: Any) -> Any:
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or name.startswith(("/", "./", "../", "~"))):
        raise FileNotFoundError(
            f"backbone_name: got {name!r}, which is not a folder; expected a hub id or a folder with {expected}"
        )
    try:
        return load(str(path) if path.is_dir() else name, trust_remote_code=False, **options)
    except Exception as error:  # many kinds: no such id, no network, nothing that fits in the folder
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"backbone_name: got {name!r}, which cannot be loaded ({reason}); expected a hub id or a folder "
            f"with {expected}"
        ) from None
