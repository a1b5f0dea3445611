"""Distances between sets of images."""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fastdiff.data import ImageSet


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between two sets of features, each taken as a normal distribution.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), in float64 (Dowson & Landau, 1982), computed by torchmetrics. It depends on
    the features and on the numbers of images: compare values only where both are the same. In the features of
    fastdiff's small classifiers it is not FID, though the class of torchmetrics bears that name.

    Args:
        features, reference: [N, F] and [M, F], N and M at least 2.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features: got shape {tuple(features.shape)} and reference {tuple(reference.shape)}; expected "
            "[N, F] and [M, F]"
        )
    if len(features) < 2 or len(reference) < 2:
        raise ValueError(
            f"features: got {len(features)} and {len(reference)} of reference; expected at least 2 of each"
        )
    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


class _Given(nn.Module):
    """In place of torchmetrics' Inception network: the features are given."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def nearest_images(images: Tensor, reference: Tensor | ImageSet, chunk: int = 5000) -> tuple[Tensor, Tensor]:
    """The nearest image of `reference` to each image, by the Euclidean distance of their pixels.

    Args:
        images: [N, C, H, W] in [-1, 1].
        reference: [M, C, H, W], or a set of such images; M at least 1.
        chunk: images of `reference` taken at once.

    Returns:
        Its index, int64 [N], and its distance, float32 [N].
    """
    queries = images.float().flatten(1)
    found, nearest = torch.zeros(len(images), dtype=torch.long), torch.full((len(images),), float("inf"))
    for indices in torch.arange(len(reference)).split(chunk):
        part = reference[indices].float() if isinstance(reference, Tensor) else reference.images(indices)
        distances, places = torch.cdist(queries, part.flatten(1)).min(dim=1)
        closer = distances < nearest
        nearest, found = torch.where(closer, distances, nearest), torch.where(closer, indices[places], found)
    return found, nearest


def nearest_neighbour_distances(images: Tensor, reference: Tensor, chunk: int = 5000) -> Tensor:
    """The distances [N] of `nearest_images`."""
    return nearest_images(images, reference, chunk)[1]
