"""Pictures with their texts: every image and every text is there, whole, in its place."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fastdiff.visualization import save_captioned_gif, save_captioned_grid, save_picture_table

LONG = "a photo of a red sneaker on a blue background, seen from the left"


def coloured(*levels, size=8):
    """Grey images, each of one level."""
    return torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, size, size)


def texts_inside(figure):
    """Every text of a figure, after checking that it lies within it."""
    renderer, whole = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, text
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("each", [1, 2, 9])
def test_a_grid_has_each_text_under_its_images(tmp_path, figures, each):
    levels = np.linspace(-1, 1, 3 * each)
    path = save_captioned_grid(coloured(*levels), ("a cat", LONG, ""), tmp_path / "grid.png", title="two steps")
    assert Image.open(path).format == "PNG"
    found = texts_inside(figures[0])
    assert [" ".join(text.split()) for text in found] == ["a cat", LONG, "", "two steps"]
    assert all(len(line) < 40 or each > 1 for text in found for line in text.split("\n"))
    for cell, axes in enumerate(figures[0].axes):
        sheet = np.asarray(axes.images[0].get_array())
        for index in range(each):
            top, left = index // 8 * 9, index % 8 * 9
            expected = round((levels[cell * each + index] + 1) * 127.5)
            assert (sheet[top : top + 8, left : left + 8] == expected).all()
    assert len(figures[0].axes) == 3


def test_a_grid_of_two_sides_has_a_heading_over_each(tmp_path, figures):
    captions, headings = ("3", "three", "7", LONG), ("by label", "by prompt")
    save_captioned_grid(
        coloured(*np.linspace(-1, 1, 8)), captions, tmp_path / "a.png", headings=headings, title="sides"
    )
    found = [" ".join(text.split()) for text in texts_inside(figures[0])]
    assert sorted(found) == sorted([*captions, *headings, "sides"])
    cells = [axes.get_position() for axes in figures[0].axes]
    assert cells[0].x0 == cells[2].x0 < cells[1].x0 == cells[3].x0 and cells[0].y0 == cells[1].y0 > cells[2].y1
    places = {text.get_text(): text.get_position() for text in figures[0].texts}
    for name, cell in zip(headings, cells, strict=False):
        assert cell.x0 < places[name][0] < cell.x1 and cell.y1 < places[name][1] < places["sides"][1]


def test_a_text_that_is_far_too_long_is_cut(tmp_path, figures):
    save_captioned_grid(coloured(0), [" ".join(["word"] * 200)], tmp_path / "grid.png")
    (text,) = texts_inside(figures[0])
    assert text.count("\n") == 4 and text.endswith("…")


def test_a_gif_moves_from_noise_to_the_image(tmp_path):
    frames = torch.stack([coloured(-1, 1) * share for share in (0.0, 0.5, 1.0)])
    opened = Image.open(save_captioned_gif(frames, ("dark", "light"), tmp_path / "a.gif", frames_per_second=10))
    assert opened.n_frames == 3
    durations, extremes = [], []
    for index in range(3):
        opened.seek(index)
        durations.append(opened.info["duration"])
        grey = np.asarray(opened.convert("L"))
        extremes.append((grey[grey.shape[0] // 2, 30], grey[grey.shape[0] // 2, -30]))
    assert durations == [100, 100, 2000]
    assert abs(int(extremes[0][0]) - int(extremes[0][1])) < 5 and extremes[2][0] < 20 and extremes[2][1] > 235


def test_a_table_has_rows_columns_and_gaps(tmp_path, figures):
    images = coloured(-1, -0.5, 0, 0.5, 1, 0).view(2, 3, 3, 8, 8).clone()
    images[1, 2] = torch.nan
    save_picture_table(images, (LONG, "b"), ("guidance 1", "2", "3"), tmp_path / "table.png", title="sweep")
    found = [" ".join(text.split()) for text in texts_inside(figures[0])]
    assert found == ["guidance 1", "2", "3", LONG, "b", "sweep"]
    levels = [int(np.asarray(axes.images[0].get_array())[0, 0, 0]) for axes in figures[0].axes]
    assert levels == [0, 64, 128, 191, 255]
    lefts = [round(axes.get_position().x0, 3) for axes in figures[0].axes]
    assert lefts[:2] == lefts[3:] and lefts[0] < lefts[1] < lefts[2]


def test_shapes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images: got shape \(3, 3, 8, 8\) and 2 captions"):
        save_captioned_grid(coloured(0, 0, 0), ("a", "b"), tmp_path / "grid.png")
    with pytest.raises(ValueError, match="headings: got 2 for 1 columns; expected one a column"):
        save_captioned_grid(coloured(0, 0), ("a", "b"), tmp_path / "a.png", columns=1, headings=("x", "y"))
    with pytest.raises(ValueError, match="headings: got 2 for 1 columns"):
        save_captioned_grid(coloured(0, 0), ("a",), tmp_path / "a.png", headings=("x", "y"))
    with pytest.raises(ValueError, match="frames: got shape"):
        save_captioned_gif(coloured(0), ("a",), tmp_path / "grid.gif")
    with pytest.raises(ValueError, match="1 rows' and 3 columns' names"):
        save_picture_table(coloured(0, 0).view(1, 2, 3, 8, 8), ("a",), ("x", "y", "z"), tmp_path / "table.png")
    assert not list(tmp_path.iterdir())
