"""How good samples are, by a small classifier trained on the real images and by distances to them."""

from fastdiff.evaluation.classifier import Classifier, load_or_train_classifier
from fastdiff.evaluation.metrics import frechet_distance, nearest_neighbour_distances
from fastdiff.evaluation.report import Report, Scores, evaluate_samples

__all__ = [
    "Classifier",
    "Report",
    "Scores",
    "evaluate_samples",
    "frechet_distance",
    "load_or_train_classifier",
    "nearest_neighbour_distances",
]
