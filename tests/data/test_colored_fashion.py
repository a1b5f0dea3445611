"""Fashion-MNIST in colour: what is tinted, what the captions say, and which combinations are never trained on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_fashion import garment, write_fashion

from fastdiff.data import DataConfig, load_data
from fastdiff.data.colored_fashion import (
    BACKGROUNDS,
    ENTRIES,
    GARMENTS,
    NOUNS,
    PALETTE,
    TEMPLATES,
    UNSEEN,
    joined_to_edge,
    tinted,
)
from fastdiff.data.fashion_mnist import FASHION_CLASSES
from fastdiff.evaluation.classifier import training_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion(folder, 200)
    return load_data(DataConfig(name="colored_fashion", folder=str(folder)))


def test_shapes_and_attributes(data):
    assert data.image_shape == (3, 32, 32) and data.class_names == FASHION_CLASSES
    assert len(data.train) == len(data.held_out) == 2000
    assert list(data.attributes) == ["class", "color", "background"]
    assert torch.equal(data.attributes["class"].train, data.train.labels)
    images = data.train.images([0, 5])
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert data.captions.entries == ENTRIES and data.captions.train.dtype == torch.int32


def test_pixels_have_the_colors_that_the_attributes_say(data):
    for index in range(0, 2000, 97):
        picture = data.train.pixels[index].permute(1, 2, 0)
        color, background = (data.attributes[name].train[index] for name in ("color", "background"))
        assert picture[0, 0].tolist() == list(PALETTE[BACKGROUNDS[background]])
        assert picture[20, 18].tolist() == list(PALETTE[GARMENTS[color]])  # of one brightness: its own brightest
        assert GARMENTS[color] != BACKGROUNDS[background]


def test_a_class_is_never_trained_on_in_one_color(data):
    pairs = {
        (FASHION_CLASSES[label], GARMENTS[color]) for label, color, _ in data.values("train").unique(dim=0).tolist()
    }
    everything = {(name, color) for name in FASHION_CLASSES for color in GARMENTS}
    assert everything - pairs == set(UNSEEN.items())
    assert 0.11 < len(UNSEEN) / len(everything) <= 0.13  # an eighth
    assert set(UNSEEN) == set(FASHION_CLASSES) and set(UNSEEN.values()) == set(GARMENTS)  # each class, each colour
    held_out = data.values("held_out", ["class", "color"]).tolist()
    unseen = [UNSEEN[FASHION_CLASSES[label]] == GARMENTS[color] for label, color in held_out]
    assert (~data.seen).tolist() == unseen and 0.08 < np.mean(unseen) < 0.18
    assert len({tuple(pair) for pair in held_out}) == 80


def test_classifiers_learn_from_every_combination(data):
    more = data.every_combination
    assert len(more.images) == 8 * len(data.train) and list(more.values) == list(data.attributes)
    pairs = torch.stack([more.values["class"], more.values["color"]], dim=1).unique(dim=0)
    assert len(pairs) == 80
    for index in range(0, 16_000, 777):
        picture = ((more.images.images([index])[0] + 1) * 127.5).round().permute(1, 2, 0)
        color, background = (int(more.values[name][index]) for name in ("color", "background"))
        assert picture[0, 0].tolist() == list(PALETTE[BACKGROUNDS[background]])
        assert picture[20, 18].tolist() == list(PALETTE[GARMENTS[color]])
        assert more.values["class"][index] == data.train.labels[index % 2000]
    batch = more.images.batch([5, 2005])
    assert torch.equal(batch["labels"], data.train.labels[[5, 5]])
    assert not torch.equal(*batch["pixel_values"])  # a garment in other colours
    images, values = training_images(data)
    assert images is more.images and values is more.values


def test_captions_say_what_is_shown(data):
    for part in ("train", "held_out"):
        rows, values = data.captions.rows(part), data.values(part)
        for index in range(0, 2000, 41):
            base, synonym, caption, other = (data.captions.texts[number] for number in rows[index].tolist())
            name, color = FASHION_CLASSES[values[index, 0]], GARMENTS[values[index, 1]]
            noun = NOUNS[name][0].removeprefix("pair of ")
            assert base == name and synonym != name
            assert color in caption and noun in caption
            assert any(word.removeprefix("pair of ") in other for word in NOUNS[name][1:])
            if "photo of" not in caption or " on a" in caption:
                assert BACKGROUNDS[values[index, 2]] in caption
            for text in (caption, other):
                assert " a o" not in text and " a e" not in text and " an r" not in text


def test_prompts_of_combinations(data):
    prompts = data.prompts_of({"class": "sneaker", "color": "purple", "background": "white"})
    assert prompts and all("purple" in text and "sneaker" in text and "white" in text for text in prompts)
    assert len(prompts) <= len(TEMPLATES) - 1  # one leaves the background open, so that it doesn't say all
    assert "a photo of a purple sneaker" in data.prompts_of({"class": "sneaker", "color": "purple"})
    assert data.prompts_of({"class": 7, "color": "purple"}, part="train") == ()  # never trained on
    assert data.prompts_of({"class": "sneaker"}, entries=("base",)) == ("sneaker",)
    unseen = data.combinations(["class", "color"], seen=False)
    assert {(FASHION_CLASSES[each["class"]], GARMENTS[each["color"]]) for each in unseen} == set(UNSEEN.items())
    seen = data.combinations(["class", "color"], seen=True)
    assert len(seen) == 70 and not [each for each in unseen if each in seen]
    assert (
        data.combinations(["class", "color"], part="train") == seen
        and data.combinations(part="train", seen=False) == []
    )
    for wrong, message in (({"class": "hat"}, "got 'hat'"), ({"size": 1}, "got size; expected of class, color, back")):
        with pytest.raises(ValueError, match=message):
            data.prompts_of(wrong)
    with pytest.raises(ValueError, match="entries: got name; expected of base, base_syn, caption"):
        data.prompts_of({"class": 0}, entries=("name",))


def test_the_same_files_give_the_same_data(data, tmp_path):
    write_fashion(tmp_path, 200)
    again = load_data(DataConfig(name="colored_fashion", folder=str(tmp_path)))
    assert again.fingerprint == data.fingerprint
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    write_fashion(fewer, 20)
    part = load_data(DataConfig(name="colored_fashion", folder=str(fewer)))
    assert part.fingerprint != data.fingerprint
    assert torch.equal(part.train.pixels, data.train.pixels[:200])  # image i depends on the seed and i alone


def test_the_fingerprint_covers_texts(data):
    import dataclasses

    texts = ("another word", *data.captions.texts[1:])
    other = dataclasses.replace(data, captions=dataclasses.replace(data.captions, texts=texts))
    assert other.fingerprint != data.fingerprint


def test_prints_are_of_the_garment_and_handles_show_the_background():
    labels = np.array([FASHION_CLASSES.index(name) for name in ("pullover", "bag")])
    grey = np.stack([garment(0, 0)] * 2)
    pixels = tinted(grey, labels, np.array([0, 0]), np.array([2, 2]))  # red on white
    print_of_pullover, hole_of_bag = pixels[:, :, 2 + 13, 2 + 9]
    assert print_of_pullover[0] > 2 * print_of_pullover[1] and print_of_pullover[0] < 150  # dark red
    assert hole_of_bag.tolist() == [252, 252, 252]


def test_dim_edges_are_mixed_with_the_background():
    grey = garment(0, 0)[None]
    (pixels,) = tinted(grey, np.array([0]), np.array([0]), np.array([0]))  # red on black
    edge, inside = pixels[0, 2 + 8, 2 + 14], pixels[0, 2 + 12, 2 + 14]
    assert inside == 224 and 0.4 * 224 < edge < 0.65 * 224


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9))
def test_joined_to_edge_is_a_flood(seed, share):
    from scipy.ndimage import label

    mask = np.random.default_rng(seed).random((2, 32, 32)) < share
    for one, found in zip(mask, joined_to_edge(mask), strict=True):
        regions, _ = label(one)
        border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        assert np.array_equal(found, np.isin(regions, border[border > 0]))


def test_larger_images_are_refused(tmp_path):
    import struct

    for part in ("train", "t10k"):
        shape = struct.pack(">3I", 1, 40, 40)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + shape + bytes(1600))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + struct.pack(">I", 1) + bytes(1))
    with pytest.raises(ValueError, match="folder: got images of 40x40 pixels; colored_fashion takes"):
        load_data(DataConfig(name="colored_fashion", folder=str(tmp_path)))
