"""Runs that fastdiff 0.1.0 trained are loaded, sampled and resumed."""

import json

import pytest
import torch
from torch.testing import assert_close

import fastdiff
from fastdiff import train
from fastdiff.training.checkpoint import read_state
from fastdiff.training.provenance import check_data


@pytest.fixture(scope="module")
def expected(old_runs):
    return json.loads((old_runs / "expected.json").read_text())


def test_a_dit_draws_the_same_images(old_runs, expected):
    run = fastdiff.load(old_runs / "dit", device="cpu")
    assert run.class_names[3] == "3" and run.step == 2
    images = run.sample(["0", "3", 7], output_type="pt")
    assert_close(images.flatten(1)[:, :16], torch.tensor(expected["dit"]), rtol=1e-4, atol=1e-4)
    picture = run.sample([3])[0]
    assert picture.size == (8, 8) and picture.mode == "L"


def test_a_language_model_writes_the_same_tokens(old_runs, expected):
    run = fastdiff.load(old_runs / "masked_lm", device="cpu")
    samples = run.generate(["12", "7"], max_new_tokens=8, block_length=8, seed=1)
    assert [sample.tokens for sample in samples] == expected["masked_lm"]


def test_a_qgfd_model_draws_the_same_rows(old_runs, expected):
    run = fastdiff.load(old_runs / "qgfd", device="cpu")
    rows = run.sample(num_samples=3).batch["numbers"]
    assert_close(rows, torch.tensor(expected["qgfd"]), rtol=1e-4, atol=1e-4)


def test_a_length_head_is_read(old_runs):
    run = fastdiff.load(old_runs / "length_head", device="cpu")
    assert run.model.kind == "regression" and run.step == 2
    with pytest.raises(TypeError, match="length_head"):
        run.sample()


def test_classes_that_moved_are_refused(old_runs):
    state = read_state(old_runs / "dit" / "checkpoints" / "step_2")
    names = state["task"]["class_names"]
    with pytest.raises(ValueError, match="data.class_names: got another order of the classes"):
        check_data(state, {"data": {"class_names": names[::-1]}}, "'x'", False, "--accept")
    check_data(state, {"data": {"class_names": names}}, "'x'", False, "--accept")


@pytest.mark.parametrize("kind", ["dit", "masked_lm", "qgfd"])
def test_training_goes_on(old_runs, kind, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    run = old_runs / kind
    train.main([str(run / "config.yaml"), "--training.resume", "true", "--training.max_steps", "3",
                "--training.output_dir", str(run)])  # fmt: skip
    captured = capsys.readouterr()
    assert "trained 3 steps" in captured.out
    # they kept no record, which is said once; from now on there is one
    assert captured.err.count("cannot be checked") == 1
    state = json.loads((run / "checkpoints" / "step_3" / "trainer_state.json").read_text())
    assert list(state["data"]) == ["tabular_data" if kind == "qgfd" else "data"] and "sha256" in state
    assert fastdiff.load(run).step == 3
