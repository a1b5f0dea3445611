"""Do samples show what was asked for? Accuracy by attribute, of combinations that were trained on and of others."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.data import CaptionedData
from fastdiff.evaluation.classifier import Classifier, classify


@dataclass(frozen=True)
class AttributeAccuracy:
    """What a classifier finds in a group of images.

    Attributes:
        images: how many.
        accuracy: share that shows the value asked for (that real images have), by attribute; {} of no images.
        all: share that shows all of them; NaN of no images.
    """

    images: int
    accuracy: dict[str, float]
    all: float


@dataclass(frozen=True)
class AttributeReport:
    """Accuracies of samples, and of real held-out images, under the same classifier.

    Attributes:
        samples_seen, samples_unseen: samples of combinations that were trained on, and of those that never were.
        held_out_seen, held_out_unseen: real held-out images of such combinations. Where the classifier never saw the
            unseen ones (no `CaptionedData.every_combination`), it tells less of them, and these accuracies show it.
    """

    samples_seen: AttributeAccuracy
    samples_unseen: AttributeAccuracy
    held_out_seen: AttributeAccuracy
    held_out_unseen: AttributeAccuracy

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: `all` of a group without images is None."""
        return {name: group | ({} if group["images"] else {"all": None}) for name, group in asdict(self).items()}

    def to_markdown(self) -> str:
        """As a table: a row an attribute, with columns for those groups that have images."""
        labels = {
            "samples_seen": "samples, seen", "held_out_seen": "real, seen",
            "samples_unseen": "samples, unseen", "held_out_unseen": "real, unseen",
        }  # fmt: skip
        groups = {label: getattr(self, name) for name, label in labels.items() if getattr(self, name).images}
        rows = [["combinations", *groups], ["---", *["---:"] * len(groups)]]
        rows.append(["images", *(str(group.images) for group in groups.values())])
        for name in next(iter(groups.values())).accuracy:
            rows.append([f"{name} accuracy", *(f"{group.accuracy[name]:.1%}" for group in groups.values())])
        rows.append(["all of them", *(f"{group.all:.1%}" for group in groups.values())])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def evaluate_attributes(
    samples: Tensor,
    wanted: Mapping[str, Tensor],
    data: CaptionedData,
    classifier: Classifier,
    *,
    num_held_out: int = 2000,
) -> AttributeReport:
    """Classifies samples and real held-out images.

    Args:
        samples: [N, C, H, W] in [-1, 1] (clipped to it).
        wanted: int [N] by attribute, what was asked for. A combination is seen if images to train on have these values
            of these attributes together.
        data: real images.
        classifier: a classifier of this data set.
        num_held_out: so many held-out images, spread evenly over all, are classified at most.

    Raises:
        ValueError: no samples, shapes that do not fit the data, or an attribute that it has not.
    """
    unknown = [name for name in wanted if name not in data.attributes or name not in classifier.num_values]
    if unknown or not wanted:
        known = ", ".join(data.attributes) or "none"
        raise ValueError(f"wanted: got {', '.join(unknown) or 'no attribute'}; expected of {known}")
    shapes = {name: tuple(values.shape) for name, values in wanted.items()}
    if not len(samples) or tuple(samples.shape[1:]) != data.image_shape or set(shapes.values()) != {(len(samples),)}:
        raise ValueError(
            f"samples: got shape {tuple(samples.shape)} and values of {shapes}; expected "
            f"[N, {', '.join(map(str, data.image_shape))}] with N >= 1, and [N]"
        )
    _, found = classify(classifier, samples.clamp(-1, 1))
    count = min(num_held_out, len(data.held_out))
    chosen = torch.arange(count) * len(data.held_out) // count
    _, found_in_real = classify(classifier, data.held_out, chosen)
    real = {name: data.attributes[name].held_out[chosen] for name in wanted}
    asked = {name: values.cpu() for name, values in wanted.items()}
    seen, real_seen = data.trained_on(asked), data.trained_on(real)
    return AttributeReport(
        _accuracy(asked, found, seen),
        _accuracy(asked, found, ~seen),
        _accuracy(real, found_in_real, real_seen),
        _accuracy(real, found_in_real, ~real_seen),
    )


def _accuracy(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], group: Tensor) -> AttributeAccuracy:
    if not bool(group.any()):
        return AttributeAccuracy(0, {}, float("nan"))
    right = {name: (found[name] == values)[group] for name, values in wanted.items()}
    accuracy = {name: float(each.double().mean()) for name, each in right.items()}
    return AttributeAccuracy(
        int(group.sum()), accuracy, float(torch.stack(list(right.values())).all(0).double().mean())
    )
