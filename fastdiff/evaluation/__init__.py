"""How good samples are, by models trained on real examples and by distances to them."""

from fastdiff.evaluation.classifier import Classifier, load_or_train_classifier
from fastdiff.evaluation.features import FrechetComparison, batches_of, compare_with_real, encode_batches
from fastdiff.evaluation.metrics import frechet_distance, nearest_neighbour_distances
from fastdiff.evaluation.report import Report, Scores, evaluate_samples
from fastdiff.evaluation.tables import SyntheticReport, train_on_synthetic_test_on_real

__all__ = [
    "Classifier",
    "FrechetComparison",
    "Report",
    "Scores",
    "SyntheticReport",
    "batches_of",
    "compare_with_real",
    "encode_batches",
    "evaluate_samples",
    "frechet_distance",
    "load_or_train_classifier",
    "nearest_neighbour_distances",
    "train_on_synthetic_test_on_real",
]
