"""What the loaded runs of all kinds have in common."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np
from torch import nn

from fastdiff import tuning
from fastdiff.data.file_checks import class_folders
from fastdiff.device import PRECISIONS
from fastdiff.files import read_json
from fastdiff.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, naming_config, read_config
from fastdiff.recipes import plain
from fastdiff.tasks.hub import local_folder, upload
from fastdiff.tasks.kinds import kind_named, kind_of
from fastdiff.tasks.model_card import has_card, write_model_card
from fastdiff.training.checkpoint import AVERAGED, OPTIMIZER, STATE_FILE, WEIGHTS, check_files, read_state
from fastdiff.training.provenance import DataSet, check_data, class_order, records_of
from fastdiff.training.run_folder import RunFolder, locate, locate_checkpoint

Sampling = TypeVar("Sampling")
ACCEPT_CHANGED_DATA = "--accept-changed-data"  # the option of commands that compare a run with its data
_PRECISIONS = ("auto", *PRECISIONS)


@dataclass(frozen=True)
class Found:
    """Where the weights of something to load lie.

    Attributes:
        source: the folder (or file) with the weights.
        folder: the run's folder; None for what is not in one.
        state: a checkpoint's trainer_state.json; None for what is not a checkpoint.
        weights: which of a checkpoint's weights are wanted, "ema" or "model"; None where there is no choice.
    """

    source: Path
    folder: RunFolder | None
    state: dict[str, Any] | None
    weights: str | None

    @property
    def weights_file(self) -> str:
        """The name of the file with the weights in a folder written by fastdiff."""
        return "ema.safetensors" if self.weights == "ema" else WEIGHTS_NAME

    @property
    def origin(self) -> dict[str, Any]:
        """The fields of `Run` that say where it came from."""
        step = None if self.state is None else self.state["step"]
        return {
            "source": self.source, "folder": self.folder, "step": step, "weights": self.weights, "state": self.state,
            "choices": self.choices,
        }  # fmt: skip

    @property
    def choices(self) -> dict[str, Any] | None:
        """What it goes by on a CPU: its run's record, or its config.json's; None where that is the machine's to say."""
        if self.folder is not None:
            return self.folder.choices() or None
        file = self.source / CONFIG_NAME
        choices = read_config(self.source).get("choices") if file.is_file() else None
        if choices is not None and not isinstance(choices, dict):
            raise ValueError(f"{file}: choices: got {choices!r}; expected an object")
        return choices or None


def find(path: str | Path, kind: str, weights: str, files: Sequence[str] | None = None) -> Found:
    """Finds what a kind's `load` was asked for: a run, a checkpoint in its run or alone, a saved model, a hub id.

    Args:
        path, weights: as of `fastdiff.load`.
        kind: the kind that loads.
        files: patterns of the files to download where the path is a hub id; None takes all.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint yet.
        ValueError: something of another kind, or a checkpoint that is not whole, or was changed after it was written.
    """
    if (found := kind_of(path)) != kind:
        raise ValueError(
            f"{path}: got {kind_named(found).about}; expected {kind_named(kind).about}; fastdiff.load loads any kind"
        )
    if locate(path)[0].config.is_file():
        folder, checkpoint = locate_checkpoint(path)
        return _checked(Found(checkpoint, folder, read_state(checkpoint), weights))
    source = local_folder(path, files)
    if (source / STATE_FILE).is_file():
        return _checked(Found(source, None, read_state(source), weights))
    return Found(source, None, None, None)


def _checked(found: Found) -> Found:
    """What was found, once the files to be read are known to be those that were written."""
    others = {OPTIMIZER, WEIGHTS, AVERAGED} - {found.weights_file}
    names = [name for name in found.state["files"] if name not in others]
    check_files(found.source, found.state, {*names, found.weights_file})
    return found


@contextlib.contextmanager
def finding_data() -> Iterator[None]:
    """A block that loads a run's data for a command: what is missing may lie elsewhere, which an option can say."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or pass --data-path with where it lies now") from None


def check_count(option: str, value: Any) -> None:
    """Raises TypeError or ValueError for a number of samples, or a length, that is given and is none."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{option}: got {value!r}; expected a whole number")
    if value < 1:
        raise ValueError(f"{option}: got {value}; expected at least 1")


def sampling_keys(sampling: Any, mixed_precision: str) -> dict[str, Any]:
    """What config.json of a saved model says of its sampling; `stored_sampling` reads it, and `Found` the choices."""
    choices = dict(tuning.record())
    keys = {"sampling": plain(dataclasses.asdict(sampling)), "mixed_precision": mixed_precision}
    return keys | ({"choices": choices} if choices else {})


def stored_sampling(folder: Path, kind: type[Sampling]) -> tuple[Sampling, str]:
    """How a saved model samples where nobody says otherwise, and its `mixed_precision`.

    Both are those of the run that it was saved from; the defaults of `kind`, and "auto", where its config.json names
    none. Raises ValueError, naming the file, for values that do not fit.
    """
    config = read_config(folder) if (folder / CONFIG_NAME).is_file() else {}
    precision = config.get("mixed_precision", "auto")
    if precision not in _PRECISIONS:
        raise ValueError(
            f"{folder / CONFIG_NAME}: mixed_precision: got {precision!r}; expected one of {', '.join(_PRECISIONS)}"
        )
    with naming_config(folder, "a model with its sampling"):
        values = dict(config.get("sampling", {}))
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}), (
            precision
        )


def going_by_choices(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a run within which choices are the run's."""

    @functools.wraps(method)
    def call(self: "Run", *args: Any, **kwargs: Any) -> Any:
        with tuning.using(self.choices):
            return method(self, *args, **kwargs)

    return call


@dataclass(frozen=True)
class Run:
    """Something trained, loaded to be used. `fastdiff.load` makes one.

    Attributes:
        model: in eval mode.
        source: the folder (or file) that the weights came from.
        folder: the run's folder; None for what is not a run of fastdiff.train.
        recipe: what the run was trained by, or None.
        step: optimizer steps behind the checkpoint; None for what is not a checkpoint of fastdiff.train.
        weights: which of a checkpoint's weights these are, "ema" or "model"; None for what is not a checkpoint.
        state: the checkpoint's trainer_state.json, or None.
        choices: what it goes by on a CPU (`fastdiff.tuning.using`): its `training.choices`. None: what is measured.
    """

    kind: ClassVar[str]

    model: nn.Module
    source: Path
    folder: RunFolder | None = None
    recipe: Any = None
    step: int | None = None
    weights: str | None = None
    state: dict[str, Any] | None = field(default=None, repr=False)
    choices: Mapping[str, Any] | None = field(default=None, repr=False)

    def check_data(self, data: Mapping[str, DataSet], accept: bool = False) -> None:
        """Compares data that was loaded by the run's recipe with what the run was trained on.

        Args:
            data: by the section of the recipe that names it, as `fastdiff.training.Task.data_sets` gives it.
            accept: whether to go on with other data; a line on stderr says what changed.

        Raises:
            ValueError: it is not the same; the message says what changed.
        """
        if self.state is not None:
            run = repr(str(self.source if self.folder is None else self.folder.path))
            check_data(self.state, records_of(data), run, accept, ACCEPT_CHANGED_DATA)

    def data_config(self, section: str, data_path: str | None = None) -> Any:
        """A section of the recipe that names data, with the classes in the order that the run's labels have.

        Args:
            section: its name, such as "data".
            data_path: where the data lies instead.

        Raises:
            ValueError: data that lies nowhere, as a package makes it.
        """
        config = getattr(self.recipe, section)
        if data_path is not None:
            place = next((name for name in ("folder", "path") if hasattr(config, name)), None)
            if place is None:
                raise ValueError(f"--data-path: got {data_path!r}, and {section} names no file or folder; leave it out")
            config = dataclasses.replace(config, **{place: data_path})
        order = None if self.state is None else class_order(self.state, section)
        if order and config.name.endswith("_folder") and config.name != "captions_folder":
            root = Path(config.folder).expanduser()
            there = [folder.name for folder in class_folders(root)] if root.is_dir() else order
            # other classes than the run's are loaded as they are: `check_data` says what changed
            config = dataclasses.replace(config, class_names=order if sorted(there) == sorted(order) else None)
        return config

    def sample(self, *_: Any, **__: Any) -> Any:
        """Draws samples, where the kind has any. Raises TypeError where it has none."""
        self._cannot("sample")

    def generate(self, *_: Any, **__: Any) -> Any:
        """Generates text, where the kind does. Raises TypeError where it does not."""
        self._cannot("generate")

    def _cannot(self, what: str) -> NoReturn:
        others = [name for name in ("sample", "generate") if getattr(type(self), name) is not getattr(Run, name)]
        advice = f"use .{others[0]}(…)" if others else "use its .model"
        raise TypeError(f"{what}: got a run of {self.kind}, which has none; {advice}")

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes a folder that `fastdiff.load` reads: weights, configuration, and a model card README.md.

        What is loaded from it samples as this does. The card has the recipe, the numbers that `fastdiff.evaluate`
        measured of this checkpoint and these weights, and the run's picture of samples, where there are any. A card
        that the model was loaded with is kept.

        Raises:
            FileExistsError: the folder holds something else than a saved model of this kind.
            OSError: it cannot be written.
        """
        directory = Path(directory)
        self._check_target(directory)
        self._write(directory, directory.resolve().name if self.folder is None else self.folder.path.resolve().name)

    def _check_target(self, directory: Path) -> None:
        """Raises FileExistsError where files would be mixed with others."""
        if directory.exists() and not directory.is_dir():
            raise FileExistsError(f"directory: got {str(directory)!r}, which is a file; expected a folder's name")
        there = sorted(path.name for path in directory.iterdir() if path.name[0] != ".") if directory.is_dir() else []
        of_run = bool({STATE_FILE, "config.yaml"} & set(there))  # whose files stay as training wrote them
        itself = bool(self.source) and directory.resolve() == Path(self.source).resolve()
        if not there or (itself and not of_run):
            return
        if of_run or not has_card(directory) or kind_of(directory) != self.kind:
            names = ", ".join(there[:3]) + (", …" if len(there) > 3 else "")
            raise FileExistsError(
                f"directory: got {str(directory)!r}, which holds {names}; expected a new or empty folder, or one with "
                f"a saved {self.kind}; pass another"
            )

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, commit_message: str | None = None) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face Hub, in one commit; makes the repository first.

        Args:
            repo_id: "name" or "owner/name".
            private: of a new repository; None is the owner's default.
            commit_message: None is "Upload with fastdiff".

        Returns:
            The commit's address.

        Raises:
            ValueError: a repo_id that cannot be one.
            PermissionError: no login, or one that may not write there.
            ConnectionError: the hub cannot be reached, or fails.
        """
        message = commit_message or "Upload with fastdiff"
        return upload(
            repo_id, lambda folder, name: self._write(folder, name, name), private=private, commit_message=message
        )

    def _write(self, directory: Path, title: str, address: str = "PATH_OR_HUB_ID") -> None:
        """All of a saved folder; `address` is what its card passes to `fastdiff.load`."""
        if type(self)._save is Run._save:
            raise TypeError(f"save_pretrained: got a run of {self.kind}, which has none; copy {self.source}")
        directory.mkdir(parents=True, exist_ok=True)
        self._save(directory)
        write_model_card(directory, self, title, address)

    def _save(self, directory: Path) -> None:
        """Writes all but the model card; a kind without it cannot be saved."""

    def usage(self) -> str:
        """Lines of Python for the model card that use `run`, what `fastdiff.load` gives."""
        return "run.model"

    def numbers(self) -> dict[str, Any]:
        """What the last `fastdiff.evaluate` measured of this checkpoint and these weights; {} where it has not."""
        if self.folder is None:
            return {}
        try:
            content = read_json(self.folder.path / "evaluation.json")
        except (OSError, ValueError):
            return {}
        mine = {"step": self.step, "weights": self.weights}
        fits = all(content.get(name, value) == value for name, value in mine.items())
        return content if fits and "step" in content else {}
