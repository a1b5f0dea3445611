"""The README.md of a saved model: what it is, how to use it, how it was made, and what it reaches."""

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastdiff.files import write_atomically
from fastdiff.recipes import plain
from fastdiff.tasks.kinds import kind_named
from fastdiff.version import __version__

if TYPE_CHECKING:
    from fastdiff.tasks.run import Run

_CARD, _PICTURE = "README.md", "samples.png"
_LIBRARY = "library_name: fastdiff"
# Of the run's own machine, or of one call: they say nothing about the model.
_LEFT_OUT = ("output_dir", "resume", "accept_changed_data", "overwrite", "device", "trackers", "project")
# Of evaluation.json: how it was measured, and what is no measure.
_SETTINGS = (
    "sampler", "timestep_spacing", "steps_offset", "variance_type", "clip_sample", "num_inference_steps",
    "guidance_scale", "guidance_channels", "seed",
)  # fmt: skip
_NOT_MEASURED = ("step", "sampling", "generation", *_SETTINGS)


def write_model_card(directory: Path, run: "Run", title: str, address: str) -> None:
    """Writes README.md, and copies the run's picture of samples beside it.

    A card of fastdiff that lies beside the model's source is taken as it is, with its picture: it knows more.

    Args:
        directory: the folder, with the model in it.
        run: the model.
        title: the card's.
        address: what its example passes to `fastdiff.load`.

    Raises OSError where a file cannot be written.
    """
    if has_card(run.source):
        for name in (_CARD, _PICTURE):
            _copy(run.source / name, directory / name)
        return
    about, numbers = kind_named(run.kind).about, run.numbers()
    header = {"library_name": "fastdiff", "tags": ["fastdiff", "diffusion", run.kind]}
    steps = "" if run.step is None else f" after {run.step} training steps"
    averaged = " (averaged weights)" if run.weights == "ema" else ""
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {title}",
        f"This is {about}, saved by fastdiff {__version__}{steps}{averaged}.",
        _example(run.usage(), address),
    ]
    if _is_pictured(run):
        _copy(run.folder.samples_picture, directory / _PICTURE)
        parts.append(f"![Samples that the run drew in training]({_PICTURE})")
    if _measures(numbers):
        parts.append(f"## Numbers\n\n`fastdiff evaluate` measured{_settings(numbers)}:\n\n{_measures(numbers)}")
    if run.recipe is not None:
        command = "It was trained by this recipe. Saved as `recipe.yaml`, `fastdiff train recipe.yaml` trains it again:"
        recipe = yaml.safe_dump(_recipe_values(run.recipe), sort_keys=False, allow_unicode=True)
        parts.append(f"## Recipe\n\n{command}\n\n```yaml\n{recipe}```")
    write_atomically(directory / _CARD, "\n\n".join(parts) + "\n")


def _example(usage: str, address: str) -> str:
    """The lines that load the model and use it, imports first."""
    lines = usage.splitlines()
    imports = [line for line in lines if line.startswith(("from ", "import "))]
    parts = ["import fastdiff", *imports, "", f'run = fastdiff.load("{address}")']
    return "\n".join(["```python", *parts, *(line for line in lines if line not in imports), "```"])


def has_card(source: Path) -> bool:
    """Whether a folder has a model card that fastdiff wrote."""
    card = source / _CARD
    return card.is_file() and _LIBRARY in card.read_text(errors="replace").partition("\n---")[0]


def _copy(source: Path, target: Path) -> None:
    """Copies a file where there is one, not onto itself."""
    if source.is_file() and source.resolve() != target.resolve():
        write_atomically(target, lambda path: shutil.copyfile(source, path))


def _is_pictured(run: "Run") -> bool:
    """Whether the run's samples.png shows these weights: it is drawn with the newest averaged ones."""
    if run.folder is None or run.weights != "ema" or not run.folder.samples_picture.is_file():
        return False
    newest = run.folder.latest()
    return newest is not None and newest.name == run.source.name


def _recipe_values(recipe: Any) -> dict[str, Any]:
    values = recipe.to_dict() if hasattr(recipe, "to_dict") else dataclasses.asdict(recipe)
    values = {"task": recipe.task, **values}
    values["training"] = {name: value for name, value in values["training"].items() if name not in _LEFT_OUT}
    return plain(values)


def _measures(numbers: dict[str, Any]) -> str:
    """The measures of an evaluation as a table, nested names joined by dots; lists and texts are left out."""
    measured = {name: value for name, value in numbers.items() if name not in _NOT_MEASURED}
    rows = [f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
            for name, value in _flat(measured)]  # fmt: skip
    return "\n".join(["| measure | value |", "| --- | ---: |", *rows]) if rows else ""


def _settings(numbers: dict[str, Any]) -> str:
    """How the samples that were measured were drawn."""
    settings = numbers.get("sampling", numbers)
    known = [f"{name} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None]
    return f" ({', '.join(known)})" if known else ""


def _flat(numbers: dict[str, Any], prefix: str = "") -> list[tuple[str, int | float]]:
    found: list[tuple[str, int | float]] = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", value))
    return found
