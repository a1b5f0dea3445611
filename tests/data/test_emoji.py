"""Emoji of Debian's font with their names; moved and resized images."""

import re

import numpy as np
import pytest
import torch

from fastdiff.data import DataConfig, emoji, load_data
from fastdiff.data.emoji import FONT, FONT_FOLDERS, HELD_OUT
from fastdiff.data.images import shift_and_scale, to_bytes

needs_font = pytest.mark.skipif(
    not any((folder / FONT).is_file() for folder in FONT_FOLDERS),
    reason="NOT TESTED: Debian's fonts-noto-color-emoji is not installed",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load_data(DataConfig(name="emoji", image_size=32))


def names_of(data, part):
    return [data.captions.texts[index] for index in data.captions.rows(part, ["name"])[:, 0].tolist()]


@needs_font
def test_pictures_and_names(data):
    assert data.image_shape == (3, 32, 32) and data.class_names == ("emoji",)
    assert len(data.train) + len(data.held_out) > 1700  # 1 886 with emoji 2.16 and the font 2.042
    train = names_of(data, "train")
    assert len(set(train)) == len(train)
    pictures = {pixels.numpy().tobytes() for pixels in data.train.pixels}
    assert len(pictures) > 0.98 * len(train)  # different ones; some are the same at this size
    row = data.captions.train[train.index("red apple")].tolist()
    texts = [data.captions.texts[index] for index in row if index >= 0]
    assert texts == ["red apple", "apple", "an emoji of a red apple", "a red apple"]
    assert "flag of Japan" in train and "the flag of Japan" in data.captions.texts
    apple = data.train.images([train.index("red apple")])[0]
    assert apple[:, 0, 0].tolist() == [1, 1, 1]  # on white
    red, green, blue = apple[:, 18, 16].tolist()
    assert red > 0.2 > -0.2 > max(green, blue)


@needs_font
def test_held_out_names_are_of_words_that_are_trained_on(data):
    held_out, train = names_of(data, "held_out"), names_of(data, "train")
    assert set(held_out) == set(HELD_OUT) and not set(held_out) & set(train)
    words = {word for name in train for word in re.findall(r"[a-z]+", name.lower())}
    for name in held_out:
        assert set(re.findall(r"[a-z]+", name.lower())) <= words, name
    assert data.seen.tolist() == [False] * len(held_out)


@needs_font
def test_a_text_means_one_picture(data):
    table = torch.cat([data.captions.train, data.captions.held_out])
    for entry in ("alias", "name"):
        columns = [index for index, name in enumerate(data.captions.entries) if name in ("name", entry)]
        used = table[:, columns].flatten()
        counts = used[used >= 0].bincount()
        assert counts.max() == 1


@pytest.fixture
def few(monkeypatch):
    """Of all emoji those that are held out, and a few more: all of them take a second."""
    everything = emoji._all_names()
    chosen = {text: names for text, names in everything.items() if names[0] in HELD_OUT or len(names) == 4}
    monkeypatch.setattr(emoji, "_all_names", lambda: {text: list(names) for text, names in chosen.items()})


@needs_font
def test_drawn_once_and_again_where_the_cache_is_damaged(data, few, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    config = DataConfig(name="emoji", image_size=8)
    first = load_data(config)
    (pixels,) = tmp_path.glob("emoji/*/pixels.npy")
    drawn = pixels.stat().st_mtime_ns
    assert load_data(config).fingerprint == first.fingerprint and pixels.stat().st_mtime_ns == drawn
    pixels.write_bytes(pixels.read_bytes()[:1000])
    assert load_data(config).fingerprint == first.fingerprint != data.fingerprint


def test_a_font_that_is_missing_or_none(few, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji` or set folder"):
        load_data(DataConfig(name="emoji", folder=str(tmp_path)))
    (tmp_path / FONT).write_bytes(b"no font")
    with pytest.raises(ValueError, match=f"{FONT} cannot be read as a font of colour pictures"):
        load_data(DataConfig(name="emoji", folder=str(tmp_path)))
    assert not list((tmp_path / "cache" / "emoji").glob("[!.]*"))


def test_shift_and_scale():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    middle = torch.full((6, 3), 0.5)
    assert torch.allclose(shift_and_scale(images, middle, 0.25, 0.25), images, atol=1e-5)
    draws = middle.clone()
    draws[:, 1] = 1.0  # a quarter of the edge, 4 pixels
    moved = shift_and_scale(images, draws, 0.25, 0.0)
    assert torch.allclose(moved[..., :12], images[..., 4:], atol=1e-5)
    assert torch.allclose(moved[..., 12:], images[..., 15:].expand(-1, -1, -1, 4), atol=1e-5)  # its edge goes on
    draws[:, 1] = (
        0.8  # 0.6 of an edge of a pixel and a half: by a whole pixel, since what lies between would be blurred
    )
    assert torch.allclose(shift_and_scale(images, draws, 1.5 / 16, 0.0)[..., :15], images[..., 1:], atol=1e-5)
    draws = middle.clone()
    draws[:, 0] = 1.0  # twice as large would be 1 + scale = 2
    plain = torch.zeros(6, 3, 16, 16)
    plain[..., 6:10, 6:10] = 1
    larger = shift_and_scale(plain, draws, 0.0, 0.45)
    assert float(larger.sum()) == pytest.approx(float(plain.sum()) * 1.45**2, rel=0.05)
    draws = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
    together = shift_and_scale(images, draws, 0.1, 0.1)
    assert torch.equal(shift_and_scale(images[2:3], draws[2:3], 0.1, 0.1), together[2:3])
    assert to_bytes(together).dtype == torch.uint8 and np.isfinite(together.numpy()).all()


@pytest.mark.parametrize("field", ["random_shift", "random_scale"])
@pytest.mark.parametrize("value", [-0.1, 0.5, float("nan")])
def test_augmentations_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}: got {value}; expected a share from 0 to below 0.5"):
        DataConfig(name="digits", **{field: value})
