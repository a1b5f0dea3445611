"""Captions as pictures, tested by what matplotlib was given to draw."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.visualization import TextSample, caption_attention, caption_grid


def sample(text, steps=None):
    pieces = [text] if isinstance(text, str) else text
    return TextSample("", pieces, list(range(len(pieces))) if steps is None else steps)


def lines_of(figure):
    """The texts below the pictures, by line: those of one height are joined."""
    found = {}
    for text in figure.texts:
        found.setdefault(round(text.get_position()[1], 4), []).append((text.get_position()[0], text.get_text()))
    return ["".join(t for _, t in sorted(found[y])) for y in sorted(found, reverse=True)]


def test_each_picture_has_its_reference_and_its_caption(tmp_path, figures):
    images = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (10, 200)])
    path = caption_grid(images, ["a dark one", ["a light one", "another"]], [sample("dark"), sample("light")],
                        tmp_path / "grid.png", columns=1)  # fmt: skip
    assert Image.open(path).format == "PNG"
    shown = [axes.images[0].get_array() for axes in figures[0].axes[:2]]
    assert [int(picture.mean()) for picture in shown] == [10, 200] and shown[0].shape == (8, 8, 3)
    assert lines_of(figures[0]) == ["a dark one", "dark", "a light one", "light", "step that chose a token"]


def test_colours_of_all_captions_are_those_of_the_legend(tmp_path, figures):
    """One scale: step 2 of a short caption is as dark as step 2 of a long one."""
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    long, short = sample(["A", " red", " ball"], [4, 0, 2]), sample(["Two", " cups"], [2, 0])
    caption_grid(images, ["", ""], [long, short], tmp_path / "grid.png")
    colours = {text.get_text().strip(): text.get_color() for text in figures[0].texts}
    assert colours["ball"] == colours["Two"] and colours["red"] == colours["cups"] != colours["A"]
    legend = np.asarray(figures[0].axes[-1].images[0].get_array())
    np.testing.assert_allclose(legend[0], [colours["red"][:3], legend[0][1], colours["ball"][:3], legend[0][3],
                                           colours["A"][:3]])  # fmt: skip
    assert [text.get_text() for text in figures[0].axes[-1].texts] == ["1", "2", "3", "4", "5"]


def test_many_steps_share_swatches(tmp_path, figures):
    words = [f" {n}" for n in range(300)]
    caption_grid(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), [""], [sample(words)], tmp_path / "grid.png")
    legend = figures[0].axes[-1]
    assert legend.images[0].get_array().shape[1] == 16
    assert [text.get_text() for text in legend.texts] == ["1", "160", "300"]


def test_long_captions_break_between_words_and_end(tmp_path, figures):
    words = [f" word{n:02}" for n in range(60)]
    caption_grid([Image.new("RGB", (9, 9))], ["reference " * 40], [sample(words)], tmp_path / "grid.png")
    *lines, _ = lines_of(figures[0])
    assert len(lines) == 12 and lines[5] == lines[11] == "…"  # six of the reference, six of the caption
    assert all(len(line) <= 36 for line in lines)
    assert " ".join(lines[6:11]).split() == [word.strip() for word in words[:25]]  # five whole words a line


def test_a_word_longer_than_a_line_is_broken(tmp_path, figures):
    caption_grid([Image.new("RGB", (9, 9))], [""], [sample("a " + "x" * 50)], tmp_path / "grid.png")
    assert lines_of(figures[0])[:3] == ["a", "x" * 36, "x" * 14]


def test_what_a_terminal_would_obey_is_shown(tmp_path, figures):
    text = sample(["$x$ \x1b[31mred", "\nnext\tto\u202eit", "\ud800"])
    caption_grid([Image.new("RGB", (9, 9))], ["\x07bell"], [text], tmp_path / "grid.png", title="a\x1b")
    title, reference, *caption = lines_of(figures[0])
    assert (title, reference) == (r"a\x1b", r"\x07bell")
    assert " ".join(caption[:-1]) == r"$x$ \x1b[31mred next to\u202eit\ud800"


def test_empty_captions_say_so_and_samples_follow_their_picture(tmp_path, figures):
    pictures = [Image.new("RGBA", (9, 4)), Image.new("L", (5, 30))]
    caption_grid(pictures, ["", ""], [sample([]), sample("b"), sample("  "), sample("d")], tmp_path / "grid.png",
                 columns=1)  # fmt: skip
    nothing = "(nothing but end tokens)"
    assert lines_of(figures[0])[:-1] == [nothing, "b", nothing, "d"]
    assert [axes.images[0].get_array().shape for axes in figures[0].axes[:2]] == [(4, 9, 3), (30, 5, 3)]


def test_the_grid_refuses_what_does_not_fit(tmp_path):
    image, path = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "none.png"
    with pytest.raises(ValueError, match="images: got torch.float32"):
        caption_grid(image.float(), [""], [sample("a")], path)
    with pytest.raises(ValueError, match="images: got 1 with 2 references and 1 samples"):
        caption_grid(image, ["", ""], [sample("a")], path)
    with pytest.raises(ValueError, match="images: got 0"):
        caption_grid([], [], [], path)
    with pytest.raises(ValueError, match=r"samples\[0\]: got 1 pieces and 2 steps"):
        caption_grid(image, [""], [sample("a", [0, 1])], path)
    assert not path.exists()


def test_each_word_has_its_map_over_the_picture(tmp_path, figures):
    image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
    maps = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0.25, 0.75]])
    caption_attention(image, [" red", "\x1bball"], maps, (2, 2, 1), tmp_path / "maps.png", columns=3)
    picture, first, second = figures[0].axes
    assert (picture.images[0].get_array() == image.permute(1, 2, 0).numpy()).all() and len(picture.images) == 1
    np.testing.assert_allclose(first.images[1].get_array(), [[1, 0], [0, 0]])
    np.testing.assert_allclose(second.images[1].get_array(), [[0, 0], [1 / 3, 1]], rtol=1e-6)
    assert second.images[1].get_extent() == picture.images[0].get_extent()  # over the whole picture
    texts = [text.get_text() for text in figures[0].texts]
    assert texts == ["red", "50% on leading tokens", r"\x1bball", "0% on leading tokens"]


def test_maps_take_pictures_of_any_shape(tmp_path, figures):
    caption_attention(Image.new("L", (40, 20)), ["word"], torch.zeros(1, 8), (2, 4, 0), tmp_path / "maps.png")
    place = figures[0].axes[1].get_position()
    width, height = figures[0].get_size_inches()
    assert place.width * width == pytest.approx(2 * place.height * height)
    assert (figures[0].axes[1].images[1].get_array() == 0).all()  # nothing attended to: no division by zero


def test_maps_refuse_what_does_not_fit(tmp_path):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match=r"maps: got \[1, 5\] for 1 words and a grid of 2 x 2 behind 0 tokens"):
        caption_attention(image, ["a"], torch.zeros(1, 5), (2, 2, 0), tmp_path / "a.png")
    with pytest.raises(ValueError, match="maps: got negative or infinite"):
        caption_attention(image, ["a"], torch.full((1, 4), -1.0), (2, 2, 0), tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one word"):
        caption_attention(image, [], torch.zeros(0, 4), (2, 2, 0), tmp_path / "a.png")
