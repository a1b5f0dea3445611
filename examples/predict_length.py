"""Predict how long answers will be, from one forward pass, and decode no more than that."""

import sys

import torch
import train_language_model

from fastdiff.data import load_text_data
from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.length import LengthPredictor, calibrate


def main(run="runs/example_numbers", coverage=0.95, num_pairs=200, window=32, **training):
    loaded = train_language_model.main(run, **training)
    model, tokenizer = loaded.model, loaded.tokenizer
    # Pairs of (prompt ids, answer ids) that the model was not trained on; your own would do as well.
    held_out = load_text_data(loaded.recipe.data, loaded.recipe.tokenizer).held_out
    documents = [(held_out.conditions.document(i), held_out.targets.document(i)) for i in range(num_pairs)]
    pairs = [(prompt.tolist(), answer.tolist()) for prompt, answer in documents]
    half = num_pairs // 2

    # The first half says how far the model can be trusted: at least `coverage` of new answers fit into their bounds.
    calibration = calibrate(LengthPredictor(model, window=window), pairs[:half], coverage, tokenizer=tokenizer)
    predictor = LengthPredictor(model, window=window, calibration=calibration, coverage=coverage)
    prompts = tokenizer.pad({"input_ids": [prompt for prompt, _ in pairs[half:]]}, return_tensors="pt")
    ids, mask = (tensor.to(model.device) for tensor in (prompts["input_ids"], prompts["attention_mask"]))
    bounds, lengths = torch.tensor(predictor(ids, mask).bounds), torch.tensor([len(a) for _, a in pairs[half:]])
    covered = (bounds >= lengths).float().mean().item()
    print(f"{covered:.0%} of {len(lengths)} answers fit; mean length {lengths.float().mean():.1f}, "
          f"mean bound {bounds.float().mean():.1f}, window {window}")  # fmt: skip

    for length in ("fixed", "auto"):
        config = MaskedDiffusionGenerationConfig(
            max_new_tokens=window, block_length=8, length=length, coverage=coverage
        )
        given = predictor if length == "auto" else None
        done = generate(model, ids[:8], mask[:8], config, length_predictor=given).statistics
        print(f"{length:5}: {done.forward_passes} passes, {done.tokens} tokens chosen, {done.saved_tokens} saved")
    return covered, done


if __name__ == "__main__":
    main(*sys.argv[1:2])
