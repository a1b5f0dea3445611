"""Train from Python: a DiT on handwritten digits, as `fastdiff train` would, without a YAML file."""

import sys

from fastdiff.data import DataConfig
from fastdiff.diffusion import DiffusionConfig
from fastdiff.models import DiTConfig
from fastdiff.tasks.dit import DiTRecipe, DiTTask
from fastdiff.training import Trainer, TrainingConfig


def main(output_dir="runs/example_digits", max_steps=1000, hidden_size=96, depth=4):
    recipe = DiTRecipe(
        model=DiTConfig(
            input_size=8, patch_size=2, in_channels=1, num_classes=10, hidden_size=hidden_size, depth=depth, num_heads=2
        ),
        diffusion=DiffusionConfig(prediction_type="flow", noise_levels="logit_normal"),
        data=DataConfig(name="digits"),  # 1 797 images of 8 x 8 pixels, which come with scikit-learn
        # resume goes on from the newest checkpoint of output_dir, if there is one: run it again after Ctrl-C
        training=TrainingConfig(
            output_dir=output_dir, max_steps=max_steps, learning_rate=2e-3, ema_decay=0.99, resume=True
        ),
    )
    outcome = Trainer(DiTTask(recipe), recipe.training).train()
    print(f"{outcome.steps} steps; checkpoint {outcome.checkpoint}; loss.png and samples.png in {output_dir}")
    return outcome


if __name__ == "__main__":
    main(*sys.argv[1:2])
