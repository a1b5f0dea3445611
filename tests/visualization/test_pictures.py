"""Pictures: sizes, contents and refusals."""

import json

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fastdiff.visualization import TextSample, save_loss_curve, save_sample_grid, save_text_samples
from fastdiff.visualization.curves import moving_average


def test_grid_has_every_image(tmp_path, figures):
    """Each image has its own colour, and lies in the row of its label: two in a row, the third below."""
    labels = torch.tensor([1, 0, 1, 0, 1])
    colours = torch.tensor([[-1.0, -1, 1], [1, -1, -1], [-1, 1, -1], [1, 1, -1], [-1, 1, 1]])
    path = save_sample_grid(
        colours.view(5, 3, 1, 1).expand(5, 3, 28, 28), labels, ("first", "second"), tmp_path / "grid.png", columns=2
    )
    assert Image.open(path).format == "PNG"
    (axes,) = figures[0].axes
    sheet, pitch = np.asarray(axes.images[0].get_array()), 28 + 1
    assert sheet.shape == (3 * pitch - 1, 2 * pitch - 1, 3)
    for image, (row, column) in ((0, (0, 0)), (2, (0, 1)), (4, (1, 0)), (1, (2, 0)), (3, (2, 1))):
        block = sheet[row * pitch : row * pitch + 28, column * pitch : column * pitch + 28]
        assert (block == ((colours[image] + 1) * 127.5).round().numpy()).all()
    assert (sheet[pitch : 2 * pitch, pitch:] == 255).all()  # no sixth image
    assert [label.get_text() for label in axes.get_yticklabels()] == ["second", "first"]  # as first seen
    assert axes.get_yticks().tolist() == [13.5, 2 * pitch + 13.5]


def test_grid_clips_and_takes_grey_images(tmp_path, figures):
    images = torch.tensor([-9.0, 9.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)
    save_sample_grid(images, [0, 1], ("black", "white"), tmp_path / "grid.png", title="two")
    (drawn,) = figures[0].axes[0].images
    assert (drawn.get_array()[:8] == 0).all() and (drawn.get_array()[9:] == 255).all()
    assert drawn.get_clim() == (0, 255) and drawn.get_cmap().name == "gray"
    assert [text.get_text() for text in figures[0].texts] == ["two"]


@pytest.mark.parametrize("columns", [1, 8])
def test_a_grids_title_is_whole_on_the_picture(tmp_path, figures, columns):
    title = "trained for 12345 steps, guidance 1.25, 1000 denoising steps"
    save_sample_grid(torch.zeros(columns, 1, 8, 8), [0] * columns, ("one",), tmp_path / "grid.png", title=title)
    (text,) = figures[0].texts
    box, whole = text.get_window_extent(FigureCanvasAgg(figures[0]).get_renderer()), figures[0].bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1


@pytest.mark.parametrize(("shape", "labels"), [((0, 1, 8, 8), 0), ((2, 2, 8, 8), 2), ((2, 8, 8), 2), ((2, 1, 8, 8), 3)])
def test_grid_refuses(tmp_path, shape, labels):
    with pytest.raises(ValueError, match="images: got shape"):
        save_sample_grid(torch.zeros(shape), [0] * labels, ("one",), tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("steps", [1, 200])
def test_loss_curve(tmp_path, steps, figures):
    metrics, losses = tmp_path / "metrics.jsonl", [2 / (1 + s) for s in range(steps)]
    metrics.write_text("".join(json.dumps({"step": s + 1, "loss": loss}) + "\n" for s, loss in enumerate(losses)))
    assert Image.open(save_loss_curve(metrics, tmp_path / "loss.png", decay=0.9)).format == "PNG"
    (axes,) = figures[0].axes
    each, smooth = axes.lines
    for line, values in ((each, losses), (smooth, moving_average(losses, 0.9))):
        assert line.get_xydata().tolist() == [[step + 1, value] for step, value in enumerate(values)]
    assert axes.get_yscale() == ("log" if steps == 200 else "linear")


def test_loss_curve_without_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no steps"):
        save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_moving_average():
    assert moving_average([3.0] * 10, 0.9) == pytest.approx([3.0] * 10)
    steps = moving_average([0.0] * 500 + [1.0] * 3, 0.9)
    assert steps[-1] == pytest.approx(1 - 0.9**3)


def test_texts_are_coloured_by_step(tmp_path, figures):
    """A long line wraps, dollars and control characters are shown as they are, later tokens are lighter."""
    early, late = "$x$ " * 40, "\t\x07 end"
    save_text_samples([TextSample("a", [early, late], [0, 9])], tmp_path / "steps.png", title="steps")
    title, prompt, *pieces = figures[0].texts
    assert title.get_text() == "steps" and prompt.get_text() == "a" and prompt.get_color() == "#808080"
    # matplotlib reads \$ as a dollar; 110 characters a line, of which the prompt has one
    assert [text.get_text().replace(r"\$", "$") for text in pieces] == [early[:109], early[109:], "    · end"]
    first, again, last = (sum(text.get_color()[:3]) for text in pieces)
    assert first == again < last - 0.3
    assert pieces[0].get_position()[1] > pieces[1].get_position()[1] == pieces[2].get_position()[1]
    with pytest.raises(ValueError, match="got 0; expected at least one"):
        save_text_samples([], tmp_path / "none.png")


def test_the_loss_curve_shows_the_held_out_bound(tmp_path, figures):
    metrics, validation = tmp_path / "metrics.jsonl", tmp_path / "validation.jsonl"
    metrics.write_text("".join(json.dumps({"step": i + 1, "loss": 3.0}) + "\n" for i in range(20)))
    save_loss_curve(metrics, tmp_path / "plain.png", validation=validation)
    validation.write_text(json.dumps({"step": 10, "nats_per_token": 2.5, "standard_error": 0.1}) + "\n")
    save_loss_curve(metrics, tmp_path / "both.png", validation=validation)
    validation.write_text(json.dumps({"step": 10, "loss": 2.25}) + "\n")
    save_loss_curve(metrics, tmp_path / "loss.png", validation=validation)
    (plain,), (both,), (loss,) = (figure.axes for figure in figures)
    assert not plain.containers
    for axes, label, value in ((both, "held-out nats per token", 2.5), (loss, "held-out loss", 2.25)):
        (bar,) = axes.containers
        assert bar.get_label() == label and bar[0].get_xydata().tolist() == [[10, value]]
    (segments,) = (bars.get_segments() for bars in both.containers[0][2])
    np.testing.assert_allclose(segments, [[[10, 2.4], [10, 2.6]]])
