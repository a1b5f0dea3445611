"""Other data and other diffusions go through the same trainer, and come out as pictures."""

import numpy as np
import pytest

from fastdiff import sample, train
from fastdiff.training.checkpoint import list_checkpoints


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("leaf", "stone"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (17, 13, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_colour_images_of_a_folder(photos, tiny_yaml, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(
        [
            str(tiny_yaml),
            "--training.output_dir",
            str(run),
            "--training.max_steps",
            "3",
            "--data.name",
            "image_folder",
            "--data.folder",
            str(photos),
            "--data.image_size",
            "12",
            "--data.horizontal_flip",
            "true",
            "--model.input_size",
            "12",
            "--model.in_channels",
            "3",
            "--model.num_classes",
            "2",
            "--training.preview_every",
            "2",
        ]
    )
    assert "trained 3 steps" in capsys.readouterr().out and (run / "samples.png").exists()
    sample.main([str(run), "--labels", "stone, 0", "--images-per-label", "1"])
    assert capsys.readouterr().out.strip() == str(run / "samples-seed-0.png")


def test_the_number_of_classes_must_fit(photos, tiny_yaml, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(
            [
                str(tiny_yaml),
                "--training.output_dir",
                str(tmp_path / "run"),
                "--data.name",
                "image_folder",
                "--data.folder",
                str(photos),
                "--data.image_size",
                "8",
                "--model.in_channels",
                "3",
            ]
        )
    assert "model.num_classes: got 10; the data set image_folder has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prediction", "levels", "sampler", "learn_sigma"),
    [
        ("epsilon", "linear", "ddpm", "true"),
        ("v_prediction", "cosine", "ddim", "false"),
        ("sample", "beta", "renoise", "false"),
        ("flow", "uniform", "dpm-solver++", "false"),
    ],
)
def test_diffusions(make_trainer, tmp_path, prediction, levels, sampler, learn_sigma):
    outcome = make_trainer(
        tmp_path / "run",
        "--training.max_steps",
        2,
        "--diffusion.prediction_type",
        prediction,
        "--diffusion.noise_levels",
        levels,
        "--sampling.sampler",
        sampler,
        "--model.learn_sigma",
        learn_sigma,
    ).train()
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [outcome.checkpoint]
    assert (tmp_path / "run" / "samples.png").exists()


def test_training_lowers_the_loss(make_trainer, tmp_path, curve):
    make_trainer(
        tmp_path / "run",
        "--training.max_steps",
        150,
        "--training.schedule",
        "constant",
        "--training.learning_rate",
        3e-3,
        "--training.mixed_precision",
        "bf16",
    ).train()
    losses = [loss for _, loss, _, _ in curve(tmp_path / "run")]
    assert np.mean(losses[-30:]) < 0.75 * np.mean(losses[:10])


def test_flips_are_half_and_repeatable(make_recipe, digits):
    import torch

    from fastdiff.tasks.dit.task import DiTTask

    plain = DiTTask(make_recipe("--training.batch_size", 400), digits).batch(3, range(400))
    task = DiTTask(make_recipe("--training.batch_size", 400, "--data.horizontal_flip", "true"), digits)
    flipped = task.batch(3, range(400))
    same = (flipped["x0"] == plain["x0"]).flatten(1).all(1)
    mirrored = (flipped["x0"] == plain["x0"].flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 150 < mirrored.sum() < 250
    assert torch.equal(task.batch(3, range(100, 120))["x0"], flipped["x0"][100:120])


def test_labels_are_dropped_at_the_configured_rate(make_recipe, digits):
    from fastdiff.tasks.dit.task import DiTTask

    task = DiTTask(make_recipe("--training.batch_size", 1000), digits)
    batch = task.batch(0, range(1000))
    dropped = batch["labels"] == 10
    assert 150 < dropped.sum() < 250  # class_dropout_prob is 0.2
    kept = digits.train.labels[task.sample_ids(0)][~dropped]
    assert (batch["labels"][~dropped] == kept).all()
