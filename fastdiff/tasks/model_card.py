"""The README.md of a saved model: what it is, how to use it, how it was made, and what it reaches."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fastdiff.files import write_atomically
from fastdiff.recipes import plain
from fastdiff.version import __version__

if TYPE_CHECKING:
    from fastdiff.tasks.run import Run

_PICTURE = "samples.png"


def write_model_card(directory: Path, run: "Run") -> None:
    """Writes README.md, and copies the run's picture of samples beside it. Raises OSError."""
    from fastdiff.tasks.kinds import kind_named

    about = kind_named(run.kind).about
    header = {"library_name": "fastdiff", "tags": ["fastdiff", "diffusion", run.kind]}
    method = "sample" if kind_named(run.kind).sample else "generate" if kind_named(run.kind).generate else None
    use = f"print(run.{method}(…))" if method else "print(run.model)"
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {directory.name if run.folder is None else run.folder.path.resolve().name}",
        f"This is {about}, saved by fastdiff {__version__}"
        + (f" after {run.step} training steps." if run.step is not None else "."),
        '```python\nimport fastdiff\n\nrun = fastdiff.load("PATH_OR_HUB_ID")\n' + use + "\n```",
    ]
    if run.folder is not None and run.folder.samples_picture.is_file():
        if run.folder.samples_picture.resolve() != (directory / _PICTURE).resolve():
            shutil.copyfile(run.folder.samples_picture, directory / _PICTURE)
        parts.append(f"![samples]({_PICTURE})")
    numbers = _rows(run.numbers())
    if numbers:
        parts.append("## Numbers\n\nThe last `fastdiff evaluate` measured:\n\n" + numbers)
    if run.recipe is not None:
        values = run.recipe.to_dict() if hasattr(run.recipe, "to_dict") else vars(run.recipe)
        recipe = yaml.safe_dump(plain(_values(values)), sort_keys=False)
        parts.append(f"## Recipe\n\n`fastdiff train` made it by this recipe:\n\n```yaml\n{recipe}```")
    write_atomically(directory / "README.md", "\n\n".join(parts) + "\n")


def _values(value: Any) -> Any:
    """Nested dataclasses as dicts."""
    import dataclasses

    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return {name: _values(each) for name, each in value.items()} if isinstance(value, dict) else value


def _rows(numbers: dict[str, Any], prefix: str = "") -> str:
    """The numbers of an evaluation as a table, nested names joined by dots; lists are left out."""
    lines = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            lines += _rows(value, f"{prefix}{name}.").splitlines()[2:]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {prefix}{name} | {shown} |")
    return "\n".join(["| measure | value |", "| --- | ---: |", *lines]) if lines else ""
