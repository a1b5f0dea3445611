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
def test_ctrl_c_ends_the_demo_whatever_the_time(
    make_recipe, tmp_path, digits, monkeypatch, step, seconds, max_steps, batches_in_step
):
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


@pytest.mark.parametrize(("rate", "expected"), [(600, 0), (400, 1), (100, 2), (1, 2)])
def test_the_size_is_the_largest_whose_steps_fit(rate, expected):
    """A size of half the layers trains twice as fast. None is measured that is smaller than the one that fits."""
    asked = []

    def images_per_second(size):
        asked.append(size)
        return rate * 6 / size.model.get("depth", 6)

    assert demo.fit_size(demo.SIZES, images_per_second, 32, 280.0) is demo.SIZES[expected]
    assert asked == list(demo.SIZES[: min(expected + 1, 2)])


def test_a_machine_that_became_slower_begins_anew_with_a_smaller_model(
    make_recipe, tmp_path, digits, monkeypatch, capsys
):
    recipe = make_recipe("--training.output_dir", tmp_path / "demo", "--training.log_every", 1)
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, overwrite=True))
    sizes = (demo.Size({}, 10**6, 1.0), demo.Size({"depth": 1}, 0, 2.0))
    rates = iter((1e9, 1e9, 100.0))  # the trial, the measurement, and that of the smaller size
    monkeypatch.setattr(demo, "measure_rates", lambda *_, **__: dict.fromkeys(("auto", "reference"), next(rates)))
    monkeypatch.setattr(demo, "_FEWEST_STEPS", 3)
    real = demo._train

    def soon(recipe, training, data, seconds, least=0):  # a tenth of the steps of so fast a machine would take hours
        return real(recipe, dataclasses.replace(training, max_steps=min(training.max_steps, 30)), data, seconds, least)

    monkeypatch.setattr(demo, "_train", soon)
    trainer, outcome, measured = demo._fit_and_train(recipe, sizes, digits, 4.0, {"load_before": 0.0, "cores": 2})
    assert len(trainer.task.model.blocks) == 1 and outcome.finished and measured["auto"] == 100.0
    text = capsys.readouterr().out
    assert "the machine became slower" in text and text.count("train: ") == 2
