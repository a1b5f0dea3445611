"""README.md of a saved model: it can be parsed, used as it stands, and claims nothing of other weights."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from tasks.conftest import KINDS

import fastdiff
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.kinds import kind_named

IMAGES = {
    "run": "runs/x", "step": 3, "weights": "ema", "guidance_scale": 1.5, "num_inference_steps": 25, "sampler": None,
    "seed": 0, "samples": {"class_accuracy": 0.9876543, "count": 10, "per_class": [1, 2]},
}  # fmt: skip


@pytest.fixture
def run_folder(runs, tmp_path):
    folder = shutil.copytree(runs / "dit", tmp_path / "my_run")
    (folder / "evaluation.json").write_text(json.dumps(IMAGES))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_can_be_used_as_it_stands(runs, kind, tmp_path, monkeypatch):
    fastdiff.load(runs / kind, device="cpu").save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.to_dict() == {"library_name": "fastdiff", "tags": ["fastdiff", "diffusion", kind]}
    assert f"# {kind}\n" in card.text and kind_named(kind).about in card.text
    assert "after 3 training steps (averaged weights)" in card.text and "## Numbers" not in card.text
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    values = yaml.safe_load(recipe)
    assert values["task"] == kind and "output_dir" not in values["training"]
    again = parse_recipe(kind_named(kind).get("recipe"), [str(tmp_path / "recipe.yaml")])
    trained = fastdiff.load(runs / kind, device="cpu").recipe
    assert dataclasses.replace(again, training=trained.training) == trained
    (example,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    example = example.replace("PATH_OR_HUB_ID", str(tmp_path / "saved"))
    example = example.replace("THE_LANGUAGE_MODEL", str(runs / "masked_lm" / "checkpoints" / "step_2"))
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "sample.png").is_file() if kind == "dit" else said.getvalue()


def test_numbers_and_picture_are_of_these_weights_alone(run_folder, tmp_path):
    def card(path, **options):
        fastdiff.load(path, device="cpu", **options).save_pretrained(tmp_path / "out")
        text, picture = (tmp_path / "out" / "README.md").read_text(), tmp_path / "out" / "samples.png"
        shown = "](samples.png)" in text
        assert shown == picture.is_file()
        shutil.rmtree(tmp_path / "out")
        return text, shown

    text, shown = card(run_folder)
    assert shown and "# my_run\n" in text
    assert "measured (num_inference_steps 25, guidance_scale 1.5, seed 0):" in text
    assert "| samples.class_accuracy | 0.9877 |\n| samples.count | 10 |" in text and "samples.per_class" not in text
    assert "| step" not in text and "| seed" not in text
    for path, options in ((run_folder, {"weights": "model"}), (run_folder / "checkpoints" / "step_2", {})):
        text, shown = card(path, **options)
        assert not shown and "## Numbers" not in text
    assert "(averaged weights)" not in card(run_folder, weights="model")[0]
    (run_folder / "evaluation.json").write_text("{")
    assert "## Numbers" not in card(run_folder)[0]
    (run_folder / "samples.png").unlink()
    assert not card(run_folder)[1]


def test_a_card_goes_with_its_model(run_folder, tmp_path):
    fastdiff.load(run_folder, device="cpu").save_pretrained(tmp_path / "first")
    fastdiff.load(tmp_path / "first", device="cpu").save_pretrained(tmp_path / "second")
    for name in ("README.md", "samples.png"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    again = fastdiff.load(tmp_path / "first", device="cpu")
    again.save_pretrained(tmp_path / "first")  # onto itself
    assert "## Recipe" in (tmp_path / "first" / "README.md").read_text()
    (tmp_path / "second" / "README.md").write_text("# Somebody's notes")
    fastdiff.load(tmp_path / "second", device="cpu").save_pretrained(tmp_path / "third")
    text = (tmp_path / "third" / "README.md").read_text()
    assert "# third\n" in text and "library_name: fastdiff" in text and "## Recipe" not in text
