"""Names of any kind on pictures: they are drawn as they are, and none ends a run when its picture is drawn."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from fastdiff.visualization import (
    TextSample,
    save_contact_sheet,
    save_marginals,
    save_sample_grid,
    save_spectrograms,
    save_text_samples,
)
from fastdiff.visualization.figures import shown, width_of

NAMES = ("$10_$20", r"a^b\frac{$x", "犬", "a\nb\x07", "x\udcffy", "e\u0301\u202e", "n" * 4000, "", "%s {0}")


def table(names):
    kinds = np.array([*names, "b", "b"], dtype=object)
    return {names[0]: np.arange(len(kinds)) * 1.0, "kind": kinds}


def draw_grid(names, path):
    labels = torch.arange(len(names))
    return save_sample_grid(torch.zeros(len(names), 1, 4, 4), labels, names, path, title=shown(names[0]))


PICTURES = {
    "grid": draw_grid,
    "contact sheet": lambda names, path: save_contact_sheet(torch.zeros(len(names), 2, 1, 4, 4), path, names=names),
    "spectrograms": lambda names, path: save_spectrograms(torch.ones(len(names), 600), 4000, path, names=names),
    "marginals": lambda names, path: save_marginals(table(names), table(names), path),
    "texts": lambda names, path: save_text_samples([TextSample(n[:80], [n[:80]], [0]) for n in names], path),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("picture", PICTURES)
def test_names_are_drawn_as_they_are(picture, tmp_path, figures):
    PICTURES[picture](NAMES, tmp_path / "a.png")
    (figure,) = figures
    dollars = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert any("$10_$20" in text.get_text() for text in dollars)
    assert not any(text.get_parse_math() for text in dollars)
    assert max(figure.get_size_inches()) < 20


def test_a_letter_without_a_font_is_said_once(tmp_path, capsys, monkeypatch):
    from fastdiff.visualization import figures

    monkeypatch.setattr(figures, "_fonts", lambda: ())
    draw_grid(["犬猫"], tmp_path / "a.png")
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'a.png'}: no font here has 犬猫; boxes stand for them: install fonts-noto-cjk\n"


def test_names_as_pictures_can_show_them():
    assert shown("a\nb\x07 \udc80\u202e") == "a b· ··"
    assert shown("犬" * 30) == "犬" * 19 + "…" and width_of("犬é") == 3 and width_of("e\u0301") == 1
    assert shown("n" * 41) == "n" * 39 + "…" and shown("n" * 40) == "n" * 40


def test_other_figures_keep_their_mathematics(tmp_path):
    import matplotlib

    draw_grid(["$a"], tmp_path / "a.png")
    assert matplotlib.rcParams["text.parse_math"] is True
