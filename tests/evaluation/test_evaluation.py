"""Scores of samples: the distances against closed forms, the classifier and its cache."""

import numpy as np
import pytest
import torch

from fastdiff.data import DataConfig, load_data
from fastdiff.evaluation import (
    evaluate_samples,
    frechet_distance,
    load_or_train_classifier,
    nearest_neighbour_distances,
)
from fastdiff.evaluation.classifier import Schedule, classify, shifted
from fastdiff.evaluation.report import balanced_subset

SHORT = Schedule(epochs=4, batch_size=64)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def classifier(digits, cache):
    return load_or_train_classifier(digits, progress=False, schedule=SHORT)


def normal(mean: float, deviation: float, count: int = 400, width: int = 6) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly mean·1 and deviation²·I."""
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(count, width)))
    noise = noise - noise.mean(0)
    return mean + deviation * (noise @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(noise.T))).T)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0), (-1.0, 0.5)])
def test_frechet_distance_of_known_normals(mean, deviation):
    expected = 6 * mean**2 + 6 * (deviation - 1) ** 2
    assert frechet_distance(normal(mean, deviation), normal(0.0, 1.0)) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_with_fewer_images_than_features():
    features = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("shape", "reference"), [((5, 3), (5, 4)), ((5,), (5, 4)), ((1, 4), (5, 4))])
def test_frechet_distance_refuses(shape, reference):
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(torch.zeros(shape), torch.zeros(reference))


def test_nearest_neighbours():
    reference = torch.randn(23, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = reference[[3, 22, 8]] + torch.tensor([0.0, 0.5, 0.0]).view(3, 1, 1, 1)
    distances = nearest_neighbour_distances(images, reference, chunk=7)
    assert torch.allclose(distances, torch.tensor([0.0, 2.0, 0.0]), atol=2e-3)  # 4·4 pixels off by 1/2


def test_classifier_learns_and_is_cached(digits, classifier, monkeypatch):
    features, labels = classify(classifier, digits.held_out)
    assert features.shape == (179, 128) and not classifier.training
    assert (labels["class"] == digits.held_out.labels).double().mean() > 0.7  # seen: 0.96 and 0.98; 0.1 by chance
    monkeypatch.setattr("fastdiff.evaluation.classifier._train", lambda *args: pytest.fail("trained again"))
    again = load_or_train_classifier(digits, progress=False, schedule=SHORT)
    assert torch.equal(classify(again, digits.held_out)[0], features)


def test_a_damaged_cache_is_replaced(digits, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    tiny = Schedule(epochs=1, batch_size=512)
    first = load_or_train_classifier(digits, progress=False, schedule=tiny)
    (path,) = (tmp_path / "classifiers").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    again = load_or_train_classifier(digits, progress=False, schedule=tiny)
    assert torch.equal(first.head.weight, again.head.weight)  # the same training: same seed, same data
    assert path.stat().st_size > 1000


def test_report_tells_real_images_from_noise(digits, classifier):
    chosen = balanced_subset(digits.train, 100)
    real = evaluate_samples(digits.train.images(chosen), digits.train.labels[chosen], digits, classifier)
    assert real.samples.class_accuracy > 0.7 and real.samples.images == 100
    assert real.samples.nearest_neighbour_median < 1e-2 < real.held_out.nearest_neighbour_minimum  # copies are seen
    noise = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    false = evaluate_samples(noise, torch.arange(100) % 10, digits, classifier)
    assert false.samples.class_accuracy < 0.4
    assert false.samples.frechet_distance > 3 * false.held_out.frechet_distance
    assert false.held_out == real.held_out
    table = false.to_markdown()
    assert "Fréchet distance (classifier features)" in table and "FID" not in table


def test_report_refuses_other_shapes(digits, classifier):
    with pytest.raises(ValueError, match=r"samples: got shape \(3, 1, 9, 9\).*expected \[N, 1, 8, 8\]"):
        evaluate_samples(torch.zeros(3, 1, 9, 9), torch.zeros(3), digits, classifier)


def test_balanced_subset(digits):
    labels = digits.held_out.labels[balanced_subset(digits.held_out, 43)]
    assert labels.bincount().max() - labels.bincount().min() <= 1 and len(labels) == 43
    assert len(balanced_subset(digits.held_out, 10_000)) == 179


def test_shifted_images_are_moved_not_changed():
    images = torch.full((40, 2, 14, 14), -1.0)
    images[:, :, 5:9, 5:9] = torch.arange(1.0, 41).view(40, 1, 1, 1)
    torch.manual_seed(0)
    moved = shifted(images)
    assert moved.shape == images.shape
    assert torch.equal(moved.flatten(1).sort().values, images.flatten(1).sort().values)
    assert len({tuple(torch.nonzero(image[0] > 0)[0].tolist()) for image in moved}) == 9  # offsets -1, 0, 1 each way


def test_a_cache_that_cannot_be_written_is_known_before_training(tmp_path, monkeypatch):
    from fastdiff.data import DataConfig, load_data
    from fastdiff.evaluation import classifier

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(classifier, "_train", lambda *_: pytest.fail("trained before the cache was tried"))
    data = load_data(DataConfig(name="digits"))
    for check in (classifier.load_or_train_classifier, classifier.check_classifier_cache):
        with pytest.raises(PermissionError, match="the cache .* cannot be written .*; set FASTDIFF_CACHE to a folder"):
            check(data)
