"""`python -m fastdiff.evaluate` on a run of a diffusion transformer."""

import json
from typing import Any

import torch

from fastdiff.cli import sampling_options
from fastdiff.files import output_path, write_atomically

DEFAULT_SAMPLES = 500


def evaluate_images(arguments: Any) -> None:
    """Scores samples of a run beside real held-out images; prints a table and writes JSON."""
    from fastdiff.data import load_data
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier
    from fastdiff.training.runs import load_run

    num_samples = DEFAULT_SAMPLES if arguments.num_samples is None else arguments.num_samples
    if num_samples < 2:
        raise ValueError(f"--num-samples is {num_samples}; expected at least 2")
    run = load_run(arguments.run, weights=arguments.weights, device=arguments.device)
    output = output_path(arguments.output, run.folder.path / "evaluation.json")
    data = load_data(run.recipe.data)
    classifier = load_or_train_classifier(data)
    sampling = sampling_options(arguments, run.recipe.sampling)
    labels = torch.arange(num_samples) % len(run.class_names)
    report = evaluate_samples(run.draw(labels, sampling, progress=True), labels, data, classifier)
    details = {
        "run": str(run.folder.path),
        "step": run.step,
        "weights": arguments.weights,
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        "sampler": sampling.sampler,
        "seed": sampling.seed,
    }
    write_atomically(output, json.dumps({**details, **report.to_dict()}, indent=1) + "\n")
    print(f"{report.to_markdown()}\n\nstep {run.step}, guidance {sampling.guidance_scale:g}; written to {output}")
