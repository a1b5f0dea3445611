"""What fastdiff evaluate measures of text_to_image runs: classes, combinations of attributes, texts."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from text_to_image_runs import CROSS, DIT, Q_FORMER, write_reader, write_recipe

import fastdiff
from fastdiff import evaluate, sample, train, visualization
from fastdiff.tasks.text_to_image.evaluate import load_data_of
from fastdiff.tasks.text_to_image.run import TextToImageRun


@pytest.fixture
def few_features(monkeypatch):
    """In place of EfficientNet-Lite0: the mean colours of the four quarters of an image."""
    from fastdiff.evaluation import efficientnet

    def features(images, indices=None, **_):
        images = images if isinstance(images, torch.Tensor) else images.images(indices)
        return torch.nn.functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1), 2).flatten(1)

    monkeypatch.setattr(efficientnet, "image_features", features)


def measured(run, *options):
    evaluate.main([str(run), *map(str, options)])
    return json.loads((run / "evaluation.json").read_text())


def test_measures_of_classes(cross_run, few_features, capsys):
    report = measured(cross_run, "--num-samples", 20)
    assert report["step"] == 4 and report["samples"]["images"] == report["held_out"]["images"] == 20
    assert report["held_out"]["class_accuracy"] > 0.5 > report["samples"]["class_accuracy"]
    assert report["efficientnet_lite0"]["samples"] > report["efficientnet_lite0"]["held_out"]
    assert "real held-out" in capsys.readouterr().out


def test_samples_of_enlarged_images_are_classified_at_the_size_of_the_data(few_features, cache, tmp_path):
    """A classifier of the images as they are is there already, and no other is trained."""
    from fastdiff.data import DataConfig, load_data
    from fastdiff.evaluation.classifier import classifier_file, load_or_train_classifier

    recipe = write_recipe(
        tmp_path / "recipe.yaml", CROSS, model={"input_size": 16}, data={"resize": 16}, training={"max_steps": 1}
    )
    train.main([str(recipe), "--training.output_dir", str(tmp_path / "run")])
    load_or_train_classifier(load_data(DataConfig(name="digits")), progress=False)
    report = measured(tmp_path / "run", "--num-samples", 20)
    assert report["held_out"]["class_accuracy"] > 0.5
    assert not classifier_file(load_data(DataConfig(name="digits", resize=16))).exists()


def test_measures_of_combinations(few_features, tmp_path, capsys, monkeypatch):
    """Tinted garments: classes and colours that were trained on together, and others."""
    from data.small_fashion import write_fashion

    (tmp_path / "fashion").mkdir()
    write_fashion(tmp_path / "fashion", garments=16)
    model = {"input_size": 32, "patch_size": 16, "in_channels": 3, "num_classes": 1, "hidden_size": 32, "num_heads": 2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", Q_FORMER, train="all", model={**model, "depth": 1},
        data={"name": "colored_fashion", "folder": str(tmp_path / "fashion")},
        text_encoder={"name": str(write_reader(tmp_path / "reader", "a red shirt on blue"))}, sampling={"prompts": []},
    )  # fmt: skip
    train.main([str(recipe), "--training.output_dir", str(tmp_path / "run"), "--training.max_steps", "1"])
    capsys.readouterr()
    report = measured(tmp_path / "run", "--num-samples", 30)
    groups = report["attributes"]
    assert groups["samples_seen"]["images"] + groups["samples_unseen"]["images"] == 30
    assert groups["samples_unseen"]["images"] > 5 and groups["held_out_unseen"]["images"] > 5
    assert set(groups["samples_seen"]["accuracy"]) == {"class", "color", "background"}
    assert groups["held_out_seen"]["accuracy"]["color"] > groups["samples_seen"]["accuracy"]["color"]
    assert report["seen"]["samples"]["images"] == 15
    assert "samples, unseen" in capsys.readouterr().out
    seen = []
    monkeypatch.setattr(visualization, "save_captioned_grid", lambda *given, **options: seen.append((given, options)))
    study = tmp_path / "study.yaml"
    drawn = "count: 3, num_inference_steps: 1"
    study.write_text(f"entries: [{{name: a, combinations: unseen, {drawn}}}, {{name: b, combinations: both, {drawn}}}]")
    sample.main([str(tmp_path / "run"), "--config", str(study)])
    (((images, unseen, _), _), ((_, both, _), options)) = seen
    assert images.shape == (3, 3, 32, 32) and both[1::2] == list(unseen)
    assert options["headings"] == ("seen in training", "never seen") and len(both) == 6
    data = load_data_of(fastdiff.load(tmp_path / "run"))
    rows = data.captions.rows("held_out", ("caption",))
    for index, text in enumerate(both):
        of_text = (rows == data.captions.texts.index(text)).any(1)
        assert of_text.any() and (data.seen[of_text] == (index % 2 == 0)).all()


COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}


def test_measures_of_texts(few_features, tmp_path, capsys, monkeypatch):
    """Pictures with captions alone: is the picture of a text the one that its sample is nearest to?"""
    (tmp_path / "pictures").mkdir()
    pictures = {}
    for top, bottom in itertools.permutations(COLORS, 2):
        pixels = np.array([COLORS[top]] * 32 + [COLORS[bottom]] * 32, np.uint8).reshape(8, 8, 3) * 255
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{top}_{bottom}.png")
        pictures[f"{top} over {bottom}"] = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    lines = [{"file": f"{text.replace(' over ', '_')}.png", "caption": text} for text in pictures]
    lines.append({"file": "red_green.png", "caption": "green over red"})  # a text of two pictures
    (tmp_path / "pictures" / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = write_recipe(
        tmp_path / "recipe.yaml", Q_FORMER, train="all", model={**DIT["model"], "in_channels": 3, "num_classes": 1},
        data={"name": "captions_folder", "folder": f"{tmp_path}/pictures", "image_size": 8, "held_out_fraction": 0.3},
        text_encoder={"name": str(write_reader(tmp_path / "reader", " ".join(["over", *COLORS])))},
        sampling={"prompts": ["red over blue"]},
    )  # fmt: skip
    run = tmp_path / "run"
    train.main([str(recipe), "--training.output_dir", str(run), "--training.max_steps", "1"])
    capsys.readouterr()
    report = measured(run, "--num-samples", 6)
    for part in ("train", "held_out"):
        found = report[f"retrieval_{part}"]
        assert found["samples"] == found["candidates"] == 6 and found["chance"] == pytest.approx(1 / 6)
    assert report["nearest_training_image"]["samples"]["smallest"] > 0
    assert "texts of held-out images:" in capsys.readouterr().out

    def as_their_pictures(self, conditions, *_, **__):
        return torch.stack([pictures[text] for text in conditions.texts])

    monkeypatch.setattr(TextToImageRun, "draw", as_their_pictures)
    report = measured(run, "--num-samples", 6)
    assert [report[f"retrieval_{part}"]["first"] for part in ("train", "held_out")] == [1, 1]
    nearest = report["nearest_training_image"]
    assert nearest["samples"]["smallest"] < 1e-3 < nearest["held_out"]["smallest"]
