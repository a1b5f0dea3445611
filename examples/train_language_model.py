"""Train a small masked diffusion language model: numbers to English words. The examples of text below load it."""

import sys
from pathlib import Path

import fastdiff
from fastdiff.data import TextDataConfig, TokenizerConfig
from fastdiff.tasks.masked_lm import (
    LanguageModelConfig,
    MaskedLMRecipe,
    MaskedLMTask,
    ObjectiveConfig,
    TextSamplingConfig,
)
from fastdiff.training import Trainer, TrainingConfig


def main(output_dir: str = "runs/example_numbers", max_steps: int = 1000, hidden_size: int = 128):
    """Returns the run in `output_dir`, and trains it first where there is none."""
    if Path(output_dir).exists():
        return fastdiff.load(output_dir)
    recipe = MaskedLMRecipe(
        model=LanguageModelConfig(
            hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=4, position_embedding="rope"
        ),
        # Nearly whole words. The windows have random lengths, so that decoding may crop them (predict_length.py).
        tokenizer=TokenizerConfig(vocab_size=326),
        data=TextDataConfig(
            name="numbers",
            sample="pairs",
            max_digits=4,
            num_pairs=4000,
            held_out_fraction=0.1,
            min_length=12,
            max_length=32,
        ),  # fmt: skip
        # A share of the answers is masked wholly: that is what the first step of decoding sees.
        objective=ObjectiveConfig(normalizer="masked_tokens", fully_masked_fraction=0.2),
        training=TrainingConfig(
            output_dir=output_dir, max_steps=max_steps, batch_size=64, learning_rate=2e-3, ema_decay=0.99
        ),
        sampling=TextSamplingConfig(generation={"max_new_tokens": 32}),
    )
    Trainer(MaskedLMTask(recipe), recipe.training).train()
    return fastdiff.load(output_dir)


if __name__ == "__main__":
    run = main(*sys.argv[1:2])
    print(run.generate(["7", "4096", "9999"]))
