"""Text to image: a diffusion transformer that reads its prompts, trained if there is none yet; a sheet of samples."""

import sys
from pathlib import Path

import fastdiff
from fastdiff.data import DataConfig
from fastdiff.diffusion import DiffusionConfig
from fastdiff.models import DiTConfig, TextEncoderConfig
from fastdiff.tasks.text_to_image import TextToImageRecipe, TextToImageSamplingConfig, TextToImageTask
from fastdiff.training import Trainer, TrainingConfig
from fastdiff.visualization import save_captioned_grid


def train(run, max_steps=1500, hidden_size=96, depth=4):
    recipe = TextToImageRecipe(
        # cross-attention to the text's tokens; with conditioning="adaln" a Q-Former reads the text instead
        model=DiTConfig(
            input_size=8, patch_size=2, in_channels=1, hidden_size=hidden_size, depth=depth, num_heads=2,
            conditioning="cross_attention", num_classes=0, null_label=False, class_dropout_prob=0.0,
        ),
        text_encoder=TextEncoderConfig(name="one_hot"),  # "smollm2", "minilm" or "gpt2" read any text
        diffusion=DiffusionConfig(prediction_type="flow"),
        data=DataConfig(name="digits"),  # its texts are the names of its classes
        training=TrainingConfig(output_dir=run, max_steps=max_steps, learning_rate=2e-3, ema_decay=0.99),
        sampling=TextToImageSamplingConfig(guidance_scale=2.0, prompts=["0", "3", "7"]),
    )  # fmt: skip
    return Trainer(TextToImageTask(recipe), recipe.training).train()


def main(run="runs/example_text", output="prompts.png", prompts=("3", "7", "9"), num_images=4, **training):
    if not Path(run).exists():
        train(run, **training)
    loaded = fastdiff.load(run)  # or runs/llm2dit, with prompts such as "a photo of a red sneaker"
    images = loaded.sample(prompts, num_images_per_prompt=num_images, seed=0, output_type="pt")
    print(f"{len(images)} images: {save_captioned_grid(images, prompts, output)}")
    return images


if __name__ == "__main__":
    main(*sys.argv[1:3])
