"""Trackers of accelerate (TensorBoard, Weights & Biases and others), none of which can end a run."""

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from fastdiff.errors import reason_of
from fastdiff.training.config import TrainingConfig

_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
}
_PROJECT = re.compile(r"[^/\\\0]+")  # some trackers make a folder of it


def check_trackers(config: TrainingConfig) -> None:
    """Raises where accelerate does not know a tracker, its package is not installed, or the project is no plain name.

    Raises:
        ValueError, ModuleNotFoundError: one line that names the field.
    """
    if config.trackers and (not _PROJECT.fullmatch(config.project) or config.project in (".", "..")):
        raise ValueError(
            f"training.project: got {config.project!r}; expected a name without / and \\: trackers make a folder of it"
        )
    for name in config.trackers:
        if name not in _PACKAGES:
            raise ValueError(f"training.trackers: got {name!r}; expected one of {', '.join(_PACKAGES)}")
        packages = _PACKAGES[name]
        if not any(importlib.util.find_spec(package) for package in packages):
            raise ModuleNotFoundError(
                f"training.trackers: got {name!r}, whose package is not installed; run: pip install {packages[0]}"
            )


class Trackers:
    """The trackers of an accelerator. One that fails is left out from then on, with a line on stderr.

    Its first error would come again at each step, perhaps after a time-out each; metrics.jsonl has every step.

    Args:
        accelerator: made with the recipe's trackers; they live in its first process alone.
        project: the project's name.
        recipe: as plain values.
    """

    def __init__(self, accelerator: Accelerator, project: str, recipe: Mapping[str, Any]):
        self._accelerator, values = accelerator, flat_values(recipe)
        names, started = list(accelerator.log_with), []
        for name in names:  # one by one: accelerate leaves out those behind one that fails
            accelerator.log_with, accelerator.trackers = [name], []
            with self._kept_going(str(getattr(name, "value", name))):
                accelerator.init_trackers(project, values)
                started += accelerator.trackers
        accelerator.log_with, accelerator.trackers = names, started

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers of a step, to each tracker."""
        for tracker in list(self._accelerator.trackers):
            with self._kept_going(tracker.name, tracker):
                tracker.log(values, step=step)

    def finish(self) -> None:
        """Closes them; accelerate's `end_training` then finds none."""
        for tracker in list(self._accelerator.trackers):
            with self._kept_going(tracker.name, tracker):
                tracker.finish()
        self._accelerator.trackers = []

    @contextlib.contextmanager
    def _kept_going(self, name: str, tracker: Any = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any library, and of the network
            tqdm.write(
                f"the tracker {name} failed and gets nothing more of this run, which goes on "
                f"({type(error).__name__}: {reason_of(error)}); metrics.jsonl has every step",
                file=sys.stderr,
            )
            self._accelerator.trackers = [each for each in self._accelerator.trackers if each is not tracker]


def flat_values(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """A recipe as flat names and plain values, which is what trackers accept."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in recipe.items():
        if isinstance(value, dict):
            flat |= flat_values(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
