"""The kinds of task: one line each. All else about a kind is in its folder, and imported when it is asked for."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.files import read_json
from fastdiff.recipes import read_recipe_file
from fastdiff.tasks.hub import hub_file
from fastdiff.training.run_folder import locate

if TYPE_CHECKING:
    from fastdiff.tasks.run import Run

# The value of a recipe's `task` → the package that holds its `KIND`.
KINDS = {
    "dit": "fastdiff.tasks.dit",
    "masked_lm": "fastdiff.tasks.masked_lm",
    "length_head": "fastdiff.tasks.length_head",
    "qgfd": "fastdiff.tasks.qgfd",
}
_OF_RECIPES_WITHOUT_TASK = "dit"
_OF_MODELS_WITHOUT_CLASS = "masked_lm"  # whose class transformers' own config.json files do not name
_ACTIONS = ("sample", "generate", "evaluate")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    folder, _ = locate(path)
    if folder.config.is_file():
        return recipe_kind(folder.config)
    if folder.checkpoints.is_dir():
        raise FileNotFoundError(f"{folder.config} is missing; expected the folder of a run of fastdiff.train")
    path = Path(path)
    if path.is_file() or any((path / name).is_file() for name in ("model_index.json", "transformer/config.json")):
        return _OF_RECIPES_WITHOUT_TASK  # a facebookresearch file, or the folder of a diffusers pipeline
    if (path / "config.json").is_file():
        return _kind_of_config(path / "config.json")
    if path.exists():
        raise FileNotFoundError(
            f"{path}: no config.yaml and no config.json in it; expected a run's folder, one of its checkpoints, or a "
            "saved model"
        )
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"{path}: no such folder; expected a run, a checkpoint, a saved model or a hub id")
    return _kind_of_config(hub_file(str(path), "config.json"))


def _kind_of_config(file: Path) -> str:
    content = read_json(file)
    marks = {content.get("_class_name"), content.get("model_type")}
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
        weights: of a run: the averaged ones ("ema") or those that the optimizer has ("model").
        device: a torch.device or its name; None takes a GPU where there is one.
        options: those of the kind's own `load`, such as `dtype` of a language model.

    Returns:
        A `fastdiff.tasks.run.Run` of the kind: `.model`, and `.sample(…)` or `.generate(…)` where it has them.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint yet.
        ValueError: a damaged file, a model that is not known, or a device that this machine does not have.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights: got {weights!r}; expected 'ema' or 'model'")
    return kind_named(kind_of(path)).get("load")(path, weights=weights, device=device, **options)
