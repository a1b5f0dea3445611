"""The demo, shortened to a second: it measures, trains, scores and reports."""

import dataclasses
import json
import os
import signal

import pytest

from fastdiff import demo


def test_demo_leaves_its_report(tiny_yaml, tmp_path, capsys):
    folder = tmp_path / "demo"
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--seconds", "0.01", "--recipe", str(tiny_yaml), "--output-dir", str(folder)])
    captured = capsys.readouterr()
    # 20 steps train nothing, and the demo says so instead of reporting success
    assert exit_.value.code == 1 and "error: the model is not trained: it made 20 steps" in captured.err
    assert {path.name for path in folder.iterdir()} >= {"samples.png", "loss.png", "report.json", "checkpoints"}
    report = json.loads((folder / "report.json").read_text())
    assert report["samples"]["images"] == 500 and 0 <= report["class_accuracy"] <= 1
    assert report["machine"]["training_steps"] == 20 and report["held_out"]["images"] == 179
    speed = report["speed"]
    assert speed["speedup"] == pytest.approx(speed["fastdiff_images_per_second"] / speed["reference_images_per_second"])
    output = captured.out
    for phase in ("[3/5] measure", "[4/5] train", "[5/5] classify"):
        assert phase in output
    assert "reference kernels, same model" in output and "Fréchet distance (classifier features)" in output


def test_demo_prints_the_next_command(tmp_path, capsys):
    demo._tell_what_is_next(tmp_path, 0.98, 5000, 280.0)
    assert f"fastdiff sample {tmp_path} --labels" in capsys.readouterr().out


def test_an_unusable_cache_is_known_at_once(tiny_yaml, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(demo, "measure_rates", lambda *_, **__: pytest.fail("measured before the cache was tried"))
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--recipe", str(tiny_yaml), "--output-dir", str(tmp_path / "demo")])
    assert exit_.value.code == 2 and "set FASTDIFF_CACHE to a folder that can" in capsys.readouterr().err


def training_of(make_recipe, tmp_path, digits, seconds, **training):
    recipe = make_recipe("--training.output_dir", tmp_path / "demo", "--training.log_every", 1)
    settings = dataclasses.replace(recipe.training, checkpoint_every=10_000, **training)
    return demo._train(recipe, settings, digits, seconds)


def test_a_machine_that_is_too_slow_for_the_first_tenth_ends_in_time(make_recipe, tmp_path, digits):
    _, outcome = training_of(make_recipe, tmp_path, digits, 1e-9, max_steps=100_000)  # ten thousand steps first
    assert outcome.steps < 100 and outcome.finished and not outcome.interrupted
    assert (tmp_path / "demo" / "samples.png").is_file()  # what there is counts


@pytest.mark.parametrize(
    ("step", "seconds", "max_steps"),
    [(3, 100.0, 100), (30, 1e-9, 10)],  # in the first tenth; after it, when the time is over
)
def test_ctrl_c_ends_the_demo_whatever_the_time(make_recipe, tmp_path, digits, monkeypatch, step, seconds, max_steps):
    from fastdiff.tasks.dit.task import DiTTask

    whole = DiTTask.batch

    def stop(task, number, slots):
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(task, number, slots)

    monkeypatch.setattr(DiTTask, "batch", stop)
    monkeypatch.setattr(demo, "_FEWEST_STEPS", 200)
    _, outcome = training_of(make_recipe, tmp_path, digits, seconds, max_steps=max_steps)
    assert outcome.interrupted and not outcome.finished and outcome.steps == step + 1
