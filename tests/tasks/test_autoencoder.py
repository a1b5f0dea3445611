"""Autoencoders: trained, resumed exactly, used, pictured, measured, saved for diffusers and read from it."""

import json
import shutil

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from tasks.test_load import fails
from tasks.test_pipelines import autoencoder
from torch.testing import assert_close

import fastdiff
from fastdiff import evaluate, sample, train, visualization
from fastdiff.data import DataConfig, load_data
from fastdiff.data.images import resized
from fastdiff.tasks.latents import LatentsConfig, load_latents

TINY = {
    "task": "autoencoder",
    "model": {"in_channels": 1, "sample_size": 16, "block_out_channels": [8, 16], "norm_num_groups": 4,
              "mid_block_add_attention": False},
    "objective": {"kl_weight": 1.0e-4},
    "data": {"name": "digits", "resize": 16},
    "training": {"batch_size": 16, "max_steps": 40, "learning_rate": 1.0e-2, "betas": [0.9, 0.99], "warmup_steps": 2,
                 "schedule": "constant", "ema_decay": 0.9, "checkpoint_every": 20, "log_every": 5, "device": "cpu",
                 "mixed_precision": "no"},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    from fastdiff.evaluation.classifier import Schedule

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(Schedule, "for_size", staticmethod(lambda images: Schedule(epochs=2, batch_size=64)))
        yield


def trained(folder, *options):
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    train.main([str(recipe), "--training.output_dir", str(folder), *map(str, options)])
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "vae")


@pytest.fixture
def run(run_folder):
    return fastdiff.load(run_folder, device="cpu")


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(name="digits", resize=16))


# ------------------------------------------------------------------------------------------------ training


def test_training_reconstructs_better_and_better(run_folder):
    losses = [json.loads(line)["loss"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    (measured,) = [json.loads(line) for line in (run_folder / "validation.jsonl").read_text().splitlines()]
    assert measured["step"] == 40 and measured["psnr"] > 12 and measured["divergence"] > 0
    assert (run_folder / "samples.png").is_file()


def test_a_resumed_run_is_the_same_run(run_folder, tmp_path):
    """As one that was killed before its last checkpoint."""
    folder = shutil.copytree(run_folder, tmp_path / "vae")
    shutil.rmtree(folder / "checkpoints" / "step_40")
    trained(folder, "--training.resume", "true")
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.json"):
        one, other = (each / "checkpoints" / "step_40" / name for each in (folder, run_folder))
        assert one.read_bytes() == other.read_bytes(), name


def test_noise_of_the_posterior_is_of_seed_and_step(run):
    from fastdiff.tasks.autoencoder import AutoencoderTask

    task = AutoencoderTask(run.recipe)
    whole, part = task.batch(3, range(16)), task.batch(3, range(4, 9))
    assert torch.equal(whole["noise"][4:9], part["noise"]) and torch.equal(whole["images"][4:9], part["images"])
    assert not torch.equal(task.batch(4, range(16))["noise"], whole["noise"])
    assert whole["noise"].shape == (16, 4, 8, 8) and abs(whole["noise"].std() - 1) < 0.05


def test_the_loss_is_error_and_divergence(run):
    from fastdiff.tasks.autoencoder import AutoencoderTask

    task = AutoencoderTask(run.recipe)
    batch = task.batch(0, range(4))
    with torch.no_grad():
        found = task.loss(task.model, batch)
        posterior = task.model.vae.encode(batch["images"]).latent_dist
        made = task.model.vae.decode(posterior.mean + posterior.std * batch["noise"]).sample
    error = (made - batch["images"]).square().mean(dim=(1, 2, 3)).sum()
    assert_close(found, error + 1e-4 * posterior.kl().sum() / (4 * 8 * 8), rtol=1e-4, atol=1e-5)


def test_the_model_trains_as_diffusers_own(run):
    from fastdiff.models.autoencoder import AutoencoderTraining, make_autoencoder

    torch.manual_seed(1)
    ours = AutoencoderTraining(run.recipe.model)
    theirs = make_autoencoder(run.recipe.model)
    theirs.load_state_dict(ours.vae.state_dict())  # the names are theirs
    images, noise = torch.randn(3, 1, 16, 16), torch.randn(3, 4, 8, 8)
    made, mean, logvar = ours(images, noise)
    posterior = theirs.encode(images).latent_dist
    expected = theirs.decode(posterior.mean + posterior.std * noise).sample
    assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert_close(mean, posterior.mean, rtol=1e-4, atol=1e-4)
    assert_close(logvar, posterior.logvar, rtol=1e-4, atol=1e-4)
    made.square().mean().backward()
    expected.square().mean().backward()
    for (name, one), other in zip(ours.vae.named_parameters(), theirs.parameters(), strict=True):
        assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * float(other.grad.abs().max()) + 1e-7, msg=name)


# ------------------------------------------------------------------------------------------------ use


def test_encode_and_decode(run, digits):
    images = digits.held_out.images(range(50))
    latents = run.encode(images)
    assert latents.shape == (50, 4, 8, 8) and latents.dtype == torch.float32
    assert_close(run.encode(images, batch_size=7), latents, rtol=1e-4, atol=1e-4)
    made = run.decode(latents)
    assert made.shape == images.shape and (made.clamp(-1, 1) - images).square().mean() < 0.25  # 12 dB
    assert_close(run.decode(latents, batch_size=1), made, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        mean = run.model.encode(images).latent_dist.mean
    assert_close(latents, mean * run.scaling_factor, rtol=1e-4, atol=1e-4)


def test_a_seed_draws_from_the_posterior(run, digits):
    images = digits.held_out.images(range(150))
    drawn, mean = run.encode(images, seed=5), run.encode(images)
    assert_close(run.encode(images[2:3], seed=7), drawn[2:3], rtol=1e-4, atol=1e-4)
    assert_close(run.encode(images[2:4], seed=7), drawn[2:4], rtol=1e-4, atol=1e-4)  # image i by seed + i
    with torch.no_grad():
        deviation = run.model.encode(images).latent_dist.std * run.scaling_factor
    spread = ((drawn - mean) / deviation).std()
    assert abs(spread - 1) < 0.02  # of 38 400 draws


def test_latents_have_a_deviation_of_one(run_folder, digits):
    scales = {}
    for weights in ("ema", "model"):
        run = fastdiff.load(run_folder, weights=weights, device="cpu")
        latents = run.encode(digits.train.images(range(len(digits.train))))
        assert abs(latents.std() - 1) < 0.02
        scales[weights] = run.scaling_factor
    assert scales["ema"] != scales["model"]


def test_other_sizes_of_images_are_taken(run):
    assert run.encode(torch.zeros(1, 1, 24, 8)).shape == (1, 4, 12, 4)
    for images, said in (
        (torch.zeros(1, 3, 16, 16), "channels: got images of 3; expected 1"),
        (torch.zeros(1, 1, 15, 16), "image size: got 15 x 16; expected multiples of 2"),
        (torch.zeros(1, 16, 16), "images: got shape"),
        (torch.zeros(0, 1, 16, 16), "images: got shape"),
    ):
        fails(said, run.encode, images)
    with pytest.raises(TypeError, match="images: got torch.uint8; expected a float tensor"):
        run.encode(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))
    fails("latents: got 3 channels; expected 4", run.decode, torch.zeros(1, 3, 8, 8))
    fails("batch_size: got 0", run.decode, torch.zeros(1, 4, 8, 8), batch_size=0)


# ------------------------------------------------------------------------------------------------ folders


def test_diffusers_reads_what_is_saved(run, tmp_path, digits):
    run.save_pretrained(tmp_path / "saved")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "saved")
    assert theirs.config.scaling_factor == run.scaling_factor
    images = digits.held_out.images(range(3))
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.mean * theirs.config.scaling_factor
        assert_close(theirs.decode(latents / theirs.config.scaling_factor).sample, run.decode(latents))
    assert_close(latents, run.encode(images), rtol=1e-4, atol=1e-4)
    again = fastdiff.load(tmp_path / "saved", device="cpu")
    assert again.kind == "autoencoder" and again.fingerprint == run.fingerprint and again.step is None
    assert torch.equal(again.encode(images), run.encode(images))
    again.save_pretrained(tmp_path / "saved")  # onto itself
    card = (tmp_path / "saved" / "README.md").read_text()
    example = card.split("```python\n")[1].split("```")[0].replace("PATH_OR_HUB_ID", str(tmp_path / "saved"))
    exec(example, names := {})
    assert names["images"].shape == (1, 1, 16, 16) and "after 40 training steps" in card


def test_a_checkpoint_alone_is_loaded(run, run_folder, tmp_path, digits):
    images = digits.held_out.images(range(3))
    alone = shutil.copytree(run_folder / "checkpoints" / "step_40", tmp_path / "alone")
    loaded = fastdiff.load(alone, device="cpu")
    assert loaded.step == 40 and loaded.recipe is None and torch.equal(loaded.encode(images), run.encode(images))
    config = json.loads((alone / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["scaling_factor"] == run.scaling_factor
    assert fastdiff.load(run_folder / "checkpoints" / "step_20", device="cpu").step == 20


def test_a_folder_of_diffusers_loads(tmp_path):
    theirs = autoencoder()
    theirs.save_pretrained(tmp_path / "theirs")
    run = fastdiff.load(tmp_path / "theirs", device="cpu")
    assert run.kind == "autoencoder" and run.scaling_factor == 0.18215
    images = torch.randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.no_grad():
        expected = theirs.encode(images).latent_dist.mean * 0.18215
    assert_close(run.encode(images), expected, rtol=1e-4, atol=1e-5)
    for key, value, said in (
        ("shift_factor", 0.1, "shift_factor: got 0.1; expected null"),
        ("scaling_factor", 0, "scaling_factor: got 0; expected a number above 0"),
        ("latent_channels", 8, "not an AutoencoderKL that can be loaded"),
    ):
        bad = shutil.copytree(tmp_path / "theirs", tmp_path / key)
        config = json.loads((bad / "config.json").read_text())
        (bad / "config.json").write_text(json.dumps({**config, key: value}))
        fails(said, fastdiff.load, bad, device="cpu")


# ------------------------------------------------------------------------------------------------ commands


@pytest.fixture
def grids(monkeypatch):
    """What the commands hand to the grid."""
    seen, drawn = [], visualization.save_sample_grid

    def save_sample_grid(images, labels, names, path, **options):
        seen.append((images, labels, names, options))
        return drawn(images, labels, names, path, **options)

    monkeypatch.setattr(visualization, "save_sample_grid", save_sample_grid)
    return seen


def test_the_command_shows_originals_reconstructions_and_errors(run, run_folder, grids, capsys, digits):
    sample.main([str(run_folder), "--num-images", "12"])
    assert capsys.readouterr().out.strip() == str(run_folder / "reconstructions.png")
    images, labels, names, options = grids[0]
    assert names == ["original", "reconstruction", "error"] * 2 and images.shape == (36, 1, 16, 16)
    assert labels == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 2 + [4] * 2 + [5] * 2
    originals, made, errors = images[:10], images[10:20], images[20:30]
    assert_close(run.decode(run.encode(originals)).clamp(-1, 1), made, rtol=1e-4, atol=1e-4)
    assert_close(errors, 1 - 2 * (made - originals).abs().clamp(max=1))
    every = torch.cat([images[labels.index(row) : labels.index(row) + labels.count(row)] for row in (0, 3)])
    error = (run.decode(run.encode(every)).clamp(-1, 1) - every).square().mean(dim=(1, 2, 3))
    psnr = (10 * torch.log10(4 / error)).mean()
    assert options["title"] == f"trained for 40 steps, 12 images, mean PSNR {psnr:.1f} dB"


def test_the_command_shows_what_noise_does(run, run_folder, grids, tmp_path):
    sample.main([str(run_folder), "--noise", "--num-images", "3", "--output", str(tmp_path / "noise.png")])
    images, labels, names, _ = grids[0]
    assert names[0] == "t = 0" and names[-1] == "t = 0.99" and len(names) == 11 and images.shape[0] == 66
    clean, noisy = images[:6], images[-6:]
    assert_close(clean[:3], run.decode(run.encode(clean[3:])), rtol=1e-4, atol=1e-4)
    assert abs(noisy[3:].std() - 0.99) < 0.1 and labels[:6] == [0] * 6  # pixels are noise at last


def test_the_command_takes_pictures_of_ones_own(run_folder, run, grids, tmp_path, capsys, digits):
    from fastdiff.tasks.images import to_pil

    run.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    said = fails_command(sample, [tmp_path / "saved"], capsys)
    assert "got a model without a recipe, which names its images; pass --pictures FOLDER" in said
    (tmp_path / "mine").mkdir()
    assert "has no pictures" in fails_command(sample, [run_folder, "--pictures", tmp_path / "mine"], capsys)
    assert "expected a picture or a folder" in fails_command(sample, [run_folder, "--pictures", "gone.png"], capsys)
    to_pil(digits.held_out.images([0]))[0].convert("RGB").resize((40, 30)).save(tmp_path / "mine" / "one.png")
    sample.main([str(tmp_path / "saved"), "--pictures", str(tmp_path / "mine")])
    assert grids[0][0].shape == (3, 1, 16, 16) and (tmp_path / "saved" / "reconstructions.png").is_file()


def fails_command(command, arguments, capsys) -> str:
    with pytest.raises(SystemExit):
        command.main([str(each) for each in arguments])
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_measures(run, run_folder, capsys, digits, tmp_path):
    evaluate.main([str(run_folder), "--num-images", "100"])
    found = json.loads((run_folder / "evaluation.json").read_text())
    assert found["images"] == 100 and found["step"] == 40 and found["compression"] == 16 * 16 / (4 * 8 * 8)
    assert found["classifier_size"] == 8 and 0.5 < found["class_accuracy_originals"] <= 1
    assert abs(found["class_accuracy"] - found["class_accuracy_originals"]) <= 1 - found["agreement"] < 1
    assert 0 < found["ssim"] < 1 and found["scaling_factor"] == run.scaling_factor
    assert abs(found["latent_deviation"] - 1) < 0.1 and len(found["latent_means"]) == 4
    from fastdiff.evaluation.report import balanced_subset

    images = digits.held_out.images(balanced_subset(digits.held_out, 100))
    error = (run.decode(run.encode(images)).clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    assert abs(found["psnr"] - float((10 * torch.log10(4 / error)).mean())) < 1e-3
    out = capsys.readouterr().out
    assert "| PSNR |" in out and "at 8 x 8" in out
    run.save_pretrained(tmp_path / "saved")
    assert f"| psnr | {found['psnr']:.4g} |" in (tmp_path / "saved" / "README.md").read_text()
    assert "without a recipe" in fails_command(evaluate, [tmp_path / "saved"], capsys)


def test_bad_recipes_are_one_line(tmp_path, capsys):
    for options, said in (
        (["--model.sample_size", 18], "model.sample_size: got 18; the data set digits has 16"),
        (["--model.sample_size", 15], "model.sample_size: got 15; expected a multiple of 2"),
        (["--model.in_channels", 3], "model.in_channels: got 3; the data set digits has 1"),
        (["--model.norm_num_groups", 3], "model.block_out_channels: got [8, 16]; expected multiples of"),
        (["--objective.kl_weight", -1], "objective.kl_weight: got -1.0; expected 0 or more"),
        (["--objective.reconstruction", "l3"], "objective.reconstruction: got l3; expected one of"),
        (["--data.resize", 0], "data.resize: got 0; expected at least 1 pixel"),
        (["--data.name", "image_folder"], "data.resize: got 16 with image_folder; expected null: set data.image_size"),
    ):
        recipe = tmp_path / "bad.yaml"
        recipe.write_text(yaml.safe_dump(TINY))
        said_now = fails_command(train, [recipe, "--training.output_dir", tmp_path / "bad", *options], capsys)
        assert said in said_now, said_now


# ------------------------------------------------------------------------------------------------ latents


def test_a_recipe_gets_latents(run, run_folder, digits):
    config = LatentsConfig(str(run_folder), vae_hash=run.fingerprint[:16])
    vae, latents = load_latents(config, digits, device="cpu", progress=False)
    assert latents.image_shape == (4, 8, 8) and latents.class_names == digits.class_names
    assert_close(latents.held_out.images([3]), run.encode(digits.held_out.images([3])), rtol=1e-4, atol=1e-4)
    assert vae.config.scaling_factor == run.scaling_factor


def test_a_dit_trains_on_latents(run_folder, digits):
    from fastdiff.tasks.dit.recipe import DiTRecipe
    from fastdiff.tasks.dit.task import DiTTask

    _, latents = load_latents(LatentsConfig(str(run_folder)), digits, device="cpu", progress=False)
    recipe = DiTRecipe()
    recipe.model = type(recipe.model)(
        input_size=8, patch_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=10
    )
    task = DiTTask(recipe, latents)
    assert torch.isfinite(task.loss(task.model, task.batch(0, range(4))))
    assert task.data_sets()["data"].fingerprint == latents.fingerprint


def test_autoencoders_that_do_not_fit_are_refused(run, run_folder, digits, tmp_path, monkeypatch):
    def refused(said, config, data=digits):
        fails(said, load_latents, config, data, device="cpu", progress=False)

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="could not be downloaded from the Hugging Face Hub"):
        load_latents(LatentsConfig("stabilityai/sd-vae-ft-mse"), digits, device="cpu")
    refused("latents.vae_hash: got '00000000'; expected", LatentsConfig(str(run_folder), "0" * 8))
    refused("does not fit the images of digits: image size: got 15 x 15", LatentsConfig(str(run_folder)),
            resized(digits, 15))  # fmt: skip
    autoencoder().save_pretrained(tmp_path / "theirs")
    refused("does not fit the images of digits: channels: got images of 1; expected 3",
            LatentsConfig(str(tmp_path / "theirs")))  # fmt: skip
    run.save_pretrained(tmp_path / "unscaled")
    config = json.loads((tmp_path / "unscaled" / "config.json").read_text())
    (tmp_path / "unscaled" / "config.json").write_text(json.dumps({**config, "scaling_factor": 9.0}))
    refused("whose latents of digits have deviation", LatentsConfig(str(tmp_path / "unscaled")))
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "config.json").write_text('{"_class_name": "DiT"}')
    refused("a diffusion transformer that draws images of classes; expected an autoencoder",
            LatentsConfig(str(tmp_path / "dit")))  # fmt: skip
    fails("vae: got ''", LatentsConfig)
    fails("vae_hash: got 'abc'", LatentsConfig, "x", "abc")
