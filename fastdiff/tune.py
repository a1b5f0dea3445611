"""Measures again what is faster on this machine: `fastdiff tune`, or `fastdiff tune dit_mnist`.

Precision, attention, the masked loss and the kernels' sizes are measured when a run first needs them, and kept in the
cache; `fastdiff info` shows them. Without a recipe this measures the sizes at once, and forgets all the others. With
recipes it measures their training steps, too. A run that has begun keeps what it began with.
"""

import sys
from collections.abc import Sequence

from fastdiff import tuning
from fastdiff.arguments import ArgumentParser
from fastdiff.cli import quiet_libraries
from fastdiff.commands import command
from fastdiff.recipes import parse_recipe
from fastdiff.shipped import find_recipe
from fastdiff.tasks.kinds import kind_named, recipe_kind


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = ArgumentParser(prog="fastdiff tune", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("recipes", type=str, nargs="*", default=[], help="recipes whose training steps are measured")
    recipes = parser.parse_args(argv).recipes
    files = [find_recipe(name) for name in recipes]
    if not tuning.enabled():
        raise ValueError("FASTDIFF_TUNE: got 0, with which nothing is measured; expected 1: unset it")
    from fastdiff.ops._sizes import measure_sizes

    quiet_libraries()
    with tuning.measuring(again=True):
        settled = measure_sizes()
    if settled is None:
        print("nothing was forgotten; run it again when the machine is idle", file=sys.stderr)
    elif not files:
        tuning.forget(settled)
    for file in files:
        _measure(str(file))
    print("\n".join(tuning.table()))


def _measure(file: str) -> None:
    """The training step of a recipe."""
    from fastdiff.training.choices import measure_choices
    from fastdiff.training.setup import keep_freed_memory, on_cpu

    kind = kind_named(recipe_kind(find_recipe(file)))
    recipe = parse_recipe(kind.get("recipe"), [file])
    if not on_cpu(recipe.training):
        print(f"{file}: trains on a GPU here, where nothing is measured", file=sys.stderr)
        return
    keep_freed_memory()
    task = kind.get("task")(recipe)
    with tuning.measuring(again=True):
        measure_choices(task, recipe.training)


if __name__ == "__main__":
    main()
