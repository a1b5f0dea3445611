"""Trains a DiT by a recipe: `python -m fastdiff.train recipes/dit_mnist.yaml --training.max_steps 200`.

Several processes: `accelerate launch --num_processes 2 -m fastdiff.train …` (or torchrun).
"""

from collections.abc import Sequence

from fastdiff.cli import command, parse_recipe, quiet_libraries


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.training.diffusion import DiffusionTask, DiTRecipe
    from fastdiff.training.trainer import Trainer

    recipe = parse_recipe(
        DiTRecipe,
        argv,
        "train",
        "Trains a diffusion transformer; every field can be given as an option, for example --training.max_steps 200.",
    )
    quiet_libraries()
    trainer = Trainer(DiffusionTask(recipe), recipe.training)
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
            f"trained {outcome.steps} steps ({outcome.samples_per_second:.0f} images/s); "
            f"checkpoint: {outcome.checkpoint}; pictures: {trainer.folder.samples_picture}, "
            f"{trainer.folder.loss_picture}"
        )
    else:
        print(
            f"stopped by a signal after step {outcome.steps}; checkpoint: {outcome.checkpoint}; "
            "the same command with --training.resume true goes on from there"
        )


if __name__ == "__main__":
    main()
