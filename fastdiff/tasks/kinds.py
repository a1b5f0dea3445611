"""The kinds of task: one line each. All else about a kind is in its folder, and imported when it is asked for."""

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.device import check_device
from fastdiff.files import read_json
from fastdiff.recipes import read_recipe_file
from fastdiff.tasks.hub import local_folder
from fastdiff.training.run_folder import locate

if TYPE_CHECKING:
    from fastdiff.tasks.run import Run

# The value of a recipe's `task` → the package that holds its `KIND`.
KINDS = {
    "dit": "fastdiff.tasks.dit",
    "masked_lm": "fastdiff.tasks.masked_lm",
    "length_head": "fastdiff.tasks.length_head",
    "qgfd": "fastdiff.tasks.qgfd",
    "text_to_image": "fastdiff.tasks.text_to_image",
    "autoencoder": "fastdiff.tasks.autoencoder",
    "captioning": "fastdiff.tasks.captioning",
}
_OF_RECIPES_WITHOUT_TASK = "dit"
_OF_FILES = "dit"  # facebookresearch/DiT's
_OF_MODELS_WITHOUT_CLASS = "masked_lm"  # whose class transformers' own config.json files do not name
_ACTIONS = ("sample", "generate", "evaluate")
_CONFIGS = ("config.json", "transformer/config.json")  # a model's, or that of the model in a pipeline of diffusers
_SAVED_FILES = ("config.json", "model.safetensors", "ema.safetensors", "diffusion_pytorch_model.safetensors")
_LONGEST_NAME = 255  # bytes of a name in a folder
_WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Kind:
    """What the commands need to know of a kind.

    Every entry but `about` and `saved_as` is "module:name", the module named within the kind's package.

    Attributes:
        package: the kind's package, `__name__` of the file that makes the Kind.
        about: what is trained, in a few words that follow "Trains".
        recipe: the dataclass of its recipes.
        task: makes a `fastdiff.training.Task` of a recipe.
        load: loads a run; arguments and result are those of `fastdiff.load`.
        sample, generate, evaluate: the commands of these names: function(path, options). Their parser is made from the
            dataclass that the annotation of `options` names. None where the kind has no such command.
        saved_as: the values of `_class_name` or `model_type` in config.json that mark a saved model of this kind.
    """

    package: str
    about: str
    recipe: str
    task: str
    load: str
    sample: str | None = None
    generate: str | None = None
    evaluate: str | None = None
    saved_as: tuple[str, ...] = ()

    def get(self, entry: str) -> Any:
        """The object that an entry names, imported now."""
        module, _, name = getattr(self, entry).partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), name)

    def options_of(self, action: str) -> type:
        """The dataclass of the options of `sample`, `generate` or `evaluate`."""
        return inspect.get_annotations(self.get(action), eval_str=True)["options"]


def kind_named(name: str) -> Kind:
    """The kind of a recipe's `task`. Raises KeyError for one that is not known."""
    return importlib.import_module(KINDS[name]).KIND


def recipe_kind(path: Path) -> str:
    """What a YAML recipe trains: its field `task`, or "dit" where it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or a task that is not known; the message names the file.
    """
    content = read_recipe_file(path)
    task = content.get("task", _OF_RECIPES_WITHOUT_TASK) if isinstance(content, dict) else _OF_RECIPES_WITHOUT_TASK
    if not isinstance(task, str) or task not in KINDS:
        raise ValueError(
            f"{path}: task: got {task!r}; expected one of {', '.join(KINDS)} ({_OF_RECIPES_WITHOUT_TASK} where it is "
            "left out)"
        )
    return task


def kind_of(path: str | Path) -> str:
    """The kind of what lies at a path: a run, a checkpoint, a saved model, or a model on the Hugging Face Hub.

    Raises:
        FileNotFoundError: nothing there; a hub id that cannot be reached; the message says what was tried.
        ValueError: a config that cannot be read; the message names the file.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"path: got {path!r}; expected a run, a checkpoint, a saved model or a hub id")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(path).parts):
        raise FileNotFoundError(
            f"path: got {os.fspath(path)[:40]!r} and more, {len(os.fspath(path))} characters; expected a run, a "
            f"checkpoint, a saved model or a hub id: no file has a name of more than {_LONGEST_NAME} bytes"
        )
    folder, checkpoint = locate(path)
    if folder.config.is_file():
        return recipe_kind(folder.config)
    if checkpoint is None and folder.checkpoints.is_dir():
        raise FileNotFoundError(f"{folder.config} is missing; expected the folder of a run of fastdiff.train")
    if Path(path).is_file():
        return _kind_of_file(Path(path))
    found = local_folder(path, _CONFIGS)
    for name in _CONFIGS:
        if (found / name).is_file():
            return _kind_of_config(found / name)
    raise FileNotFoundError(
        f"{path}: no config.yaml and no config.json in it; expected a run's folder, one of its checkpoints, or a "
        "saved model"
    )


def _kind_of_file(file: Path) -> str:
    if file.name == "config.yaml" or (file.name in _SAVED_FILES and (file.parent / "config.json").is_file()):
        raise ValueError(f"{file}: got one file of a folder; expected the folder; pass {file.parent}")
    if file.suffix not in _WEIGHT_FILES:
        raise ValueError(
            f"{file}: got a file; expected a folder, a hub id, or a facebookresearch/DiT file "
            f"({', '.join(_WEIGHT_FILES)})"
        )
    return _OF_FILES


def _kind_of_config(file: Path) -> str:
    content = read_json(file)
    marks = {str(content.get("_class_name")), str(content.get("model_type"))}
    for name in KINDS:
        if marks & set(kind_named(name).saved_as):
            return name
    if "_class_name" not in content:
        return _OF_MODELS_WITHOUT_CLASS
    known = [each for name in KINDS for each in kind_named(name).saved_as]
    raise ValueError(f"{file}: _class_name: got {content['_class_name']!r}; expected one of {', '.join(known)}")


def action_of(path: str | Path, action: str) -> tuple[Kind, Callable[[str, Any], None]]:
    """A kind's `sample`, `generate` or `evaluate` for what lies at a path.

    Raises ValueError where the kind has no such command, and what `kind_of` raises.
    """
    kind = kind_named(kind_of(path))
    if getattr(kind, action) is None:
        others = [f"fastdiff.{name}" for name in _ACTIONS if getattr(kind, name) is not None]
        advice = f"use {' or '.join(others)}" if others else "fastdiff.load(path).model is for use in Python"
        raise ValueError(f"{path}: got {kind.about}; expected what fastdiff.{action} can use; {advice}")
    return kind, kind.get(action)


def load(path: str | Path, *, weights: str = "ema", device: Any = None, **options: Any) -> "Run":
    """Loads a run, a checkpoint, a saved folder, or a model on the Hugging Face Hub, of any kind.

    Args:
        path: a run's folder (its newest checkpoint), one of its checkpoints, a folder written by `save_pretrained`, a
            folder or file in a public format that the kind reads, or a hub id.
        weights: for runs: the averaged ones ("ema") or those that the optimizer has ("model").
        device: a torch.device or its name; None takes a GPU where there is one.
        options: those of the kind's own `load`, such as `dtype` of a language model.

    Returns:
        A `fastdiff.tasks.run.Run` of the kind: `.model`, and `.sample(…)` or `.generate(…)` where it has them.

    Raises:
        FileNotFoundError: nothing there, no checkpoint yet, or a hub that cannot be reached.
        ValueError: a damaged file, a model that is not known, or a device that this machine does not have.
        TypeError: an option that the kind does not have.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights: got {weights!r}; expected 'ema' or 'model'")
    device, kind = check_device(device), kind_named(kind_of(path))
    loader = kind.get("load")
    known = inspect.signature(loader).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        unknown = [name for name in options if name not in {parameter.name for parameter in known}]
        if unknown:
            expected = ", ".join(each.name for each in known if each.kind is each.KEYWORD_ONLY)
            raise TypeError(f"{unknown[0]}: got an option that {kind.about} does not have; expected {expected}")
    return loader(path, weights=weights, device=device, **options)
