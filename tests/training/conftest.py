"""A DiT so small that a step takes milliseconds, trained on scikit-learn's digits."""

import json
from pathlib import Path

import pytest
import yaml

TINY = {
    "model": {
        "input_size": 8,
        "patch_size": 4,
        "in_channels": 1,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 10,
        "class_dropout_prob": 0.2,
    },
    "diffusion": {"prediction_type": "flow", "noise_levels": "logit_normal"},
    "data": {"name": "digits"},
    "training": {
        "batch_size": 8,
        "max_steps": 12,
        "checkpoint_every": 5,
        "keep_last": 2,
        "log_every": 3,
        "warmup_steps": 3,
        "mixed_precision": "no",
        "device": "cpu",
    },
    "sampling": {"num_inference_steps": 2, "images_per_class": 2},
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder for all runs; the classifier that lies there is trained for four epochs instead of fifteen."""
    from fastdiff.evaluation.classifier import Schedule

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Schedule, "for_size", staticmethod(lambda images: Schedule(epochs=4, batch_size=64)))
        yield


@pytest.fixture
def tiny_yaml(tmp_path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def make_recipe(tiny_yaml):
    """make_recipe("--training.max_steps", 3, …) → DiTRecipe."""
    from fastdiff.recipes import parse_recipe
    from fastdiff.tasks.dit.recipe import DiTRecipe

    return lambda *options: parse_recipe(DiTRecipe, [str(tiny_yaml), *map(str, options)])


@pytest.fixture(scope="session")
def digits():
    """The digits, loaded once."""
    from fastdiff.data import DataConfig, load_data

    return load_data(DataConfig(name="digits"))


@pytest.fixture
def make_trainer(make_recipe, digits):
    """make_trainer(folder, "--training.max_steps", 3, …) → Trainer of the tiny recipe."""
    from fastdiff.tasks.dit.task import DiTTask
    from fastdiff.training import Trainer

    def make(folder, *options):
        recipe = make_recipe("--training.output_dir", folder, *options)
        return Trainer(DiTTask(recipe, digits), recipe.training)

    return make


@pytest.fixture
def curve():
    """curve(folder) → the deterministic columns of its metrics.jsonl."""

    def read(folder):
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["gradient_norm"], line["learning_rate"]) for line in lines]

    return read


@pytest.fixture
def same_files():
    """same_files(a, b): asserts that two checkpoints hold the same bytes."""

    def check(first: Path, second: Path):
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name

    return check


@pytest.fixture
def batches_in_step(monkeypatch):
    """Each batch is made in its own step, not a step ahead: a signal sent when a batch is made comes in that step."""
    monkeypatch.setattr("fastdiff.training.trainer.pays", lambda device: False)


@pytest.fixture(scope="session")
def dit_run(tmp_path_factory, cache):
    """A DiT that was trained on the digits' labels."""
    from text_to_image_runs import DIT

    return _trained(tmp_path_factory.mktemp("dit"), DIT)


@pytest.fixture(scope="session")
def q_former_run(tmp_path_factory, cache, dit_run):
    """A Q-Former that was trained for that DiT, which stayed as it was."""
    from text_to_image_runs import Q_FORMER

    return _trained(tmp_path_factory.mktemp("q_former"), Q_FORMER, dit_from=str(dit_run))


@pytest.fixture(scope="session")
def cross_run(tmp_path_factory, cache):
    """A DiT that attends to its prompts."""
    from text_to_image_runs import CROSS

    return _trained(tmp_path_factory.mktemp("cross"), CROSS)


def _trained(folder, recipe, **changes):
    from text_to_image_runs import write_recipe

    from fastdiff import train

    train.main([str(write_recipe(folder / "recipe.yaml", recipe, **changes)), "--training.output_dir", f"{folder}/run"])
    return folder / "run"
