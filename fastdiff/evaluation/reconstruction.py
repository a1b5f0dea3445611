"""How near reconstructions come to their originals: PSNR and SSIM of each, and what a classifier makes of both."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from fastdiff.evaluation.classifier import CLASS, Classifier, classify

_RANGE = 2.0  # of images in [-1, 1]
_WINDOW = 11  # pixels of SSIM's Gaussian window: smaller images have none


@dataclass(frozen=True)
class ReconstructionReport:
    """Measures of reconstructions, each a mean over images.

    Attributes:
        images: how many.
        psnr: peak signal-to-noise ratio in dB.
        ssim: structural similarity (Wang et al. 2004), 1 for the same image.
        class_accuracy_originals, class_accuracy: share that a classifier takes for the class of their label, of the
            originals and of the reconstructions; None without a classifier.
    """

    images: int
    psnr: float
    ssim: float
    class_accuracy_originals: float | None = None
    class_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        rows = [
            (f"{self.images} reconstructions", "mean"),
            ("---", "---:"),
            ("PSNR", f"{self.psnr:.2f} dB"),
            ("SSIM", f"{self.ssim:.4f}"),
        ]
        if self.class_accuracy is not None:
            rows += [
                ("class accuracy", f"{self.class_accuracy:.1%}"),
                ("class accuracy of the originals", f"{self.class_accuracy_originals:.1%}"),
            ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def evaluate_reconstructions(
    reconstructions: Tensor, originals: Tensor, *, labels: Tensor | None = None, classifier: Classifier | None = None
) -> ReconstructionReport:
    """Measures reconstructions.

    Args:
        reconstructions, originals: [N, C, H, W] in [-1, 1] (clipped to it), at least 11x11.
        labels: int [N], the originals' classes; with `classifier` alone.
        classifier: a classifier of the data set.

    Raises:
        ValueError: shapes that do not fit, no images, smaller ones, or one of labels and classifier without the other.
    """
    if reconstructions.shape != originals.shape or originals.ndim != 4 or not len(originals):
        raise ValueError(
            f"reconstructions: got shape {tuple(reconstructions.shape)} and originals {tuple(originals.shape)}; "
            "expected the same [N, C, H, W] with N >= 1"
        )
    if min(originals.shape[2:]) < _WINDOW:
        raise ValueError(
            f"originals: got images of {tuple(originals.shape[2:])}; SSIM needs at least {_WINDOW}x{_WINDOW}"
        )
    if (labels is None) != (classifier is None):
        raise ValueError("labels: got one of labels and classifier; expected both or none")
    made, given = (images.float().clamp(-1, 1) for images in (reconstructions, originals))
    same = (made == given).flatten(1).all(dim=1)
    psnr = peak_signal_noise_ratio(made, given, data_range=_RANGE, reduction="none", dim=(1, 2, 3))
    psnr = torch.where(same, torch.inf, psnr)
    ssim = structural_similarity_index_measure(made, given, data_range=_RANGE, reduction="none")
    accuracy = [None, None]
    if classifier is not None:
        found = [classify(classifier, images)[1][CLASS] for images in (given, made)]
        accuracy = [float((each == labels.cpu()).double().mean()) for each in found]
    return ReconstructionReport(len(originals), float(psnr.mean()), float(ssim.mean()), *accuracy)
