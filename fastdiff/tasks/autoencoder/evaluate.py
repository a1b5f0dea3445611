"""`fastdiff.evaluate` on an autoencoder."""

import dataclasses
import json
from dataclasses import dataclass

from fastdiff.data import DataConfig
from fastdiff.errors import section
from fastdiff.files import output_path, write_atomically
from fastdiff.tasks.autoencoder.run import load_run
from fastdiff.tasks.options import DataOptions, RunOptions, at_least
from fastdiff.tasks.run import finding_data

_CLASSIFIED = 32  # pixels at most: a classifier of larger images takes a quarter of an hour to train


@dataclass
class EvaluateOptions(DataOptions, RunOptions):
    """Measures what is left of held-out images in the latents: PSNR and SSIM of reconstructions, and the accuracy of a
    small classifier on them beside that on the originals. The classifier is trained once on the real images, at their
    own size or 32 pixels, and cached.

    Attributes:
        num_images: number of held-out images, spread evenly over the classes
        output: path of the JSON; default: evaluation.json in the run's folder
    """

    num_images: int = 2000
    output: str | None = None

    def __post_init__(self):
        at_least("num_images", self.num_images, 1)


def evaluate_reconstructions(path: str, options: EvaluateOptions) -> None:
    """Measures a run on its held-out images; prints a table and writes JSON."""
    from fastdiff.data import load_data
    from fastdiff.evaluation.autoencoding import evaluate_reconstructions as measure
    from fastdiff.evaluation.classifier import load_or_train_classifier
    from fastdiff.evaluation.report import balanced_subset

    run = load_run(path, weights=options.weights, device=options.device)
    if run.recipe is None:
        raise ValueError(f"{path}: got a model without a recipe; expected a run, which names its real images")
    output = output_path(options.output, run.folder.path / "evaluation.json")
    config = run.data_config("data", options.data_path)
    with finding_data(), section("data"):
        data, small = load_data(config), load_data(_classified(config))
    run.check_data({"data": data}, options.accept_changed_data)
    report = measure(
        run.encode,
        run.decode,
        data,
        balanced_subset(data.held_out, options.num_images),
        load_or_train_classifier(small),
        small.image_shape[-1],
        progress=True,
    )
    details = {
        "run": str(run.folder.path), "step": run.step, "weights": options.weights,
        "scaling_factor": run.scaling_factor,
    }  # fmt: skip
    write_atomically(output, json.dumps({**details, **report.to_dict()}, indent=1) + "\n")
    print(f"{report.to_markdown()}\n\nstep {run.step}; written to {output}")


def _classified(config: DataConfig) -> DataConfig:
    """The same images as the classifier sees them: as the data set has them, of 32 pixels at most."""
    return dataclasses.replace(config, resize=None, image_size=min(config.image_size, _CLASSIFIED))
