"""`fastdiff.evaluate` on an autoencoder."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.data import DataConfig, ImageData
from fastdiff.data.images import resize
from fastdiff.errors import section
from fastdiff.files import output_path, write_atomically
from fastdiff.tasks.autoencoder.run import AutoencoderRun, load_run
from fastdiff.tasks.options import DataOptions, RunOptions, at_least
from fastdiff.tasks.run import finding_data

if TYPE_CHECKING:
    from fastdiff.evaluation import Classifier

_CLASSIFIED = 32  # pixels at most: a classifier of larger images takes a quarter of an hour to train
_BATCH = 50


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
    from fastdiff.evaluation import load_or_train_classifier
    from fastdiff.evaluation.report import balanced_subset

    run = load_run(path, weights=options.weights, device=options.device)
    if run.recipe is None:
        raise ValueError(f"{path}: got a model without a recipe; expected a run, which names its real images")
    output = output_path(options.output, run.folder.path / "evaluation.json")
    config = run.data_config("data", options.data_path)
    with finding_data(), section("data"):
        data, small = load_data(config), load_data(_classified(config))
    run.check_data({"data": data}, options.accept_changed_data)
    classifier = load_or_train_classifier(small)
    chosen = balanced_subset(data.held_out, options.num_images)
    measures = measured(run, data, chosen, classifier, small.image_shape[1:])
    details = {
        "run": str(run.folder.path), "step": run.step, "weights": options.weights,
        "scaling_factor": run.scaling_factor,
    }  # fmt: skip
    write_atomically(output, json.dumps({**details, **measures}, indent=1) + "\n")
    print(f"{_table(measures)}\n\nstep {run.step}; written to {output}")


def measured(
    run: AutoencoderRun, data: ImageData, indices: Tensor, classifier: "Classifier", classified: tuple[int, int]
) -> dict[str, Any]:
    """What is left of held-out images.

    Args:
        data: the images.
        indices: int64 [N], which of the held-out ones.
        classifier: a classifier of their classes.
        classified: height and width of what it was trained on: originals and reconstructions are resized to that.

    Returns:
        images, psnr in dB and ssim (means over images), class_accuracy_originals, class_accuracy (of reconstructions),
        agreement (share of reconstructions that get the class of their original), classifier_size, compression
        (numbers of an image over those of its latents), latent_deviation, and of each channel of the latents
        latent_means and latent_deviations.

    Raises ValueError for images that are too small for SSIM.
    """
    from tqdm import tqdm

    from fastdiff.evaluation.reconstruction import evaluate_reconstructions as compare

    latents, classes, psnr, ssim = [], [], 0.0, 0.0
    for images, encoded, made in _reconstructed(run, data, tqdm(indices.split(_BATCH), desc="reconstructing")):
        report = compare(made, images)
        psnr, ssim = psnr + report.psnr * len(images), ssim + report.ssim * len(images)
        latents.append(encoded)
        classes.append([_classes(classifier, resize(each, classified)) for each in (images, made)])
    original, reconstruction = (torch.cat(each) for each in zip(*classes, strict=True))
    labels, every = data.held_out.labels[indices], torch.cat(latents).double()
    return {
        "images": len(indices),
        "psnr": psnr / len(indices),
        "ssim": ssim / len(indices),
        "class_accuracy_originals": float((original == labels).double().mean()),
        "class_accuracy": float((reconstruction == labels).double().mean()),
        "agreement": float((reconstruction == original).double().mean()),
        "classifier_size": classified[0],
        "compression": math.prod(data.image_shape) / math.prod(every.shape[1:]),
        "latent_deviation": float(every.std()),
        "latent_means": every.mean(dim=(0, 2, 3)).tolist(),
        "latent_deviations": every.std(dim=(0, 2, 3)).tolist(),
    }


def _reconstructed(run: AutoencoderRun, data: ImageData, parts: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, their latents and what is decoded from these, some at a time."""
    for part in parts:
        images = data.held_out.images(part)
        latents = run.encode(images)
        yield images, latents, run.decode(latents).clamp(-1, 1)


def _classes(classifier: "Classifier", images: Tensor) -> Tensor:
    from fastdiff.evaluation.classifier import CLASS, classify

    return classify(classifier, images)[1][CLASS]


def _table(measures: dict[str, Any]) -> str:
    """The measures as Markdown."""
    size = f"at {measures['classifier_size']} x {measures['classifier_size']}"
    channels = zip(measures["latent_means"], measures["latent_deviations"], strict=True)
    rows = [
        (f"{measures['images']} held-out images", "mean"),
        ("---", "---:"),
        ("PSNR", f"{measures['psnr']:.2f} dB"),
        ("SSIM", f"{measures['ssim']:.4f}"),
        (f"class accuracy of originals, {size}", f"{measures['class_accuracy_originals']:.1%}"),
        (f"class accuracy of reconstructions, {size}", f"{measures['class_accuracy']:.1%}"),
        ("reconstructions in their original's class", f"{measures['agreement']:.1%}"),
        ("compression (numbers of an image / of its latents)", f"{measures['compression']:g}"),
        ("latents: deviation", f"{measures['latent_deviation']:.3f}"),
        ("latents: mean ± deviation by channel", ", ".join(f"{m:.2f} ± {d:.2f}" for m, d in channels)),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _classified(config: DataConfig) -> DataConfig:
    """The same images as the classifier sees them: as the data set has them, of 32 pixels at most."""
    return dataclasses.replace(config, resize=None, image_size=min(config.image_size, _CLASSIFIED))
