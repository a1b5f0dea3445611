"""The report on a run's samples: their scores beside those of real images that were held out of training."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import ImageData, ImageSet
from fastdiff.evaluation.classifier import CLASS, Classifier, classify
from fastdiff.evaluation.metrics import frechet_distance, nearest_images

FRECHET = "Fréchet distance (classifier features)"


@dataclass(frozen=True)
class Scores:
    """What is measured of one set of images.

    Attributes:
        images: how many.
        class_accuracy: share that the classifier takes for the class of their label.
        accuracy_by_class: the same, class by class.
        frechet_distance: Fréchet distance to the real training images, in the classifier's features.
        nearest_neighbour_median: median of the pixel distances to the nearest training image.
        nearest_neighbour_minimum: minimum of these distances.
    """

    images: int
    class_accuracy: float
    accuracy_by_class: dict[str, float]
    frechet_distance: float
    nearest_neighbour_median: float
    nearest_neighbour_minimum: float


@dataclass(frozen=True)
class Report:
    """Scores of samples, and of as many real held-out images (of all of them, where there are fewer)."""

    samples: Scores
    held_out: Scores

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        rows = [
            ("", "samples", "real held-out"),
            ("---", "---:", "---:"),
            ("images", *self._pair("images", "d")),
            ("class accuracy", *self._pair("class_accuracy", ".1%")),
            *(
                (
                    f"class accuracy, {name}",
                    f"{self.samples.accuracy_by_class[name]:.1%}",
                    f"{self.held_out.accuracy_by_class.get(name, float('nan')):.1%}",
                )
                for name in self.samples.accuracy_by_class
            ),
            (FRECHET, *self._pair("frechet_distance", ".3f")),
            ("nearest training image, median pixel distance", *self._pair("nearest_neighbour_median", ".2f")),
            ("nearest training image, smallest", *self._pair("nearest_neighbour_minimum", ".2f")),
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def _pair(self, name: str, form: str) -> tuple[str, str]:
        return format(getattr(self.samples, name), form), format(getattr(self.held_out, name), form)


def evaluate_samples(samples: Tensor, labels: Tensor, data: ImageData, classifier: Classifier) -> Report:
    """Scores samples beside real held-out images.

    Args:
        samples: [N, C, H, W] in [-1, 1] (clipped to it).
        labels: [N] the classes asked for.
        data: real images.
        classifier: a classifier of this data set.

    Raises:
        ValueError: fewer than 2 samples, or shapes that do not fit the data.
    """
    if len(samples) < 2 or tuple(samples.shape[1:]) != tuple(data.image_shape) or len(labels) != len(samples):
        raise ValueError(
            f"samples: got shape {tuple(samples.shape)} and labels {tuple(labels.shape)}; expected [N, "
            f"{', '.join(map(str, data.image_shape))}] with N >= 2, and [N]"
        )
    reference, _ = classify(classifier, data.train)
    chosen = balanced_subset(data.held_out, len(samples))
    real, real_labels = data.held_out.images(chosen), data.held_out.labels[chosen]
    return Report(
        samples=_score(samples.clamp(-1, 1), labels, data, classifier, reference),
        held_out=_score(real, real_labels, data, classifier, reference),
    )


def balanced_subset(images: ImageSet, count: int) -> Tensor:
    """Indices of `count` images (or all), spread evenly over the classes; the first ones of each class."""
    classes = images.labels.unique().tolist()
    order = [torch.nonzero(images.labels == label).flatten() for label in classes]
    ranks = torch.cat([torch.arange(len(members)) for members in order])
    return torch.cat(order)[torch.argsort(ranks, stable=True)][:count]


def _score(images: Tensor, labels: Tensor, data: ImageData, classifier: Classifier, reference: Tensor) -> Scores:
    features, predicted = classify(classifier, images)
    correct = (predicted[CLASS] == labels.cpu()).double()
    _, nearest = nearest_images(images, data.train)
    by_class = {
        data.class_names[label]: float(correct[labels.cpu() == label].mean()) for label in labels.unique().tolist()
    }
    return Scores(
        len(images),
        float(correct.mean()),
        by_class,
        frechet_distance(features, reference),
        float(nearest.median()),
        float(nearest.min()),
    )
