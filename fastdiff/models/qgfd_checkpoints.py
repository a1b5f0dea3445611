"""Folders of QGFD backbones and models: model.safetensors and config.json."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import reason_of
from fastdiff.models.checkpoints import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_state,
    read_json,
    read_safetensors,
    untied_state,
    write_checkpoint,
)
from fastdiff.models.qgfd.backbone import QGFDBackbone, QGFDConfig
from fastdiff.models.qgfd.model import QGFDModel, as_config

_PREFIX = "backbone."  # of the backbone's weights in a model's


def save_backbone(backbone: QGFDBackbone, directory: str | os.PathLike) -> None:
    """See `QGFDBackbone.save_pretrained`."""
    write_checkpoint(directory, "QGFDBackbone", backbone.state_dict(), dataclasses.asdict(backbone.config))


def load_backbone(path: str | os.PathLike, dtype: torch.dtype) -> QGFDBackbone:
    """See `QGFDBackbone.from_pretrained`."""
    path = Path(path)
    kind, values = _read_config(path, "QGFDBackbone", "QGFDModel")
    state = read_safetensors(path / WEIGHTS_NAME, "a QGFD model")
    if kind == "QGFDModel":
        values = values.get("backbone", {})
        state = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    backbone = _made(lambda: QGFDBackbone(QGFDConfig(**values)), path)
    return _filled(backbone, state, path, dtype)


def save_model(model: QGFDModel, directory: str | os.PathLike) -> None:
    """See `QGFDModel.save_pretrained`."""
    write_checkpoint(directory, "QGFDModel", untied_state(model), dataclasses.asdict(model.config))


def load_model(path: str | os.PathLike, dtype: torch.dtype) -> QGFDModel:
    """See `QGFDModel.from_pretrained`."""
    path = Path(path)
    _, values = _read_config(path, "QGFDModel")
    state = read_safetensors(path / WEIGHTS_NAME, "a QGFD model")
    return _filled(_made(lambda: QGFDModel(as_config(values)), path), state, path, dtype)


def _read_config(path: Path, *kinds: str) -> tuple[str, dict[str, Any]]:
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{path}: no {CONFIG_NAME} in it; expected a folder written by save_pretrained")
    config = read_json(path / CONFIG_NAME)
    kind = config.get("_class_name")
    if kind not in kinds:
        raise ValueError(f"{path / CONFIG_NAME}: _class_name is {kind!r}; expected {' or '.join(map(repr, kinds))}")
    return kind, {name: value for name, value in config.items() if not name.startswith("_")}


def _made(make: Any, path: Path) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]):  # the weights it starts with are replaced
            return make()
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path / CONFIG_NAME}: not a QGFD model's configuration: {reason_of(error)}") from error


def _filled(model: nn.Module, state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> nn.Module:
    check_state(state, untied_state(model), path, "its configuration")
    model.load_state_dict(state, strict=False)  # tied weights have one name in the file
    return model.to(dtype).eval()
