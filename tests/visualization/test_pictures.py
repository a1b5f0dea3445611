"""Pictures: sizes, contents and refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.visualization import TextSample, save_loss_curve, save_sample_grid, save_text_samples
from fastdiff.visualization.curves import moving_average


def test_grid_has_every_image(tmp_path):
    """Each image has its own colour: all of them are found again in the picture, in the rows of their labels."""
    labels = torch.tensor([1, 0, 1, 0, 1])
    colours = torch.tensor([[-1.0, -1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, -1], [-1, 1, 1]])
    path = save_sample_grid(
        colours.view(5, 3, 1, 1).expand(5, 3, 28, 28), labels, ("first", "second"), tmp_path / "grid.png", columns=2
    )
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    centres = []
    for colour in ((colours + 1) * 127.5).int().tolist():
        found = np.argwhere((np.abs(pixels - colour) < 3).all(-1))
        assert len(found) > 300, colour
        centres.append(found.mean(0))
    tops = [centre[0] for centre in centres]
    # label 0 (images 1, 3) in the first row, label 1 below: two in a row, the third alone
    assert max(tops[1], tops[3]) < min(tops[0], tops[2]) <= max(tops[0], tops[2]) < tops[4]
    assert centres[0][1] < centres[2][1] and centres[1][1] < centres[3][1]


def test_grid_clips_and_takes_grey_images(tmp_path):
    images = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    path = save_sample_grid(images, [0, 1], ("black", "white"), tmp_path / "grid.png", title="two")
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize(("shape", "labels"), [((0, 1, 8, 8), 0), ((2, 2, 8, 8), 2), ((2, 8, 8), 2), ((2, 1, 8, 8), 3)])
def test_grid_refuses(tmp_path, shape, labels):
    with pytest.raises(ValueError, match="images has shape"):
        save_sample_grid(torch.zeros(shape), [0] * labels, ("one",), tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("steps", [1, 200])
def test_loss_curve(tmp_path, steps):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s + 1, "loss": 2 / (1 + s)}) + "\n" for s in range(steps)))
    assert Image.open(save_loss_curve(metrics, tmp_path / "loss.png")).size == (1080, 630)


def test_loss_curve_without_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no steps"):
        save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_moving_average():
    assert moving_average([3.0] * 10, 0.9) == pytest.approx([3.0] * 10)
    steps = moving_average([0.0] * 500 + [1.0] * 3, 0.9)
    assert steps[-1] == pytest.approx(1 - 0.9**3)


def test_texts_are_coloured_by_step(tmp_path):
    """A long line wraps, dollars and control characters are shown as they are, later tokens are lighter."""
    early = TextSample("a", ["$x$ " * 40, "\t\x07 end"], [0, 9])
    late = TextSample("a", ["$x$ " * 40, "\t\x07 end"], [9, 0])
    brightness = []
    for name, sample in (("early", early), ("late", late)):
        path = save_text_samples([sample], tmp_path / f"{name}.png", title="steps")
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert pixels.shape[1] > 900 and pixels.shape[0] > 100
        brightness.append(pixels[pixels.sum(-1) < 600].sum(-1).mean())
    assert brightness[1] > brightness[0] + 50
    with pytest.raises(ValueError, match="got 0; expected at least one"):
        save_text_samples([], tmp_path / "none.png")


def test_the_loss_curve_shows_the_held_out_bound(tmp_path):
    metrics, validation = tmp_path / "metrics.jsonl", tmp_path / "validation.jsonl"
    metrics.write_text("".join(json.dumps({"step": i + 1, "loss": 3.0}) + "\n" for i in range(20)))
    plain = save_loss_curve(metrics, tmp_path / "plain.png", validation=validation).read_bytes()
    validation.write_text(json.dumps({"step": 10, "nats_per_token": 2.5, "standard_error": 0.1}) + "\n")
    assert save_loss_curve(metrics, tmp_path / "both.png", validation=validation).read_bytes() != plain
