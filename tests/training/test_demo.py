"""The demo, shortened to a second: it measures, trains, scores and reports."""

import json

import pytest

from fastdiff import demo


def test_without_a_checkout_the_demo_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_RECIPE", tmp_path / "recipes" / "dit_mnist.yaml")
    with pytest.raises(SystemExit) as exit_:
        demo.main(["--output-dir", str(tmp_path / "demo")])
    text = capsys.readouterr().err
    assert exit_.value.code == 2 and "run the demo from a checkout" in text and text.count("\n") == 1


def test_demo_leaves_its_report(tiny_yaml, tmp_path, capsys):
    folder = tmp_path / "demo"
    demo.main(["--seconds", "0.01", "--recipe", str(tiny_yaml), "--output-dir", str(folder)])
    assert {path.name for path in folder.iterdir()} >= {"samples.png", "loss.png", "report.json", "checkpoints"}
    report = json.loads((folder / "report.json").read_text())
    assert report["samples"]["images"] == 500 and 0 <= report["class_accuracy"] <= 1
    assert report["machine"]["training_steps"] == 20 and report["held_out"]["images"] == 179
    speed = report["speed"]
    assert speed["speedup"] == pytest.approx(speed["fastdiff_images_per_second"] / speed["reference_images_per_second"])
    output = capsys.readouterr().out
    assert "reference kernels, same model" in output and "Fréchet distance (classifier features)" in output
