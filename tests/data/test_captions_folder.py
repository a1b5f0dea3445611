"""Pictures and captions of one's own."""

import json

import pytest
import torch
from PIL import Image

from fastdiff.data import CaptionedData, DataConfig, load_data

LINES = [
    {"file": "red.png", "caption": "a red square"},
    {"file": "more/green.jpg", "captions": ["a green square", " grass "]},
    {"file": "blue.png", "caption": "a blue square"},
    {"file": "./red.png", "caption": "all red"},
    {"file": "white.png", "caption": "nothing"},
]
COLORS = {"red.png": (255, 0, 0), "more/green.jpg": (0, 255, 0), "blue.png": (0, 0, 255), "white.png": (255,) * 3}


@pytest.fixture
def folder(tmp_path, cache):
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (20, 14), color).save(root / name)
    write(root / "captions.jsonl", LINES)
    return root


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(root, **fields):
    return load_data(DataConfig(name="captions_folder", folder=str(root), image_size=8, **fields))


def test_pictures_with_their_captions(folder):
    data = load(folder, held_out_fraction=0.25)
    assert isinstance(data, CaptionedData) and data.class_names == ("picture",) and data.image_shape == (3, 8, 8)
    assert len(data.train) == 3 and len(data.held_out) == 1 and data.attributes == {} and data.seen is None
    assert data.captions.entries == ("caption", "caption")
    shown = {}
    for part in ("train", "held_out"):
        images = getattr(data, part)
        for index in range(len(images)):
            texts = [data.captions.texts[n] for n in data.captions.rows(part)[index].tolist() if n >= 0]
            color = (images.images([index])[0, :, 4, 4] > 0).int().tolist()
            shown[tuple(color)] = texts
    assert shown == {
        (1, 0, 0): ["a red square", "all red"], (0, 1, 0): ["a green square", "grass"],
        (0, 0, 1): ["a blue square"], (1, 1, 1): ["nothing"],
    }  # fmt: skip
    assert load(folder, held_out_fraction=0.25).fingerprint == data.fingerprint
    write(folder / "other.jsonl", [*LINES[:-1], {"file": "white.png", "caption": "snow"}])
    other = load(folder, held_out_fraction=0.25, captions=str(folder / "other.jsonl"))
    assert other.fingerprint != data.fingerprint
    assert load(folder, channels=1).image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"file": "gone.png", "caption": "x"}, FileNotFoundError, "line 2: file: got 'gone.png', which is not in"),
        ({"file": "../red.png", "caption": "x"}, ValueError, "line 2: file: got '../red.png'; expected a path in"),
        ({"file": "/red.png", "caption": "x"}, ValueError, "line 2: file: got '/red.png'; expected a path in"),
        ({"file": "captions.jsonl", "caption": "x"}, ValueError, "line 2: file: got 'captions.jsonl'; suffixes read"),
        ({"file": "red.png", "caption": "  "}, ValueError, "line 2: caption: got an empty one"),
        ({"file": "red.png", "captions": []}, ValueError, r"line 2: captions: got \[\]; expected a list of texts"),
        ({"file": "red.png", "captions": ["x", 3]}, ValueError, "line 2: field 'caption' is int"),
        ({"file": "red.png"}, ValueError, 'line 2: got file; expected "file" and either'),
        ({"caption": "x"}, ValueError, "line 2 has no field 'file'; it has caption"),
        (
            {"file": "red.png", "captions": [f"{i}" for i in range(101)]},
            ValueError,
            "line 2: got more than 100 captions",
        ),
    ],
)
def test_lines_that_are_refused(folder, row, error, message):
    write(folder / "captions.jsonl", [LINES[0], row])
    with pytest.raises(error, match=message) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_broken_pictures_and_missing_files(folder):
    path = folder / "blue.png"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="blue.png cannot be decoded as an image"):
        load(folder)
    load(folder, check="headers")
    (folder / "captions.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="captions.jsonl, line 1 is not JSON"):
        load(folder)
    write(folder / "captions.jsonl", LINES[:1])
    with pytest.raises(ValueError, match="captions.jsonl names 1 pictures; expected at least 2"):
        load(folder)
    (folder / "captions.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="captions: got .*captions.jsonl', which is not a file; expected JSONL"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="folder: got .* which is not a folder"):
        load(folder / "none")
    with pytest.raises(ValueError, match="folder: got none; captions_folder needs a folder of pictures"):
        load_data(DataConfig(name="captions_folder"))


def test_a_class_conditional_dit_trains_on_it(folder):
    """On its one class."""
    from fastdiff.models.dit import DiTConfig
    from fastdiff.tasks.dit.recipe import DiTRecipe
    from fastdiff.tasks.dit.task import DiTTask
    from fastdiff.training.config import TrainingConfig

    model = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=1)
    data = DataConfig(name="captions_folder", folder=str(folder), image_size=8, random_shift=0.2)
    task = DiTTask(DiTRecipe(model=DiTConfig(**model), data=data, training=TrainingConfig(batch_size=4)))
    batch = task.batch(0, range(4))
    assert batch["x0"].shape == (4, 3, 8, 8) and torch.isfinite(task.loss(task.model, batch))
