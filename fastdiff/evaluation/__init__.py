"""How good samples are, by models trained on real examples and by distances to them."""

from fastdiff.lazy import exports

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

__getattr__ = exports(
    __name__,
    {
        "Classifier": "fastdiff.evaluation.classifier",
        "FrechetComparison": "fastdiff.evaluation.features",
        "Report": "fastdiff.evaluation.report",
        "Scores": "fastdiff.evaluation.report",
        "SyntheticReport": "fastdiff.evaluation.tables",
        "batches_of": "fastdiff.evaluation.features",
        "compare_with_real": "fastdiff.evaluation.features",
        "encode_batches": "fastdiff.evaluation.features",
        "evaluate_samples": "fastdiff.evaluation.report",
        "frechet_distance": "fastdiff.evaluation.metrics",
        "load_or_train_classifier": "fastdiff.evaluation.classifier",
        "nearest_neighbour_distances": "fastdiff.evaluation.metrics",
        "train_on_synthetic_test_on_real": "fastdiff.evaluation.tables",
    },
)
