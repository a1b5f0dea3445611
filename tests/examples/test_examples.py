"""Each example, as a user runs it, at a small size."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
TINY = {"max_steps": 3, "hidden_size": 32}


@pytest.fixture
def example(monkeypatch):
    """Imports an example by its name, from its folder, as `python examples/NAME.py` would."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def numbers_run(tmp_path_factory):
    """A run of train_language_model, hardly trained: the examples of text are about what is done with one."""
    folder = tmp_path_factory.mktemp("runs") / "numbers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(FOLDER)
        loaded = importlib.import_module("train_language_model").main(str(folder), **TINY)
        assert loaded.step == TINY["max_steps"] and loaded.model.config.length_format == "eos_fill"
        yield str(folder)


def test_accelerate_dit_block(example):
    assert example("accelerate_dit_block").main(batch=2, tokens=8, dim=64, seconds=0.01) < 1e-5


def test_train_dit_goes_on_where_it_stopped(example, tmp_path):
    train, folder = example("train_dit").main, tmp_path / "run"
    outcome = train(str(folder), max_steps=2, hidden_size=32, depth=1)
    assert outcome.finished and outcome.steps == 2 and (folder / "samples.png").is_file()
    assert train(str(folder), max_steps=2, hidden_size=32, depth=1).checkpoint == outcome.checkpoint


def test_sample_dit(example, tmp_path, capsys):
    run, picture = str(tmp_path / "run"), tmp_path / "grid.png"
    options = {"output": picture, "classes": ("3", "7"), "num_images": 2}
    images = example("sample_dit").main(run, **options, max_steps=2, hidden_size=32, depth=1)
    assert len(images) == 4 and images[0].size == (8, 8)
    assert Image.open(picture).size == (2 * 40, 2 * 40)
    again = example("sample_dit").main(run, **options)  # the run is there now, and the seed is the same
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]


def test_text_to_image(example, tmp_path):
    run, picture = str(tmp_path / "run"), tmp_path / "prompts.png"
    images = example("text_to_image").main(run, picture, ("3", "7"), 2, max_steps=2, hidden_size=32, depth=1)
    assert images.shape == (4, 1, 8, 8) and Image.open(picture).format == "PNG"
    assert images.equal(example("text_to_image").main(run, picture, ("3", "7"), 2))  # the run is there now


def test_stream_decoding(example, numbers_run, capsys):
    sample, left = example("stream_decoding").main(numbers_run, "12", max_new_tokens=8)
    assert left[0] < 8 and left[-1] == 0 and left == sorted(set(left), reverse=True)  # each step fills some
    text = capsys.readouterr().out
    assert f"step {len(left) - 1},  0 masks left" in text and repr(sample.text) in text


def test_predict_length(example, numbers_run):
    covered, statistics = example("predict_length").main(numbers_run, coverage=0.8, num_pairs=16)
    assert 0 <= covered <= 1 and statistics.probe_passes >= 1  # 8 pairs, of a model that knows nothing


def test_qgfd_in_transformers(example):
    accuracies, same = example("qgfd_in_transformers").main(epochs=1, hidden_size=32, layers=1)
    assert same and sorted(accuracies) == [0, 1]


def test_masked_loss_in_your_loop(example):
    difference, losses = example("masked_loss_in_your_loop").main(max_steps=50, dim=32, batch_size=8)
    assert difference < 1e-4 and sum(losses[-10:]) < sum(losses[:10])


def test_plot_uncertainty(example, numbers_run, tmp_path):
    picture = tmp_path / "uncertainty.png"
    entropy = example("plot_uncertainty").main(numbers_run, "12", picture, max_new_tokens=4)
    assert entropy.shape == (4, 4) and Image.open(picture).width > 500
    assert (~entropy.isnan()).sum(1).tolist() == [4, 3, 2, 1]  # what is chosen has no entropy any more
    assert entropy.nan_to_num().min() >= 0


@pytest.mark.parametrize("name", NAMES)
def test_each_is_short_and_uses_what_is_public(name):
    source = (FOLDER / f"{name}.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 45
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastdiff."):
            public = importlib.import_module(node.module).__all__
            assert {alias.name for alias in node.names} <= set(public), node.module


def test_the_readme_lists_them_all():
    listed = re.findall(r"^\| \[(\w+)\.py\]\((\w+)\.py\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in listed) == NAMES and all(name == target for name, target in listed)


def test_one_runs_from_the_command_line(numbers_run, tmp_path):
    command = [sys.executable, FOLDER / "stream_decoding.py", numbers_run, "12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("12 is "), done.stderr
