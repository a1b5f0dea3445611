"""DiT checkpoints: fastdiff's own folders, facebookresearch/DiT files and diffusers' DiTTransformer2DModel folders."""

import argparse
import dataclasses
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff.errors import reason_of
from fastdiff.files import read_json, write_atomically
from fastdiff.models.dit import PRESETS, DiT, DiTConfig
from fastdiff.models.dit_layouts import from_diffusers, from_facebook
from fastdiff.version import __version__

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# Fields that no weight depends on: they may differ between saving and loading.
_FREE_FIELDS = ("attention", "class_dropout_prob", "gradient_checkpointing", "input_size")


def save_dit(model: DiT, directory: str | os.PathLike) -> None:
    """See `DiT.save_pretrained`."""
    write_checkpoint(directory, "DiT", model.state_dict(), dataclasses.asdict(model.config))


def write_checkpoint(
    directory: str | os.PathLike, class_name: str, state: Mapping[str, Tensor], config: dict[str, Any]
) -> None:
    """model.safetensors and config.json with a model's class, each whole or not at all."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    config = {"_class_name": class_name, "_fastdiff_version": __version__, **config}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_atomically(directory / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def load_dit(path: str | os.PathLike, dtype: torch.dtype, overrides: dict[str, Any]) -> DiT:
    """See `DiT.from_pretrained`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected a checkpoint of a DiT")
    if path.is_file():
        config, state = _read_facebook(path, overrides)
    else:
        if not (path / CONFIG_NAME).is_file() and (path / "transformer" / CONFIG_NAME).is_file():
            path = path / "transformer"  # of a diffusers pipeline
        config, state = _read_folder(path, overrides)
    with torch.device("meta"):
        expected = DiT(config).state_dict()
    check_state(state, expected, path, "its DiT")
    return _build(config, {name: tensor.to(dtype) for name, tensor in state.items()})


def _build(config: DiTConfig, state: dict[str, Tensor]) -> DiT:
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        model = DiT(config)
    model.load_state_dict(state, assign=True)
    model.reset_positions(dtype=next(iter(state.values())).dtype)
    return model.eval()


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without further names of a tensor that it has already: Hugging Face's encoders tie some."""
    kept: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # empty tensors, and those of the meta device, all have the address 0
        known = tensor.numel() > 0 and not tensor.is_meta
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()) if known else id(tensor)
        kept.setdefault(key, (name, tensor))
    return {name: tensor.detach() for name, tensor in kept.values()}


def check_state(state: Mapping[str, Tensor], model_state: Mapping[str, Tensor], path: Path, owner: str) -> None:
    """Raises ValueError where names or shapes of weights read from `path` are not those of a model's state dict.

    Args:
        state: what was read.
        model_state: of the model that should get it.
        path: named in the message.
        owner: the model, in the message's words.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model_state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected == found:
        return
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"{name} is missing")
        elif name not in expected:
            problems.append(f"{name} is unknown")
        elif expected[name] != found[name]:
            problems.append(f"{name} has shape {list(found[name])}, expected {list(expected[name])}")
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise ValueError(f"{path}: the weights are not those of {owner}: {'; '.join(problems[:3])}{more}")


def _read_folder(path: Path, overrides: dict[str, Any]) -> tuple[DiTConfig, dict[str, Tensor]]:
    if not (path / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{path}: no {CONFIG_NAME} in it; expected a folder written by save_pretrained")
    _check_overrides(overrides, _FREE_FIELDS)
    config = read_json(path / CONFIG_NAME)
    kind = config.get("_class_name")
    if kind == "DiTTransformer2DModel":
        try:
            config, state = from_diffusers(config, _read_diffusers_weights(path))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a DiTTransformer2DModel that can be loaded: {reason_of(error)}") from error
        return dataclasses.replace(config, **overrides), state
    if kind != "DiT":
        raise ValueError(
            f"{path / CONFIG_NAME}: _class_name is {kind!r}; expected 'DiT' (fastdiff) or 'DiTTransformer2DModel' "
            "(diffusers)"
        )
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        config = DiTConfig(**{**fields, **overrides})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / CONFIG_NAME}: not a DiT's configuration: {reason_of(error)}") from error
    return config, read_safetensors(path / WEIGHTS_NAME)


def _read_facebook(path: Path, overrides: dict[str, Any]) -> tuple[DiTConfig, dict[str, Tensor]]:
    _check_overrides(overrides, (*_FREE_FIELDS, "num_heads"))
    content = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    # A training checkpoint holds {"model", "ema", "opt", "args"}: samples are drawn with the averaged weights.
    state = next((content[name] for name in ("ema", "model") if isinstance(content.get(name), dict)), content)
    trained_as = PRESETS.get(getattr(content.get("args"), "model", None), {})
    try:
        return from_facebook(state, trained_as.get("num_heads"), overrides)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a facebookresearch/DiT checkpoint: {reason_of(error)}") from error


def _read_diffusers_weights(path: Path) -> dict[str, Tensor]:
    whole = path / f"{_DIFFUSERS_WEIGHTS}.safetensors"
    index = path / f"{_DIFFUSERS_WEIGHTS}.safetensors.index.json"
    pickled = path / f"{_DIFFUSERS_WEIGHTS}.bin"
    if index.is_file() and not whole.is_file():
        state: dict[str, Tensor] = {}
        for shard in sorted(set(read_json(index)["weight_map"].values())):
            state.update(read_safetensors(path / shard))
        return state
    return _read_pickle(pickled) if pickled.is_file() and not whole.is_file() else read_safetensors(whole)


def read_safetensors(path: Path, owner: str = "a DiT") -> dict[str, Tensor]:
    """The tensors of a file. Raises FileNotFoundError where there is none, ValueError for a damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the weights of {owner}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: cut short, damaged or no safetensors file: {reason_of(error)}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        # facebookresearch's training checkpoints hold their command line beside the tensors; nothing else is let in
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: cut short, damaged, or more than tensors in it; expected a PyTorch checkpoint of a DiT: "
            f"{reason_of(error)}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a state dict of a DiT")
    return content


def _check_overrides(overrides: dict[str, Any], allowed: tuple[str, ...]) -> None:
    for name in overrides:
        if name not in allowed:
            raise TypeError(f"{name}: cannot be changed when loading a checkpoint; only {', '.join(allowed)} can")
