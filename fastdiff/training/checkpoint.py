"""Checkpoints that are whole or not there.

A checkpoint is a folder checkpoints/step_N: what the task's `save` writes (model.safetensors, config.json, perhaps a
tokenizer), ema.safetensors, optimizer.safetensors and trainer_state.json. It is written under a temporary name, every
file and folder is flushed to the disk, and then it is renamed; trainer_state.json lists the sizes and SHA-256 of the
other files and has one of itself, so that a file that was cut short or changed later is noticed when it is read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fastdiff.files import read_json, sha256_of, uninterrupted, write_folder_atomically
from fastdiff.models.pretrained import untied_state
from fastdiff.models.weights import check_state, read_tensors

STATE_FILE = "trainer_state.json"
WEIGHTS, AVERAGED, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
_NAME = re.compile(r"step_(\d+)")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's checkpoints folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps done when a checkpoint was written, from its name."""
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def write_checkpoint(
    folder: Path, step: int, state: dict[str, Any], write: Callable[[Path], None], keep_last: int
) -> Path:
    """Makes folder/step_<step> atomically, then removes all but the newest `keep_last`.

    Args:
        state: what goes into trainer_state.json, beside the step and the list of files.
        write: puts the other files into the folder it is given.

    Signals wait until it is done (`fastdiff.files.uninterrupted`).

    Raises:
        OSError: nothing was changed: what was written is removed, older checkpoints stay.
    """
    target = folder / f"step_{step}"
    if target.is_dir():  # a run that was stopped right after it resumed
        return target

    def fill(temporary: Path) -> None:
        write(temporary)
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                 for path in written}  # fmt: skip
        content = {"step": step, **state, "files": files}
        content["sha256"] = _digest_of(content)
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1) + "\n")

    with uninterrupted():
        write_folder_atomically(target, fill)
        for old in list_checkpoints(folder)[:-keep_last]:
            remove_checkpoint(old)
    return target


def _digest_of(state: dict[str, Any]) -> str:
    """SHA-256 of a trainer state without its own."""
    content = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; it loses its name first, so that half of one is never taken for a whole one."""
    doomed = checkpoint.with_name(f".removing-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what an interrupted write or removal left behind."""
    for path in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        shutil.rmtree(path, ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint, after checking that it is as it was written, and that its files are there.

    The files' contents are looked at when they are read (`check_files`).

    Raises:
        FileNotFoundError, ValueError: a file is missing, changed or cut short; the message names it.
    """
    advice = _advice(checkpoint)
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a checkpoint of fastdiff.train; {advice}")
    try:
        state = read_json(path)
        step, files, _ = state["step"], dict(state["files"]), dict(state["task"])
        sizes = {name: file if isinstance(file, int) else int(file["bytes"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(f"{path} is not a whole trainer state; {advice}") from None
    if not files or not isinstance(step, int):
        raise ValueError(f"{path} is not a whole trainer state; {advice}")
    named = _NAME.fullmatch(checkpoint.name)
    if named and step != int(named[1]):
        raise ValueError(
            f"{checkpoint}: got the trainer state of step {step}; expected that of step {named[1]}; name the folder "
            f"step_{step}"
        )
    if "sha256" in state and state["sha256"] != _digest_of(state):
        raise ValueError(f"{path} was changed after it was written (its SHA-256 differs); {advice}")
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; expected {size} bytes; {advice}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes; expected {size}: it was cut short; {advice}")
    return state


def check_files(checkpoint: Path, state: dict[str, Any], names: Collection[str] | None = None) -> bool:
    """Checks that files of a checkpoint have the content that they were written with.

    Args:
        state: what `read_state` gave.
        names: those that will be read; None is all of them.

    Returns:
        False where it cannot be checked: fastdiff 0.1.0 kept the sizes alone.

    Raises:
        ValueError: a file changed, or is not one that was written with the checkpoint; the message names it.
    """
    kept = state["files"]
    if any(isinstance(file, int) for file in kept.values()):
        return False
    for name in kept if names is None else names:
        file = checkpoint / name
        if name not in kept:
            raise ValueError(f"{file} is not listed in {checkpoint / STATE_FILE}; {_advice(checkpoint)}")
        if sha256_of(file) != kept[name]["sha256"]:
            raise ValueError(f"{file} was changed after it was written (its SHA-256 differs); {_advice(checkpoint)}")
    return True


def _advice(checkpoint: Path) -> str:
    if checkpoint.resolve().parent.name == "checkpoints":
        return f"delete {checkpoint} to go on from the checkpoint before it"
    return "copy it again, whole"


def save_optimizer(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], path: Path) -> None:
    """Writes an optimizer's tensors, each named "<state>|<parameter>"."""
    tensors = {}
    for parameter, entries in optimizer.state.items():
        tensors |= {f"{key}|{names[parameter]}": value.detach().cpu().contiguous() for key, value in entries.items()}
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], path: Path) -> None:
    """Gives an optimizer the tensors that `save_optimizer` wrote.

    A parameter that is not in the file starts without state: it had no gradient before the file was written.

    Raises:
        ValueError: the file has state of a parameter that the model has not, or of another shape than the parameter's.
    """
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    content = read_tensors(path)
    for key, tensor in content.items():
        entry, _, name = key.partition("|")
        by_name.setdefault(name, {})[entry] = tensor
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {names[parameter]: parameter.shape for parameter in parameters}
    for name, entries in by_name.items():
        if name not in shapes:
            raise ValueError(
                f"{path} holds the state of {name!r}, which the model has not; it belongs to another model"
            )
        for entry, tensor in entries.items():
            if tensor.ndim and tensor.shape != shapes[name]:  # scalars, such as the number of steps, go with any shape
                raise ValueError(
                    f"{path} holds {entry} of {name!r} in shape {list(tensor.shape)}; expected {list(shapes[name])}: "
                    "it belongs to another model"
                )
    state = {index: by_name[names[p]] for index, p in enumerate(parameters) if names[p] in by_name}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's weights as safetensors, under the names of its state dict; tied weights under the first one."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in untied_state(model).items()}, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file of a checkpoint into a model, all names and shapes alike.

    Raises:
        ValueError: not a whole safetensors file, or of another model.
    """
    state = read_tensors(path)
    check_state(state, untied_state(model), path, "the model of this recipe")
    model.load_state_dict(state, strict=False)  # what is missing is tied to what is there
