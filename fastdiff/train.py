"""Trains by a recipe: `python -m fastdiff.train recipes/dit_mnist.yaml --training.max_steps 200`.

A recipe with `task: masked_lm` trains a masked diffusion language model, one with `task: length_head` a head that
tells the length of such a model's answers, one with `task: qgfd` a QGFD diffusion model of text, images, sound, videos
or tables, which it measures at the end; any other a DiT.
Several processes: `accelerate launch --num_processes 2 -m fastdiff.train …` (or torchrun).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiff.cli import command, quiet_libraries
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.kinds import recipe_kind


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.training.trainer import Trainer

    recipe, make_task = _parse(argv)
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
        if recipe_kind(trainer.folder.config) == "qgfd" and recipe.sampling.evaluation_samples:
            from fastdiff import evaluate

            evaluate.main([str(trainer.folder.path)])
    else:
        print(
            f"stopped by a signal after step {outcome.steps}; checkpoint: {outcome.checkpoint}; "
            "the same command with --training.resume true goes on from there"
        )


def _parse(argv: Sequence[str] | None) -> tuple[Any, type]:
    """The recipe and the class of its task."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = arguments[1:] if arguments[:1] == ["--recipe"] else arguments
    path = Path(given[0]) if given and not given[0].startswith("-") else None
    chosen = recipe_kind(path) if path is not None and path.is_file() else "dit"
    if chosen == "masked_lm":
        from fastdiff.training.masked_lm import MaskedLMTask
        from fastdiff.training.masked_lm_recipe import MaskedLMRecipe

        kind, task, what = MaskedLMRecipe, MaskedLMTask, "a masked diffusion language model"
    elif chosen == "length_head":
        from fastdiff.training.length_head import LengthHeadTask
        from fastdiff.training.length_head_recipe import LengthHeadRecipe

        kind, task = LengthHeadRecipe, LengthHeadTask
        what = "a head that tells an answer's length from the states of a finished masked diffusion language model"
    elif chosen == "qgfd":
        from fastdiff.training.qgfd import QGFDTask
        from fastdiff.training.qgfd_recipe import QGFDRecipe

        kind, task = QGFDRecipe, QGFDTask
        what = "a QGFD diffusion model of one modality, or of several over a shared backbone"
    else:
        from fastdiff.training.diffusion import DiffusionTask, DiTRecipe

        kind, task = DiTRecipe, DiffusionTask
        what = "a diffusion transformer, or with a recipe of a language model (task: masked_lm), of a length head "
        what += "(task: length_head) or of a QGFD model (task: qgfd) that one, whose fields its own --help lists"
    about = f"Trains {what}. Every field can be given as an option, for example --training.max_steps 200."
    return parse_recipe(kind, arguments, "train", about), task


if __name__ == "__main__":
    main()
