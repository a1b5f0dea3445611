"""The demo, shortened to a second: it measures, trains, scores and reports."""

import json

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
