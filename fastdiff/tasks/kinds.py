"""The kinds of task."""

from pathlib import Path

from fastdiff.recipes import read_recipe_file

RECIPE_KINDS = ("dit", "masked_lm", "length_head", "qgfd")


def recipe_kind(path: Path) -> str:
    """What a YAML recipe trains: its field `task`, or "dit" where it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or a task that is not known; the message names the file.
    """
    content = read_recipe_file(path)
    task = content.get("task", "dit") if isinstance(content, dict) else "dit"
    if task not in RECIPE_KINDS:
        raise ValueError(
            f"{path}: task is {task!r}; expected one of {', '.join(RECIPE_KINDS)} (dit where it is left out)"
        )
    return task
