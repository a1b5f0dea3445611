"""How well an autoencoder keeps images: pixels, structure, and what a classifier sees in them."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from tqdm import tqdm

from fastdiff.data import ImageData
from fastdiff.data.images import resize
from fastdiff.evaluation.classifier import CLASS, Classifier, classify

RANGE = 2.0  # of images, -1 … 1


@dataclass(frozen=True)
class ReconstructionReport:
    """Measures of held-out images and of what is decoded from their latents.

    Attributes:
        images: how many.
        psnr: peak signal-to-noise ratio in dB, of the mean squared error over all of them.
        ssim: structural similarity (Wang et al., 2004), Gaussian window of 11 pixels; 1 is the same image.
        original_accuracy: share of originals that the classifier takes for the class of their label.
        reconstruction_accuracy: the same of their reconstructions.
        agreement: share of reconstructions that get the class of their original.
        classifier_size: edge in pixels of what the classifier sees; images are resized to it.
        compression: numbers of an image over numbers of its latents.
        latent_deviation: deviation of the latents.
        latent_means: mean of each channel of the latents.
        latent_deviations: deviation of each channel of the latents.
    """

    images: int
    psnr: float
    ssim: float
    original_accuracy: float
    reconstruction_accuracy: float
    agreement: float
    classifier_size: int
    compression: float
    latent_deviation: float
    latent_means: list[float]
    latent_deviations: list[float]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        size = self.classifier_size
        channels = zip(self.latent_means, self.latent_deviations, strict=True)
        rows = [
            ("", "held-out images"),
            ("---", "---:"),
            ("images", f"{self.images}"),
            ("PSNR", f"{self.psnr:.2f} dB"),
            ("SSIM", f"{self.ssim:.4f}"),
            (f"class accuracy of originals, at {size} x {size}", f"{self.original_accuracy:.1%}"),
            (f"class accuracy of reconstructions, at {size} x {size}", f"{self.reconstruction_accuracy:.1%}"),
            ("reconstructions in their original's class", f"{self.agreement:.1%}"),
            ("compression (numbers of image / of latents)", f"{self.compression:g}"),
            ("latents: deviation", f"{self.latent_deviation:.3f}"),
            ("latents: mean ± deviation by channel", ", ".join(f"{m:.2f} ± {d:.2f}" for m, d in channels)),
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def evaluate_reconstructions(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    data: ImageData,
    indices: Tensor,
    classifier: Classifier,
    classifier_size: int,
    *,
    batch_size: int = 50,
    progress: bool = False,
) -> ReconstructionReport:
    """Measures what is left of held-out images after encoding and decoding.

    Args:
        encode: images [n, C, H, W] in -1 … 1 → latents [n, c, h, w].
        decode: latents → images.
        data: the images.
        indices: int64 [N], which of the held-out ones.
        classifier: a classifier of their classes.
        classifier_size: edge in pixels of what it was trained on.

    Raises:
        ValueError: no indices, or images that are too small for SSIM's window (6 pixels).
    """
    if not len(indices):
        raise ValueError("indices: got none; expected at least one image")
    if min(data.image_shape[1:]) < 6:
        raise ValueError(f"data: got images of {data.image_shape[1:]}; expected at least 6 x 6 pixels, as SSIM needs")
    psnr = PeakSignalNoiseRatio(data_range=(-RANGE / 2, RANGE / 2))
    ssim = StructuralSimilarityIndexMeasure(data_range=(-RANGE / 2, RANGE / 2))
    size, latents, classes = (classifier_size, classifier_size), [], []
    for part in tqdm(indices.split(batch_size), desc="reconstructing", unit="batch", disable=not progress):
        images = data.held_out.images(part)
        latents.append(encode(images))
        made = decode(latents[-1]).clamp(-1, 1)
        psnr.update(made, images)
        ssim.update(made, images)
        classes.append(torch.stack([classify(classifier, resize(each, size))[1][CLASS] for each in (images, made)]))
    labels, (original, reconstruction) = data.held_out.labels[indices], torch.cat(classes, dim=1)
    every = torch.cat(latents).double()
    return ReconstructionReport(
        images=len(indices),
        psnr=float(psnr.compute()),
        ssim=float(ssim.compute()),
        original_accuracy=float((original == labels).double().mean()),
        reconstruction_accuracy=float((reconstruction == labels).double().mean()),
        agreement=float((reconstruction == original).double().mean()),
        classifier_size=classifier_size,
        compression=math.prod(data.image_shape) / math.prod(every.shape[1:]),
        latent_deviation=float(every.std()),
        latent_means=every.mean(dim=(0, 2, 3)).tolist(),
        latent_deviations=every.std(dim=(0, 2, 3)).tolist(),
    )
