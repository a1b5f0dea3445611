"""`python -m fastdiff.generate --length auto`: with and without a calibration, and what is said of the tokens saved."""

import re
import shutil

import pytest
from generation.test_generate_cli import failure, output_of
from language_runs import write_run

from fastdiff.generation import MaskedDiffusionGenerationConfig
from fastdiff.generation.length import CALIBRATION_FILE, LengthPredictor, calibrate, save_calibrations
from fastdiff.generation.text import TextGenerator
from fastdiff.tasks.masked_lm.run import load_language_model, load_length_predictor

WINDOW = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Answers of `pad_fill` end in EoS or PAD."""
    folder = tmp_path_factory.mktemp("length") / "run"
    return write_run(folder, generation={"max_new_tokens": WINDOW, "block_length": 4}, length_format="pad_fill")


@pytest.fixture
def calibrated(run, tmp_path):
    """A copy of the run with a calibration beside its checkpoint."""
    copy = shutil.copytree(run, tmp_path / "run")
    loaded = load_language_model(copy, device="cpu")
    predictor = LengthPredictor(loaded.model, window=WINDOW)
    pairs = [([5 + i, 6, 7], [9] * (i % 5)) for i in range(40)]
    save_calibrations(loaded.source, [calibrate(predictor, pairs, 0.9, tokenizer=loaded.tokenizer)])
    assert (copy / "checkpoints" / "step_3" / CALIBRATION_FILE).is_file()
    return copy


def test_the_closing_line_tells_what_was_saved(calibrated, capsys):
    lines = output_of(capsys, calibrated, "--prompt", "To be", "--prompt", "or", "--length", "auto", "--seed", 1)
    told = re.search(r"; (\d+) of 24 window tokens saved \((\d+)%\), (\d) samples? grew", lines[-1])
    assert told and int(told[1]) % 4 == 0 and round(int(told[1]) / 24 * 100) == int(told[2])
    lines = output_of(capsys, calibrated, "--prompt", "To be", "--seed", 1)
    assert "saved" not in lines[-1]


def test_a_model_at_its_word(run, capsys):
    from fastdiff import generate as command

    command.main([str(run), "--prompt", "To be", "--length", "auto", "--coverage", "0.8", "--seed", "1"])
    assert "has no calibration, so coverage 0.8 is the model's own word; python -m fastdiff" in capsys.readouterr().err


def test_the_calibration_beside_the_checkpoint_is_used(calibrated, run):
    config = MaskedDiffusionGenerationConfig(max_new_tokens=8, length="auto", coverage=0.9)
    predictor = load_length_predictor(load_language_model(calibrated, device="cpu"), config)
    assert predictor.calibrated and predictor.window == WINDOW  # not max_new_tokens
    plain = load_length_predictor(load_language_model(run, device="cpu"), config)
    assert not plain.calibrated and plain.window == 8
    fixed = MaskedDiffusionGenerationConfig(max_new_tokens=8)
    assert load_length_predictor(load_language_model(run, device="cpu"), fixed) is None


def test_texts_end_before_the_filling(calibrated):
    loaded = load_language_model(calibrated, device="cpu")
    config = MaskedDiffusionGenerationConfig(max_new_tokens=WINDOW, block_length=4, length="auto", coverage=0.9, seed=1)
    generator = TextGenerator(loaded.model, loaded.tokenizer, config, load_length_predictor(loaded, config))
    assert set(generator.end_token_ids) == {0, 2}  # PAD, too
    [samples] = generator.generate(["To be"] * 2, generator.encode(["To be", "or not"]))
    assert all(not {0, 2} & set(sample.tokens) for sample in samples)
    assert generator.statistics.window_tokens == 2 * WINDOW


def test_calibrations_that_cannot_be_used(calibrated, run, tmp_path, capsys):
    options = ("--prompt", "To be", "--length", "auto")
    assert "coverage: got 1.5; expected a number in (0, 1)" in failure(capsys, run, *options, "--coverage", "1.5")
    assert "got 40 pairs; a coverage of 0.999 needs at least 999" in failure(
        capsys, calibrated, *options, "--coverage", "0.999"
    )
    other = calibrated / "checkpoints" / "step_2"
    shutil.copy(calibrated / "checkpoints" / "step_3" / CALIBRATION_FILE, other)
    assert "another checkpoint" in failure(capsys, other, *options)
    unnamed = write_run(tmp_path / "unnamed")
    assert "length_format: the model's config names none" in failure(capsys, unnamed, *options)
    assert "window tokens saved" in output_of(capsys, unnamed, *options, "--length-format", "eos_fill")[-1]
    fixed = options[:2] + ("--length-format", "eos_fill")
    assert "--length-format: got eos_fill without --length auto" in failure(capsys, unnamed, *fixed)
    long = "to be " * 20
    assert "and the length predictor's window is 12; expected at most 48" in failure(
        capsys, calibrated, "--prompt", long, "--length", "auto", "--max-new-tokens", 4
    )
