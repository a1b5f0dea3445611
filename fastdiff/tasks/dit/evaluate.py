"""`fastdiff.evaluate` on a diffusion transformer."""

import json
from dataclasses import dataclass

import torch

from fastdiff.errors import section
from fastdiff.files import output_path, write_atomically
from fastdiff.tasks.dit.run import load_run
from fastdiff.tasks.options import DataOptions, SamplingOptions, at_least
from fastdiff.tasks.run import finding_data


@dataclass
class EvaluateOptions(DataOptions, SamplingOptions):
    """Scores samples: class accuracy and Fréchet distance under a small classifier, which is trained once on the real
    images and cached, and the distance to the nearest training image; beside them the same numbers of real held-out
    images.

    Attributes:
        guidance_channels: guides this many of the first channels only (3 in facebookresearch/DiT)
        num_samples: number of samples, spread evenly over the classes
        output: path of the JSON; default: evaluation.json in the run's folder
    """

    guidance_channels: int | None = None
    num_samples: int = 500
    output: str | None = None

    def __post_init__(self):
        at_least("num_samples", self.num_samples, 2)


def evaluate_images(path: str, options: EvaluateOptions) -> None:
    """Scores samples of a run beside real held-out images; prints a table and writes JSON."""
    from fastdiff.data import load_data
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier

    run = load_run(path, weights=options.weights, device=options.device)
    if run.recipe is None:
        raise ValueError(f"{path}: got a model without a recipe; expected a run, which names its real images")
    output = output_path(options.output, run.folder.path / "evaluation.json")
    with finding_data(), section("data"):
        data = load_data(run.data_config("data", options.data_path))
    run.check_data({"data": data}, options.accept_changed_data)
    classifier = load_or_train_classifier(data)
    sampling = options.applied_to(run.sampling)
    labels = torch.arange(options.num_samples) % len(run.class_names)
    report = evaluate_samples(run.draw(labels, sampling, progress=True), labels, data, classifier)
    details = {
        "run": str(run.folder.path),
        "step": run.step,
        "weights": options.weights,
        "guidance_scale": sampling.guidance_scale,
        "guidance_channels": sampling.guidance_channels,
        "num_inference_steps": sampling.num_inference_steps,
        "seed": sampling.seed,
        **sampling.options(),
    }
    write_atomically(output, json.dumps({**details, **report.to_dict()}, indent=1) + "\n")
    print(f"{report.to_markdown()}\n\nstep {run.step}, guidance {sampling.guidance_scale:g}; written to {output}")
