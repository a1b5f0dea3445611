"""Draws samples of a run: `python -m fastdiff.sample runs/x --labels 0,3,7 --guidance-scale 2`."""

from collections.abc import Sequence

import torch

from fastdiff.cli import command, output_path, quiet_libraries, run_parser, sampling_options


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.training.runs import load_run
    from fastdiff.visualization import save_sample_grid

    parser = run_parser("sample", "Draws samples of a run as a labelled grid (PNG).")
    parser.add_argument("--labels", type=str | None, help="labels or class names, with commas; default: every class")
    parser.add_argument("--images-per-label", type=int, default=8, help="samples of each label")
    parser.add_argument("--output", type=str | None, help="of the PNG; default: samples-seed-N.png in the run's folder")
    arguments = parser.parse_args(argv)
    if arguments.images_per_label < 1:
        raise ValueError(f"--images-per-label is {arguments.images_per_label}; expected at least 1")
    quiet_libraries()
    run = load_run(arguments.run, weights=arguments.weights, device=arguments.device)
    sampling = sampling_options(arguments, run.recipe.sampling)
    labels = torch.tensor(run.labels(arguments.labels)).repeat_interleave(arguments.images_per_label)
    output = output_path(arguments.output, run.folder.path / f"samples-seed-{sampling.seed}.png")
    images = run.draw(labels, sampling, progress=True)
    title = f"step {run.step}, guidance {sampling.guidance_scale:g}, {sampling.num_inference_steps} steps"
    print(save_sample_grid(images, labels, run.class_names, output, title=title))


if __name__ == "__main__":
    main()
