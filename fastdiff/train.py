"""Trains by a recipe: `fastdiff train dit_mnist --training.max_steps 200`.

The recipe is one of those that come with fastdiff, by its name (`fastdiff train --list` shows them), or a YAML file.
Its `task` says what it trains. Several processes: `accelerate launch --num_processes 2 -m fastdiff.train …` (or
torchrun).
"""

import sys
from collections.abc import Sequence
from typing import Any

from fastdiff.commands import command

_USAGE = "fastdiff train RECIPE [--SECTION.FIELD VALUE ...]"
_HELP = f"""usage: {_USAGE}

{__doc__}
options:
  --list           the recipes that come with fastdiff: what they train, what they need, how long they take
  RECIPE --help    the fields of that recipe and their values, a line each; --help-all tells more of each
"""


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.recipes import RecipeArguments, parse_recipe
    from fastdiff.shipped import list_recipes
    from fastdiff.tasks.kinds import KINDS, kind_named, recipe_kind

    arguments = RecipeArguments.find(sys.argv[1:] if argv is None else argv)
    if "--list" in arguments.options:
        return print("\n".join(f"{name:32} {about}" for name, about in list_recipes()))
    if arguments.recipe is None:
        if {"-h", "--help"} & set(arguments.options):
            kinds = "".join(f"\n  {name:16} {kind_named(name).about}" for name in KINDS)
            print(f"{_HELP}\nvalues of a recipe's `task`:{kinds}")
            raise SystemExit(0)
        raise ValueError(f"no recipe given; expected: {_USAGE}; --list shows the recipes that come with fastdiff")
    kind = kind_named(recipe_kind(arguments.recipe))
    about = f"Trains {kind.about}. Every field can be given as an option, for example --training.max_steps 200."
    _train(kind, parse_recipe(kind.get("recipe"), arguments, about))


def _train(kind: Any, recipe: Any) -> None:
    from fastdiff.cli import quiet_libraries
    from fastdiff.training.trainer import Trainer

    make_task = kind.get("task")
    quiet_libraries()
    trainer = Trainer(make_task(recipe), recipe.training)
    before = trainer.steps_done
    outcome = trainer.train()
    if not trainer.accelerator.is_main_process:
        return
    if before >= recipe.training.max_steps:
        print(
            f"already at step {before} (training.max_steps is {recipe.training.max_steps}), nothing to do; "
            f"checkpoint: {outcome.checkpoint}"
        )
    elif outcome.finished:
        print(
            f"trained {outcome.steps} steps ({outcome.samples_per_second:.0f} {trainer.task.unit}/s); "
            f"checkpoint: {outcome.checkpoint}; pictures: {trainer.folder.samples_picture}, "
            f"{trainer.folder.loss_picture}"
        )
        if getattr(recipe, "evaluated_after_training", False):
            print("measuring samples of the run; Ctrl-C leaves it as it is", flush=True)
            kind.get("evaluate")(str(trainer.folder.path), kind.options_of("evaluate")())
        if kind.sample:
            print(f"next: fastdiff sample {trainer.folder.path}")
        elif kind.generate:
            print(f'next: fastdiff generate {trainer.folder.path} --prompt "…"')
    else:
        print(
            f"stopped by a signal after step {outcome.steps}; checkpoint: {outcome.checkpoint}; "
            "the same command with --training.resume true goes on from there"
        )
        raise SystemExit(130)  # what shells expect of a command that Ctrl-C ended


if __name__ == "__main__":
    main()
