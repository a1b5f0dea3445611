"""Scores the samples of a run beside real held-out images: `python -m fastdiff.evaluate runs/x`."""

import json
from collections.abc import Sequence

import torch

from fastdiff.cli import command, output_path, quiet_libraries, run_parser, sampling_options


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.data import load_data
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier
    from fastdiff.training.runs import load_run

    parser = run_parser(
        "evaluate",
        "Scores samples: class accuracy and Fréchet distance under a small classifier that "
        "is trained once on the real images and cached, and distance to the nearest training image; "
        "beside them the same numbers of real held-out images.",
    )
    parser.add_argument("--num-samples", type=int, default=500, help="samples, spread evenly over the classes")
    parser.add_argument("--output", type=str | None, help="of the JSON; default: evaluation.json in the run's folder")
    arguments = parser.parse_args(argv)
    if arguments.num_samples < 2:
        raise ValueError(f"--num-samples is {arguments.num_samples}; expected at least 2")
    quiet_libraries()
    run = load_run(arguments.run, weights=arguments.weights, device=arguments.device)
    output = output_path(arguments.output, run.folder.path / "evaluation.json")
    data = load_data(run.recipe.data)
    classifier = load_or_train_classifier(data)
    sampling = sampling_options(arguments, run.recipe.sampling)
    labels = torch.arange(arguments.num_samples) % len(run.class_names)
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
    output.write_text(json.dumps({**details, **report.to_dict()}, indent=1) + "\n")
    print(f"{report.to_markdown()}\n\nstep {run.step}, guidance {sampling.guidance_scale:g}; written to {output}")


if __name__ == "__main__":
    main()
