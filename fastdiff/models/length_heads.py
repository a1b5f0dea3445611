"""Folders of length heads: model.safetensors, and config.json with the head's kind and what model it belongs to."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from fastdiff.files import write_atomically
from fastdiff.models.checkpoints import CONFIG_NAME, WEIGHTS_NAME, check_state, read_json
from fastdiff.models.masked_lm_checkpoints import read_tensors
from fastdiff.nn.length_heads import LENGTH_HEADS
from fastdiff.version import __version__

_MODEL_TYPE = "fastdiff_length_head"  # transformers' key, so that a loader of language models can name what it refuses


def save_length_head(head: nn.Module, folder: str | Path, /, **about: Any) -> None:
    """Writes an `EndClassifier` or `LengthRegressor`, each file whole or not at all.

    Args:
        about: plain values for config.json: `model_hash` of the frozen model (`fastdiff.generation.length`), which
            `fastdiff.training.runs.load_length_head` compares, and what else users may want to know.

    Raises OSError where the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    config = {"model_type": _MODEL_TYPE, "fastdiff_version": __version__, "head": head.kind}
    config |= {"hidden_size": head.hidden_size, **about}
    write_atomically(folder / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def read_length_head(folder: str | Path, weights: str = WEIGHTS_NAME) -> tuple[nn.Module, dict[str, Any]]:
    """The head in a folder, in eval mode on the CPU, and its config.json.

    Args:
        weights: name of the file, such as ema.safetensors in a checkpoint.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a length head's, or damaged; the message names the file.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_NAME} in it; expected a run of recipes/eos_head_*.yaml")
    config = read_json(path)
    kind, size = config.get("head"), config.get("hidden_size")
    if config.get("model_type") != _MODEL_TYPE or kind not in LENGTH_HEADS or not isinstance(size, int):
        raise ValueError(f"{path}: not the configuration of a length head; expected a run of recipes/eos_head_*.yaml")
    head, state = LENGTH_HEADS[kind](size), read_tensors(Path(folder) / weights)
    check_state(state, head.state_dict(), Path(folder) / weights, f"a length head of kind {kind!r}")
    head.load_state_dict(state)
    return head.requires_grad_(False).eval(), config
