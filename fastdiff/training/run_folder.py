"""The folder of a run: what lies in it, and who may write there."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fastdiff.errors import TrainingError
from fastdiff.files import flush_to_disk, write_atomically
from fastdiff.reading import parse_json
from fastdiff.recipes import read_recipe_file
from fastdiff.training.checkpoint import (
    STATE_FILE,
    list_checkpoints,
    read_state,
    remove_checkpoint,
    remove_leftovers,
    step_of,
)
from fastdiff.training.config import TrainingConfig

_ALWAYS_WRITTEN = {"output_dir", "batch_size", "max_steps", "learning_rate", "checkpoint_every"}  # by any version
_LOCKS: dict[Path, FileLock] = {}  # of this process, by folder

# What may differ between a run and its continuation; everything else changes what the steps already done meant.
_FREE = {
    "data.check",
    "image_data.check",
    "video_data.check",
    "output_dir",
    "max_steps",
    "checkpoint_every",
    "keep_last",
    "resume",
    "accept_changed_data",
    "overwrite",
    "log_every",
    "preview_every",
    "trackers",
    "project",
    "device",
    "accumulation_steps",
}
# of a section of data: where it lies, and the order of its classes; its record tells whether they are the same
_RECORDED = {"folder": "fingerprint", "path": "fingerprint", "class_names": "class_names"}


class RunFolder:
    """Paths of a run and the checks on them.

    Args:
        path: training.output_dir.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.validation = self.path / "validation.jsonl"
        self.loss_picture = self.path / "loss.png"
        self.samples_picture = self.path / "samples.png"

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def choices(self) -> dict[str, Any]:
        """`training.choices` in config.yaml; {} where there are none: runs of earlier versions have none.

        Raises ValueError, naming the file, for what cannot be choices.
        """
        try:
            found = self._read_config()["training"].get("choices") or {}
        except (OSError, ValueError):  # what is wrong is said where the recipe is read
            return {}
        fits = isinstance(found, dict) and all(
            isinstance(key, str) and isinstance(value, str | int) and not isinstance(value, bool)
            for key, value in found.items()
        )
        if not fits:
            raise ValueError(
                f"{self.config}: training.choices: got {found!r}; expected names of choices with words or whole "
                'numbers ("no" in quotes)'
            )
        return found

    def prepare(self, training: TrainingConfig, recipe: dict[str, Any], check: Callable[[Path, int], object]) -> None:
        """Makes the folder ready for a run and writes config.yaml.

        Args:
            training: the recipe's part that says how to train.
            recipe: all of it, as plain values.
            check: called before a run goes on, with its newest checkpoint and the steps that it was planned for until
                now; it raises where it cannot.

        Raises:
            FileExistsError: it holds another run, and neither resume nor overwrite was asked for; or files that a run
                would replace, but no run.
            PermissionError, NotADirectoryError: it cannot be written.
            ValueError: resume with a recipe that differs where it must not; a link in the place of a run's file; and
                what `check` raises.
            TrainingError: another process trains in it.
        """
        self._check_writable()
        self._lock()
        self._check_links()
        if self.config.exists() or self.latest() is not None:
            if training.overwrite:
                self._check_is_run()
                self._clear()
            elif training.resume:
                planned = self._check_same(recipe)
                latest = self.latest()
                if latest is not None:
                    check(latest, planned)
                    if step_of(latest) >= training.max_steps:
                        return  # there is nothing to do: what was done stays described as it was
            else:
                raise FileExistsError(
                    f"training.output_dir: got {str(self.path)!r}, which holds a run already; pass "
                    "--training.resume true, --training.overwrite true or another folder"
                )
        else:
            self._check_free()
        self.checkpoints.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints)
        # an order of this one call: whoever trains by this file again has not given it
        stored = {**recipe, "training": {**recipe["training"], "overwrite": False}}
        write_atomically(self.config, yaml.safe_dump(stored, sort_keys=False))

    def _lock(self) -> None:
        """Keeps other processes out until `unlock`, or until this one ends; the same process may come again."""
        place = self.path.resolve()
        if place in _LOCKS:
            return
        lock = FileLock(place / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise TrainingError(
                f"training.output_dir: got {str(self.path)!r}, in which another process trains; wait for it, stop it, "
                "or pass another folder"
            ) from None
        _LOCKS[place] = lock

    def unlock(self) -> None:
        """Lets other processes train in the folder."""
        lock = _LOCKS.pop(self.path.resolve(), None)
        if lock is not None:
            lock.release()

    def _check_writable(self) -> None:
        advice = "pass a folder that can be written as --training.output_dir"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path, prefix=".probe-"):
                pass
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(
                f"training.output_dir: got {str(self.path)!r}, which is a file or lies in one; {advice}"
            ) from None
        except OSError as error:
            raise PermissionError(
                f"training.output_dir: got {str(self.path)!r}, which cannot be written ({error.strerror}); {advice}"
            ) from None

    def _read_config(self) -> dict[str, Any]:
        """config.yaml as plain values. Raises ValueError, naming the file, where it is not a recipe."""
        content = read_recipe_file(self.config)
        if not isinstance(content, dict) or not isinstance(content.get("training"), dict):
            raise ValueError(
                f"{self.config}: got no recipe of a run; expected the section training; pass another folder"
            )
        return content

    def _files(self) -> tuple[Path, ...]:
        """What a run writes beside its checkpoints and config.yaml."""
        pictures = (self.loss_picture, self.samples_picture)
        return (self.metrics, self.validation, *pictures, self.path / "evaluation.json")

    def _check_links(self) -> None:
        """Raises ValueError where a file of the run is a link: what it names would be replaced or deleted."""
        named = (self.config, self.checkpoints, *self._files())
        for path in (*named, *self.checkpoints.glob("step_*")):
            if path.is_symlink():
                raise ValueError(
                    f"training.output_dir: got {str(self.path)!r}, whose {path.relative_to(self.path)} is a link to "
                    f"{str(path.readlink())!r}; expected a run's own; move it here, or make the whole folder a link"
                )

    def _check_free(self) -> None:
        """Raises FileExistsError where a folder without a run has a file that a run writes."""
        for path in self._files():
            if path.exists():
                raise FileExistsError(
                    f"training.output_dir: got {str(self.path)!r}, which holds {path.name} but no run; expected a new "
                    "folder, or a run's; move it away, or pass another folder"
                )

    def _check_is_run(self) -> None:
        """Raises ValueError where a config.yaml or a checkpoint is not one that fastdiff.train wrote: it is kept."""
        kept = "nothing was deleted; pass another training.output_dir"
        if self.config.exists() and not self._read_config()["training"].keys() >= _ALWAYS_WRITTEN:
            raise ValueError(
                f"training.overwrite: got true, and {str(self.config)!r} is not one that fastdiff.train wrote; {kept}"
            )
        for checkpoint in list_checkpoints(self.checkpoints):
            if not (checkpoint / STATE_FILE).is_file():
                raise ValueError(
                    f"training.overwrite: got {str(checkpoint)!r}, which is not a checkpoint of fastdiff.train; {kept}"
                )

    def _clear(self) -> None:
        for checkpoint in list_checkpoints(self.checkpoints):
            remove_checkpoint(checkpoint)
        for path in (*self._files(), self.config):
            path.unlink(missing_ok=True)

    def _check_same(self, recipe: dict[str, Any]) -> int:
        """The steps that the run was planned for; raises ValueError for a recipe that differs where it must not."""
        if not self.config.exists():
            raise FileNotFoundError(f"{self.config} is missing; a run cannot be resumed without it")
        before = self._read_config()
        old, new = _flatten(before), _flatten(recipe)
        for key in sorted(old.keys() | new.keys()):
            free = key.startswith("sampling.") or key.removeprefix("training.") in _FREE
            if not free and old.get(key) != new.get(key) and not self._is_recorded(key):
                raise ValueError(
                    f"{key}: got {new.get(key)!r}, but the run in {str(self.path)!r} was started with "
                    f"{old.get(key)!r}; resume with the same value or pass another training.output_dir"
                )
        planned = before["training"].get("max_steps")
        return planned if isinstance(planned, int) and planned > 0 else recipe["training"]["max_steps"]

    def _is_recorded(self, key: str) -> bool:
        """Whether the newest checkpoint knows the content of what a field names: data, classes, tokenizer, model."""
        section, _, field = key.rpartition(".")
        latest = self.latest()
        if latest is None:
            return False
        state = read_state(latest)
        records = state.get("data", {})
        if key == "tokenizer.name":
            return any("tokenizer" in record for record in records.values())
        if key == "run":  # the model that a length head belongs to
            return "model_hash" in state["task"]
        return field in _RECORDED and _RECORDED[field] in records.get(section, {})


def locate(path: str | Path) -> tuple[RunFolder, Path | None]:
    """The run's folder that a path means, and the checkpoint where it names one."""
    path = Path(path)
    is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step_")
    return RunFolder(path.parent.parent if is_checkpoint else path), path if is_checkpoint else None


def locate_checkpoint(path: str | Path) -> tuple[RunFolder, Path]:
    """A run's folder and its newest checkpoint, or the one that the path names. Raises FileNotFoundError for none."""
    folder, checkpoint = locate(path)
    checkpoint = folder.latest() if checkpoint is None else checkpoint
    if checkpoint is None:
        raise FileNotFoundError(
            f"{folder.checkpoints} has no checkpoint yet; train longer, or set training.checkpoint_every lower"
        )
    if not checkpoint.is_dir():
        there = ", ".join(each.name for each in list_checkpoints(folder.checkpoints)) or "none"
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint; expected one of {there}")
    return folder, checkpoint


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class MetricsLog:
    """metrics.jsonl: one line per step, in order; a resumed run first drops the lines after its checkpoint."""

    def __init__(self, path: Path, steps_done: int):
        kept = [line for line in read_metrics(path) if line["step"] <= steps_done] if path.exists() else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path, self._file = path, path.open("a")

    def append(self, lines: list[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()

    def flush_to_disk(self) -> None:
        """Makes the lines so far as lasting as a checkpoint."""
        flush_to_disk(self.path)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off in the middle is left out.

    Raises ValueError for a file of something else; one line.
    """
    lines = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            line = parse_json(text, f"{path}, line {number}")
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(
                f"{path}, line {number}: got {text[:40]!r}; expected the numbers of a step; delete the file, or pass "
                "another folder"
            )
        lines.append(line)
    return lines
