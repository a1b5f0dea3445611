"""Pictures: sizes, contents and refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.visualization import save_loss_curve, save_sample_grid
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
