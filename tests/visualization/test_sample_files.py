"""Samples as sounds, videos and tables: what the files hold, and what is refused."""

import csv

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from scipy.io import wavfile

from fastdiff.data import TabularDataConfig, load_tabular_data
from fastdiff.visualization import (
    save_contact_sheet,
    save_marginals,
    save_spectrograms,
    save_table_csv,
    save_video_gif,
    save_wav,
)
from fastdiff.visualization.figures import REAL, SYNTHETIC
from fastdiff.visualization.sounds import _decibels


def tones(*hertz, rate=8000, samples=2000):
    return torch.stack([0.5 * torch.sin(2 * torch.pi * f * torch.arange(samples) / rate) for f in hertz])


def test_wav_of_one_and_of_several(tmp_path):
    waveforms = tones(300, 700)
    rate, samples = wavfile.read(save_wav(waveforms[0], 8000, tmp_path / "one.wav"))
    assert rate == 8000 and samples.dtype == np.int16
    assert np.abs(samples / 32767 - waveforms[0].numpy()).max() <= 0.51 / 32767
    _, both = wavfile.read(save_wav(waveforms, 8000, tmp_path / "both.wav", gap=0.1))
    assert len(both) == 2000 + 800 + 2000 and not both[2000:2800].any() and np.array_equal(both[:2000], samples)
    _, clipped = wavfile.read(save_wav(torch.tensor([-9.0, 9.0]), 8000, tmp_path / "clipped.wav"))
    assert clipped.tolist() == [-32767, 32767]


def test_spectrograms_show_the_pitch(tmp_path, figures):
    """The loudest row of a picture lies at the tone's frequency."""
    for hertz in (500, 3000):
        path = save_spectrograms(tones(hertz), 8000, tmp_path / "tone.png", names=["$a$"], title="a tone")
        assert Image.open(path).format == "PNG"
        (image,) = figures[-1].axes[0].images
        _, seconds, low, kilohertz = image.get_extent()
        assert (seconds, low, kilohertz) == (0.25, 0, 4) and image.origin == "lower"
        loudness = image.get_array().mean(1)
        assert loudness.argmax() / len(loudness) * 4000 == pytest.approx(hertz, abs=4000 / len(loudness))


def test_decibels():
    image = _decibels(np.stack([tones(1000)[0].numpy(), 0.01 * tones(1000)[0].numpy()]), 8000)
    assert image.max() == 0 and image.min() >= -60 - 1e-9
    assert image[0].max() - image[1].max() == pytest.approx(40, abs=1e-3)  # a hundredth of the amplitude
    assert _decibels(np.zeros((1, 100)), 8000).max() == pytest.approx(-60)  # silence
    assert _decibels(np.ones((1, 3)), 8000).ndim == 3  # shorter than a window


def test_many_spectrograms_and_refusals(tmp_path, figures):
    save_spectrograms(tones(*range(300, 1000, 100)), 8000, tmp_path / "seven.png", columns=3)
    assert [len(axes.images) for axes in figures[0].axes[:9]] == [1] * 7 + [0] * 2
    with pytest.raises(ValueError, match="names: got 1 for 2 waveforms"):
        save_spectrograms(tones(300, 400), 8000, tmp_path / "none.png", names=["a"])
    for write in (save_wav, save_spectrograms):
        with pytest.raises(ValueError, match=r"waveforms: got shape \(1, 2, 3\)"):
            write(torch.zeros(1, 2, 3), 8000, tmp_path / "none")
        with pytest.raises(ValueError, match="not empty"):
            write(torch.zeros(0, 5), 8000, tmp_path / "none")
        with pytest.raises(ValueError, match="not finite"):
            write(torch.tensor([0.0, torch.nan]), 8000, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seven.png"]


def videos(count=3, frames=4, channels=1):
    """Each frame has its own grey."""
    grey = torch.linspace(-1, 1, count * frames).view(count, frames, 1, 1, 1)
    return grey.expand(count, frames, channels, 6, 8).clone()


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_has_every_frame(tmp_path, channels):
    path = save_video_gif(videos(channels=channels), tmp_path / "v.gif", columns=2, frames_per_second=10, scale=2)
    with Image.open(path) as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0 and gif.size == (2 * 17, 2 * 13)
        expected = ((videos()[:, :, 0, 0, 0] + 1) * 127.5).round().numpy()
        for frame in range(4):
            gif.seek(frame)
            assert gif.info["duration"] == 100
            pixels = np.asarray(gif.convert("L")).astype(int)
            for video, (top, left) in enumerate(((0, 0), (0, 18), (14, 0))):
                block = pixels[top : top + 12, left : left + 16]
                assert np.abs(block - expected[video, frame]).max() <= 1
            assert (pixels[14:, 18:] == 255).all()  # no fourth video


def test_gif_of_one_video(tmp_path):
    with Image.open(save_video_gif(videos()[0], tmp_path / "v.gif", scale=1)) as gif:
        assert gif.size == (8, 6) and gif.n_frames == 4


def test_contact_sheet(tmp_path, figures):
    """One row a video, its frames from left to right."""
    save_contact_sheet(videos() * 0.8, tmp_path / "v.png", names=["a", "b", "a"], title="three")
    sheet = np.asarray(figures[0].axes[0].images[0].get_array()).squeeze()
    greys = ((videos()[:, :, 0, 0, 0] * 0.8 + 1) * 127.5).round().numpy()
    for row, column in np.ndindex(3, 4):
        top, left = row * (6 + 1), column * (8 + 1)
        assert (sheet[top : top + 6, left : left + 8] == greys[row, column]).all()


def test_videos_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"videos: got shape \(3, 4, 2, 6, 8\); expected \[N, F, 1 or 3, H, W\]"):
        save_video_gif(videos(channels=2), tmp_path / "v.gif")
    with pytest.raises(ValueError, match="not empty"):
        save_contact_sheet(videos()[:0], tmp_path / "v.png")
    with pytest.raises(ValueError, match="names: got 1 for 3 videos"):
        save_contact_sheet(videos(), tmp_path / "v.png", names=["a"])
    with pytest.raises(ValueError, match="frames_per_second: got 0"):
        save_video_gif(videos(), tmp_path / "v.gif", frames_per_second=0)
    assert not list(tmp_path.iterdir())


def test_csv_is_read_back_as_it_was(tmp_path):
    """The file of a table is a table of the same columns, types and rows."""
    iris = load_tabular_data(TabularDataConfig(name="iris"))
    table = iris.table(iris.train)
    path = save_table_csv(table, tmp_path / "iris.csv")
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(table) and len(rows) == 1 + len(iris.train)
    first = [column[0] for column in table.values()]
    assert rows[1] == [v if isinstance(v, str) else f"{v:.6f}".rstrip("0").rstrip(".") for v in first]
    again = load_tabular_data(TabularDataConfig(name="csv", path=str(path), target="species"))
    assert again.class_names == iris.class_names
    assert [c.decimals for c in again.schema.numbers] == [c.decimals for c in iris.schema.numbers]
    assert len(again.train) + len(again.held_out) == len(iris.train)


def test_names_with_commas_are_quoted(tmp_path):
    table = {"a, b": np.array(["x\ny", 'say "z"'], dtype=object), "n": np.array([1.0, 2.5])}
    with save_table_csv(table, tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a, b", "n"], ["x\ny", "1"], ['say "z"', "2.5"]]


def test_marginals_show_both_tables(tmp_path, figures):
    generator = np.random.default_rng(0)
    real = {"x": generator.normal(size=200), "kind": np.array(list("ab") * 100, dtype=object)}
    synthetic = {"x": generator.normal(3, 1, size=50), "kind": np.array(list("abbb") * 12 + list("bb"), dtype=object)}
    save_marginals(real, synthetic, tmp_path / "m.png", title="both")
    numbers, kinds = figures[0].axes[:2]
    for patches, values in zip((numbers.patches[:2], numbers.patches[2:]), (real["x"], synthetic["x"]), strict=True):
        for patch in patches:  # filled, and its outline
            colour = patch.get_facecolor() if patch.get_fill() else patch.get_edgecolor()
            assert to_hex(colour) == (REAL if values is real["x"] else SYNTHETIC).lower()
            heights, edges, _ = patch.get_data()
            np.testing.assert_allclose(heights, np.histogram(values, edges)[0] / len(values) / np.diff(edges))
    heights = {to_hex(bars[0].get_facecolor()): [bar.get_height() for bar in bars] for bars in kinds.containers}
    assert heights == {REAL.lower(): [0.5, 0.5], SYNTHETIC.lower(): [0.24, 0.76]}
    assert [label.get_text() for label in kinds.get_xticklabels()] == ["a", "b"]


def test_rare_categories_share_a_bar(tmp_path, figures):
    many = {"word": np.array([f"w{i % 40}" for i in range(200)] + ["w7"], dtype=object)}
    save_marginals(many, {"word": np.array(["w7", "new"], dtype=object)}, tmp_path / "many.png")
    axes = figures[0].axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len(labels) == 12 and labels[0] == "w7" and labels[-1] == "others"
    assert [bar.get_height() for bar in axes.containers[1]] == pytest.approx([0.5] + [0] * 10 + [0.5])


def test_marginals_and_tables_that_are_refused(tmp_path):
    table = {"x": np.zeros(3)}
    with pytest.raises(ValueError, match="expected the same ones, with rows"):
        save_marginals(table, {"y": np.zeros(3)}, tmp_path / "m.png")
    with pytest.raises(ValueError, match="expected the same ones, with rows"):
        save_marginals(table, {"x": np.zeros(0)}, tmp_path / "m.png")
    for columns in ({}, {"x": np.zeros(3), "y": np.zeros(2)}):
        with pytest.raises(ValueError, match="all of one length"):
            save_table_csv(columns, tmp_path / "t.csv")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = save_wav(tones(300), 8000, tmp_path / "a.wav")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (
        lambda: save_wav(tones(900), 8000, path),
        lambda: save_video_gif(videos(), path),
        lambda: save_contact_sheet(videos(), path),
        lambda: save_table_csv({"x": np.zeros(3)}, path),
        lambda: save_marginals({"x": np.arange(3.0)}, {"x": np.arange(3.0)}, path),
        lambda: save_spectrograms(tones(900), 8000, path),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
