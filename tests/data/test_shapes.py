"""Drawn shapes: what the pictures show, what the sentences say, and which combinations are never trained on."""

import itertools

import numpy as np
import pytest
import torch

from fastdiff.data import CaptionedData, DataConfig, load_data
from fastdiff.data.colored_fashion import PALETTE
from fastdiff.data.shapes import ATTRIBUTES, COLORS, FORMS, UNSEEN, caption_of, parse_caption
from fastdiff.evaluation.classifier import training_images


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(name="shapes"))


def caption(data, part, index):
    (text,) = data.captions.rows(part)[index].tolist()
    return data.captions.texts[text]


def test_shapes_and_attributes(data):
    assert isinstance(data, CaptionedData) and data.image_shape == (3, 64, 64) and data.class_names == FORMS
    assert len(data.train) == 5000 and len(data.held_out) == 1000
    assert list(data.attributes) == ["size", "color", "form", "place", "count"]
    assert torch.equal(data.attributes["form"].train, data.train.labels) and data.captions.entries == ("caption",)
    batch = data.held_out.batch([3, 3, 7])
    assert batch["pixel_values"].shape == (3, 3, 64, 64) and batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert batch["labels"].tolist() == data.held_out.labels[[3, 3, 7]].tolist()
    assert load_data(DataConfig(name="shapes", image_size=24)).held_out.images([5]).shape == (1, 3, 24, 24)


def test_a_picture_depends_on_its_index_alone(data):
    again = load_data(DataConfig(name="shapes"))
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.train.images([41, 7]), data.train.images([7, 41]).flip(0))
    assert not torch.equal(data.train.images([7]), data.held_out.images([7]))
    assert load_data(DataConfig(name="shapes", image_size=32)).fingerprint != data.fingerprint


def test_every_sentence_is_read_back():
    for numbers in itertools.product(*(range(len(names)) for names in ATTRIBUTES.values())):
        values = dict(zip(ATTRIBUTES, numbers, strict=True))
        assert parse_caption(caption_of(values)) == values
    named = {"size": "small", "color": "red", "form": "heart", "place": "top left", "count": "one"}
    assert caption_of(named) == "A small red heart at the top left"
    assert (
        caption_of({**named, "form": "cross", "place": "middle", "count": 2}) == "Three small red crosses in the middle"
    )
    assert parse_caption("  two LARGE blue\n stars on the left. ") == {
        "size": 1, "color": COLORS.index("blue"), "form": FORMS.index("star"), "place": 3, "count": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "a small red heart", "two small red heart at the top", "a small red hearts at the top",
        "a red small heart at the top", "a small red heart at the left", "a small red heart at the top top",
        "four small red hearts at the top", "a small brown heart at the top", "a small red heart at the top..",
    ],
)  # fmt: skip
def test_what_is_no_sentence(text):
    assert parse_caption(text) is None


def test_wrong_values_have_no_sentence():
    values = dict.fromkeys(ATTRIBUTES, 0)
    for wrong in ("brown", 8, -1):
        with pytest.raises(ValueError, match=f"color: got {wrong!r}; expected one of red, orange"):
            caption_of({**values, "color": wrong})
    with pytest.raises(ValueError, match="values: got none of size, count; expected size, color"):
        caption_of({"color": 0, "form": 0, "place": 0})


def test_a_form_is_never_trained_on_in_one_color(data):
    shown = {(FORMS[form], COLORS[color]) for form, color in data.values("train", ["form", "color"]).tolist()}
    assert set(itertools.product(FORMS, COLORS)) - shown == set(UNSEEN.items())
    assert set(UNSEEN) == set(FORMS) and set(UNSEEN.values()) == set(COLORS)  # each form, each colour
    unseen = [
        UNSEEN[FORMS[form]] == COLORS[color] for form, color in data.values("held_out", ["form", "color"]).tolist()
    ]
    assert (~data.seen).tolist() == unseen and sum(unseen) == 500
    for name, names in ATTRIBUTES.items():  # every value is there, none is rare
        assert data.attributes[name].train.bincount(minlength=len(names)).min() > 150
    images, values = training_images(data)  # classifiers see all
    assert len(torch.stack([values["form"], values["color"]], dim=1).unique(dim=0)) == 64
    assert images.images([3]).shape == (1, 3, 64, 64)


def test_sentences_say_what_is_shown(data):
    for part in ("train", "held_out"):
        values = data.values(part).tolist()
        for index in range(0, len(values), 37):
            assert list(parse_caption(caption(data, part, index)).values()) == values[index]
    prompts = data.prompts_of({"color": "blue", "form": "star", "count": "three"})
    assert prompts and all("blue stars" in text and text.startswith("Three ") for text in prompts)
    assert data.prompts_of({"color": "blue", "form": "star"}, part="train") == ()  # never trained on


def test_pictures_show_what_the_sentences_say(data):
    from scipy.ndimage import label

    areas = {}
    for index in range(120):
        values = {name: int(attribute.train[index]) for name, attribute in data.attributes.items()}
        picture = ((data.train.images([index])[0] + 1) * 127.5).permute(1, 2, 0).numpy()
        color = np.array(PALETTE[COLORS[values["color"]]])
        inside = np.abs(picture - color).max(axis=-1) < 0.1 * 255
        regions, count = label(inside)
        sizes = np.bincount(regions.ravel())[1:]
        assert (sizes > 12).sum() == values["count"] + 1 or values["size"] == 1  # large ones may touch
        y, x = (np.mean(each) / 63 for each in np.nonzero(inside))
        row, column = divmod(values["place"], 3)
        assert abs(y - (0.2, 0.5, 0.8)[row]) < 0.12 and abs(x - (0.2, 0.5, 0.8)[column]) < 0.12
        areas.setdefault((values["size"], values["form"]), []).append(inside.sum() / (values["count"] + 1))
        edge = np.abs(picture - color).max(axis=-1)
        assert np.median(np.abs(picture - 255).max(axis=-1)) < 40  # the ground is pale
        assert ((edge > 30) & (edge < edge.max() - 30)).sum() > 4  # edges are smooth
    for form in range(len(FORMS)):
        assert min(areas[1, form]) > 2 * max(areas[0, form])


def test_what_is_refused():
    with pytest.raises(ValueError, match="folder: got 'x' with shapes, which is drawn; leave it out"):
        load_data(DataConfig(name="shapes", folder="x"))
    with pytest.raises(ValueError, match="resize: got 32 with shapes; expected null: set image_size"):
        DataConfig(name="shapes", resize=32)
