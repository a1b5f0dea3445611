"""`fastdiff.sample` on a diffusion transformer."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.files import output_path
from fastdiff.tasks.dit.run import load_run
from fastdiff.tasks.options import SamplingOptions, at_least
from fastdiff.tasks.results import AsTheyCome, results_folder


@dataclass
class SampleOptions(SamplingOptions):
    """Draws a labelled grid of samples (PNG); finished ones are in it while others are drawn.

    Attributes:
        guidance_channels: guides this many of the first channels only (3 in facebookresearch/DiT)
        labels: labels or class names, with commas; default: every class
        images_per_label: number of images for each label
        output: path of the PNG; default: samples-seed-N.png in the folder of the run or saved model
            (of a model on the hub: in the current folder)
    """

    guidance_channels: int | None = None
    labels: str | None = None
    images_per_label: int = 8
    output: str | None = None

    def __post_init__(self):
        at_least("images_per_label", self.images_per_label, 1)


def sample_images(path: str, options: SampleOptions) -> None:
    """Draws samples, writes the grid and prints its path."""
    from fastdiff.visualization import save_sample_grid

    run = load_run(path, weights=options.weights, device=options.device)
    run.check_pictures()
    sampling = options.applied_to(run.sampling)
    labels = torch.tensor(run.labels(options.labels)).repeat_interleave(options.images_per_label)
    output = output_path(options.output, results_folder(path, run.folder) / f"samples-seed-{sampling.seed}.png")
    title = sampling.described(run.step)

    def write(drawn: torch.Tensor) -> Path:
        so_far = "" if len(drawn) == len(labels) else f", {len(drawn)} of {len(labels)} samples"
        images = run.decoded(drawn)
        return save_sample_grid(images, labels[: len(drawn)], run.class_names, output, title=title + so_far)

    print(write(run.draw(labels, sampling, progress=True, keep=AsTheyCome(write))))
