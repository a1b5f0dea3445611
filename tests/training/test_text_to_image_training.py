"""Runs of task text_to_image: trained, resumed, sampled, saved; and what is refused before work begins."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from text_to_image_runs import CROSS, DIT, Q_FORMER, write_recipe

import fastdiff
from fastdiff import evaluate, sample, train
from fastdiff.data.captions import Captions
from fastdiff.models.autoencoder import AutoencoderConfig, deviation_of, make_autoencoder
from fastdiff.nn.attention_maps import attention_entropy, attention_maps
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.text_to_image import TextToImageRecipe, TextToImageTask
from fastdiff.tasks.texts import TextChoice, trained_texts
from fastdiff.training import Trainer


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory):
    """A DiT that was trained on the digits' labels."""
    folder = tmp_path_factory.mktemp("dit")
    train.main([str(write_recipe(folder / "dit.yaml", DIT)), "--training.output_dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def q_former_run(tmp_path_factory, dit_run):
    folder = tmp_path_factory.mktemp("q_former")
    recipe = write_recipe(folder / "recipe.yaml", Q_FORMER, dit_from=str(dit_run))
    train.main([str(recipe), "--training.output_dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def cross_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross")
    train.main([str(write_recipe(folder / "recipe.yaml", CROSS)), "--training.output_dir", str(folder / "run")])
    return folder / "run"


@pytest.fixture
def make_trainer(tmp_path, digits):
    def make(recipe, folder, *options, **changes):
        path = write_recipe(tmp_path / "recipe.yaml", recipe, **changes)
        made = parse_recipe(TextToImageRecipe, [str(path), "--training.output_dir", str(folder), *map(str, options)])
        return Trainer(TextToImageTask(made, digits), made.training)

    return make


def newest(run):
    return sorted((run / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))[-1]


def test_a_frozen_dit_stays_as_it_was(q_former_run, dit_run):
    checkpoint = newest(q_former_run)
    before, after = load_file(newest(dit_run) / "ema.safetensors"), load_file(checkpoint / "model.safetensors")
    averaged, optimizer = load_file(checkpoint / "ema.safetensors"), load_file(checkpoint / "optimizer.safetensors")
    assert {name[4:] for name in after if name.startswith("dit.")} == set(before)
    for name, weight in before.items():
        assert torch.equal(after[f"dit.{name}"], weight) and torch.equal(averaged[f"dit.{name}"], weight)
    trained = {name.partition("|")[2] for name in optimizer}
    assert trained == {name for name in after if not name.startswith("dit.")}
    earlier = load_file(checkpoint.with_name("step_2") / "model.safetensors")
    for name in ("q_former.query_to_layer.weight", "q_former.text_proj.weight"):
        assert not torch.equal(earlier[name], after[name])


@pytest.mark.parametrize("kind", ["q_former", "cross"])
def test_a_run_that_stops_goes_on_with_the_same_bits(make_trainer, tmp_path, dit_run, kind, request, curve, same_files):
    """Also where the DiT that it began with has gone."""
    whole, mine = request.getfixturevalue(f"{kind}_run"), tmp_path / "dit"
    shutil.copytree(dit_run, mine)
    recipe, changes = (CROSS, {}) if kind == "cross" else (Q_FORMER, {"dit_from": str(mine)})
    make_trainer(recipe, tmp_path / "run", **changes).train(stop_at=2)
    shutil.rmtree(mine)
    resumed = make_trainer(recipe, tmp_path / "run", "--training.resume", "true", **changes).train()
    assert resumed.steps == 4 and curve(tmp_path / "run") == curve(whole)
    same_files(resumed.checkpoint, newest(whole))


def test_a_batch_is_a_function_of_its_step_and_slots(make_trainer, tmp_path):
    task = make_trainer(CROSS, tmp_path / "run").task
    whole, parts = task.batch(3, range(8)), [task.batch(3, range(3)), task.batch(3, range(3, 8))]
    for name in ("x0", "t", "noise", "dropped"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
    for part, slots in zip((whole, *parts), (range(8), range(3), range(3, 8)), strict=True):
        labels = task.data.train.labels[task.stream.indices(3)[slots.start : slots.stop]]
        states = part["text_states"][part["text_rows"]]
        assert torch.equal(states[:, 0].argmax(-1), labels)  # one-hot: the text is the name of the class
    assert not torch.equal(whole["x0"], task.batch(4, range(8))["x0"])


def test_no_text_is_the_null_label(q_former_run):
    """Guidance of a frozen DiT by a text that says nothing is guidance from its own null label."""
    run = fastdiff.load(q_former_run)
    labels, time, x = torch.full((2,), 10), torch.tensor([300.0, 700.0]), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        null = run.model(x, time, condition=run.model.null_condition(2))
        torch.testing.assert_close(null, run.model.dit(x, time, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["q_former_run", "cross_run"])
def test_images_of_prompts(name, request, tmp_path):
    path = request.getfixturevalue(name)
    run = fastdiff.load(path)
    three, again = run.sample("3", seed=5), run.sample(["3", "7"], seed=5)
    assert three[0].size == (8, 8) and three[0].mode == "L" and len(again) == 2
    assert np.abs(np.asarray(three[0], int) - np.asarray(again[0], int)).max() <= 1
    tensors = run.sample(["3", "7"], num_images_per_prompt=2, seed=5, output_type="pt")
    assert tensors.shape == (4, 1, 8, 8)
    # image i has the seed of the call plus i: the second prompt begins with the third
    later = run.sample(["7", "7"], seed=7, output_type="pt")
    torch.testing.assert_close(tensors[2:], later, rtol=1e-4, atol=1e-4)
    run.save_pretrained(tmp_path / "saved")
    saved = fastdiff.load(tmp_path / "saved")
    assert saved.kind == "text_to_image" and saved.recipe is None and saved.class_names == run.class_names
    assert torch.equal(saved.sample(["3", "7"], num_images_per_prompt=2, seed=5, output_type="pt"), tensors)
    assert "run.sample([" in (tmp_path / "saved" / "README.md").read_text()


def test_classes_are_drawn_by_label_where_the_dit_was_frozen(q_former_run, cross_run, dit_run):
    run, dit = fastdiff.load(q_former_run), fastdiff.load(dit_run)
    drawn = run.sample(classes=[3, "7"], seed=2, output_type="pt")
    theirs = dit.sample([3, 7], seed=2, guidance_scale=2.0, output_type="pt")
    torch.testing.assert_close(drawn, theirs, rtol=1e-5, atol=1e-5)
    cross = fastdiff.load(cross_run)
    assert torch.equal(
        cross.sample(classes=[3], seed=2, output_type="pt"), cross.sample(["3"], seed=2, output_type="pt")
    )


def write_reader(folder, words):
    """A tiny BERT of random weights that knows these words, in a folder; returns it."""
    import transformers
    from tokenizers_of_kinds import bert_like

    tokenizer = bert_like(words)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, vocab_size=1 + max(tokenizer.get_vocab().values()))
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with a tiny BERT, for prompts of digits and a few words."""
    return write_reader(tmp_path_factory.mktemp("reader"), "a digit of " + " ".join("0123456789"))


def test_a_language_model_reads_any_text(make_trainer, reader, dit_run, tmp_path):
    """All hidden states of a transformers model, mixed by weights that are learnt; a DiT and its Q-Former together."""
    changes = {
        "text_encoder": {"name": str(reader), "layers": "mix", "max_length": 8},
        "train": "all",
        "dit_from": str(dit_run),
        "sampling": {"prompts": ["a digit", "3 of 7"]},
    }
    outcome = make_trainer(Q_FORMER, tmp_path / "run", **changes).train()
    run = fastdiff.load(tmp_path / "run")
    assert run.model.config.text_states == 3 and run.model.mix.logits.abs().sum() > 0
    optimizer = load_file(outcome.checkpoint / "optimizer.safetensors")
    assert any("dit.blocks" in name for name in optimizer) and not run.labelled
    images = run.sample(["a digit of 3", "7"], output_type="pt", guidance_scale=1.0)
    # a long prompt beside a short one changes it by rounding alone: padding is not attended to
    torch.testing.assert_close(images[1:], run.sample("7", output_type="pt", guidance_scale=1.0, seed=1))
    with pytest.raises(ValueError, match="tokens.* at most 8|at most 8"):
        run.sample("a digit of 3 of 7 of 1 of 2 of 4")


def test_a_text_is_read_once(make_trainer, reader, dit_run, tmp_path, monkeypatch):
    """Before training, into the cache: another run of these texts reads none, and no step does."""
    from fastdiff.models.text_encoder import TransformersEncoder

    read, encode = [], TransformersEncoder.encode
    monkeypatch.setattr(
        TransformersEncoder,
        "encode",
        lambda self, texts, *a, **k: read.append(list(texts)) or encode(self, texts, *a, **k),
    )
    changes = {"text_encoder": {"name": str(reader), "layers": [1]}, "dit_from": str(dit_run)}
    make_trainer(Q_FORMER, tmp_path / "one", **changes).train()
    assert sorted(text for texts in read for text in texts) == [str(digit) for digit in range(10)]
    read.clear()
    prompts = {"prompts": ["3", "a digit of 7"]}
    make_trainer(Q_FORMER, tmp_path / "two", **changes, sampling=prompts).train()
    assert read == [["a digit of 7"]]  # of samples.png


def test_attention_that_is_spread_is_rewarded(make_trainer, reader, dit_run, tmp_path):
    """The loss with the term is the loss without it, less weight times the mean entropy of the maps."""
    changes = {"text_encoder": {"name": str(reader)}, "dit_from": str(dit_run)}
    plain = make_trainer(Q_FORMER, tmp_path / "plain", **changes)
    term = make_trainer(Q_FORMER, tmp_path / "term", **changes, objective={"attention_entropy_weight": 0.5})
    batch = plain.task.batch(0, range(4))
    with attention_maps(plain.task.model) as maps:
        before = plain.task.loss(plain.task.model, batch)
    entropy = attention_entropy(maps[0]).mean()
    assert 0 < entropy <= np.log(batch["text_states"].shape[1])
    torch.testing.assert_close(term.task.loss(term.task.model, batch), before - 4 * 0.5 * entropy)
    for trainer in (plain, term):
        trainer.folder.unlock()


@pytest.fixture(scope="module")
def vae(tmp_path_factory, digits):
    """A folder with an autoencoder of random weights for digits: 4x4x4 latents of deviation 1."""
    folder = tmp_path_factory.mktemp("vae")
    shape = dict(in_channels=1, sample_size=8, latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4)
    torch.manual_seed(0)
    model = make_autoencoder(AutoencoderConfig(**shape, mid_block_add_attention=False)).eval()
    model.register_to_config(scaling_factor=1 / deviation_of(model, digits.train.images, torch.arange(64)))
    model.save_pretrained(folder)
    return folder


LATENT = {**CROSS, "model": {**CROSS["model"], "input_size": 4, "patch_size": 1, "in_channels": 4}}


def test_a_model_of_latents_gives_images(make_trainer, vae, tmp_path, capsys):
    mine = tmp_path / "vae"
    shutil.copytree(vae, mine)
    trainer = make_trainer(LATENT, tmp_path / "run", latents={"vae": str(mine)})
    assert trainer.task.batch(0, range(3))["x0"].shape == (3, 4, 4, 4)
    outcome = trainer.train()
    shutil.rmtree(mine)  # a checkpoint has its own
    run = fastdiff.load(tmp_path / "run")
    assert (outcome.checkpoint / "vae" / "config.json").is_file() and run.step == 4
    assert run.sample("3")[0].size == (8, 8)
    assert run.sample("3", output_type="latent").shape == (1, 4, 4, 4)
    run.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        fastdiff.load(tmp_path / "saved").sample("3", output_type="pt"), run.sample("3", output_type="pt")
    )


@pytest.mark.parametrize(
    ("model", "latents", "message"),
    [
        ({"in_channels": 3}, {}, "model.in_channels: got 3; the latents of digits has 4"),
        ({"input_size": 8}, {}, "model.input_size: got 8; the latents of digits has (4, 4)"),
        ({}, {"vae_hash": "0123456789"}, "latents.vae_hash: got '0123456789'"),
    ],
)
def test_autoencoders_that_do_not_fit(vae, tmp_path, capsys, model, latents, message):
    recipe = write_recipe(tmp_path / "recipe.yaml", LATENT, model=model, latents={"vae": str(vae), **latents})
    assert message in refused(train, [recipe, "--training.output_dir", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ commands


def paths(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_a_grid_of_prompts(q_former_run, tmp_path, capsys):
    capsys.readouterr()
    sample.main([str(q_former_run)])  # the run's own prompts
    (grid,) = paths(capsys)
    assert grid == str(q_former_run / "samples-seed-0.png") and Image.open(grid).format == "PNG"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3\n\n7\n")
    output = tmp_path / "grid.png"
    given = ["--prompt", "1", "--prompt-file", str(prompts), "--images-per-prompt", "2", "--animate"]
    given += ["--guidance-scale", "1", "--num-inference-steps", "3", "--output", str(output)]
    sample.main([str(q_former_run), *given])
    assert paths(capsys) == [str(output), str(output.with_suffix(".gif"))]
    assert Image.open(output.with_suffix(".gif")).n_frames == 3
    sample.main([str(q_former_run), "--classes", "3,7", "--output", str(output)])
    assert paths(capsys) == [str(output)]


ENTRIES = """
entries:
  - {name: grid, prompts: ["3", "7"], images_per_prompt: 2, animate: true}
  - {name: classes, classes: [3, "7"], guidance_scale: 1}
  - {name: guidance, prompts: ["3", "7"], guidance_scale: [1, 2, 3]}
  - {name: steps, prompts: ["3"], denoising_steps: 2, num_inference_steps: 4}
  - {name: levels, prompts: ["3"], noise_levels: [0, 0.5, 1]}
  - {name: checkpoints, prompts: ["3"], progression: true}
  - {name: read, prompts: ["3", "7"], attention_timesteps: [0.9, 0.5], attention_average: heads}
"""


@pytest.mark.parametrize("name", ["q_former_run", "cross_run"])
def test_a_picture_for_each_entry(name, request, tmp_path, capsys):
    run, file = request.getfixturevalue(name), tmp_path / "study.yaml"
    file.write_text(ENTRIES)
    capsys.readouterr()
    sample.main([str(run), "--config", str(file)])
    folder = run / "study"
    names = ["grid.png", "grid.gif", "classes.png", "guidance.png", "steps.png", "levels.png", "checkpoints.png"]
    names.append("read.png")
    of_maps = ["attention.png", "attention.npz"]  # a Q-Former reads a prompt once
    if name == "cross_run":
        of_maps = ["attention_t0.9.png", "attention_t0.5.png", "attention.npz", "tokens_t0.9.png", "tokens_t0.5.png"]
    names += [f"read_maps/{each}" for each in of_maps]
    lines = paths(capsys)
    assert [line for line in lines if " " not in line] == [str(folder / each) for each in names]
    assert any("the first token has" in line for line in lines)
    assert all(Image.open(folder / each).width > 100 for each in names if not each.endswith("npz"))
    arrays = np.load(folder / "read_maps" / "attention.npz")
    assert arrays["prompts"].tolist() == ["3", "7"] and arrays["prompt1_t0.5"].shape[-1] == len(arrays["prompt1_keys"])
    sample.main([str(run), "--config", str(file), "--output", str(tmp_path / "elsewhere")])
    assert {each.split("/")[0] for each in names} == {each.name for each in (tmp_path / "elsewhere").iterdir()}


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


def test_measures_of_combinations(few_features, tmp_path, capsys):
    """Tinted garments: classes and colours that were trained on together, and others."""
    from data.small_fashion import write_fashion

    (tmp_path / "fashion").mkdir()
    write_fashion(tmp_path / "fashion")
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
    study = tmp_path / "study.yaml"
    study.write_text("entries: [{name: unseen, combinations: unseen, count: 3, num_inference_steps: 1}]")
    sample.main([str(tmp_path / "run"), "--config", str(study)])
    assert (tmp_path / "run" / "study" / "unseen.png").is_file()


# ------------------------------------------------------------------------------------------------ refusals


def refused(command, arguments, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        command.main([str(each) for each in arguments])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and text.startswith("error: "), text
    return text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: a, prompts: ['3'], classes: [3]}", "got prompts and classes; expected exactly one"),
        ("{name: a}", "got neither; expected exactly one of prompts and classes"),
        ("{prompts: ['3']}", "name: got none"),
        ("{name: a/b, prompts: ['3']}", "name: got 'a/b'; expected letters"),
        ("{name: a, prompts: []}", "prompts: got []; expected a list of texts"),
        ("{name: a, prompts: ['3'], guidance: 3}", "there is no field 'guidance'; did you mean guidance_scale?"),
        ("{name: a, prompts: ['x']}", "'x'"),
        ("{name: a, classes: [11]}", "labels: got 11"),
        ("{name: a, prompts: ['3'], noise_levels: [2]}", "noise_levels: got [2]; expected a list of numbers from 0"),
        ("{name: a, prompts: ['3'], progression: true, denoising_steps: 2}", "got denoising_steps and progression"),
        ("{name: a, prompts: ['3'], sampler: ddim}", "sampler: got 'ddim'"),
        ("{name: a, classes: [3], attention_timesteps: [0.5]}", "attention_timesteps: got it with classes"),
        (
            "{name: a, prompts: ['3'], attention_timesteps: [500]}",
            "attention_timesteps: got 500; expected a noise time",
        ),
        ("{name: a, combinations: unseen}", "combinations: got 'unseen'; the run's data digits has none"),
        ("[]", "expected fields"),
    ],
)
def test_entries_that_cannot_be_drawn(q_former_run, tmp_path, capsys, entry, message):
    file = tmp_path / "study.yaml"
    file.write_text(f"entries:\n  - {{name: fine, prompts: ['3']}}\n  - {entry}\n")
    text = refused(sample, [q_former_run, "--config", file], capsys)
    assert f"{file}: entry 2" in text and message in text
    assert not (q_former_run / "study" / "fine.png").exists()  # nothing is drawn before all is known to fit


def test_commands_that_cannot_be_run(q_former_run, cross_run, tmp_path, capsys):
    assert "--classes: got it beside --prompt" in refused(
        sample, [q_former_run, "--prompt", "3", "--classes", "3"], capsys
    )
    assert "--config: got it beside --prompt" in refused(
        sample, [q_former_run, "--prompt", "3", "--config", "llm2dit"], capsys
    )
    assert "with fastdiff: llm2dit" in refused(sample, [q_former_run, "--config", "llm2dti"], capsys)
    (tmp_path / "none.yaml").write_text("pictures: []")
    assert "expected the one key entries" in refused(sample, [q_former_run, "--config", tmp_path / "none.yaml"], capsys)
    run = fastdiff.load(cross_run)
    for prompts, classes, got in ((None, None, "neither"), (["3"], ["3"], "both")):
        with pytest.raises(ValueError, match=f"prompts, classes: got {got}; expected one of them"):
            run.sample(prompts, classes=classes)
    with pytest.raises(ValueError, match="prompts: got none"):
        run.sample([])
    with pytest.raises(TypeError, match="prompts: got"):
        run.sample([3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dit_from": None}, "train: got 'q_former' without dit_from"),
        ({"model": {"hidden_size": 48}}, "model.hidden_size: got 48; the DiT of dit_from"),
        ({"model": {"depth": 3}}, "model.depth: got 3; the DiT of dit_from"),
        ({"diffusion": {"prediction_type": "sample"}}, "diffusion.prediction_type: got 'sample'; the DiT of dit_from"),
        ({"diffusion": {"prediction_type": "epsilon", "noise_levels": "linear"}}, "was trained with 'flow'"),
        ({"diffusion": {"time_scale": 5.0}}, "diffusion.time_scale: got 5.0; the DiT of dit_from"),
        ({"objective": {"entry_weights": {"caption": 2.0}}}, "entry_weights: got 'caption'; the texts of the data are"),
        ({"objective": {"entry_weights": {"name": 0.0}}}, "leave image 0 and 1617 others without a text"),
        ({"objective": {"text_dropout_prob": 2.0}}, "objective.text_dropout_prob: got 2.0"),
        ({"sampling": {"prompts": ["eleven"]}}, "'eleven'"),
        ({"sampling": {"sampler": "ddim"}}, "sampling.sampler: got 'ddim'"),
        ({"latents": {"vae": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"latents": {"vae": ""}}, "latents.vae: got ''"),
    ],
)
def test_recipes_that_do_not_fit(dit_run, tmp_path, capsys, changes, message):
    recipe = write_recipe(tmp_path / "recipe.yaml", Q_FORMER, **{"dit_from": str(dit_run), **changes})
    text = refused(train, [recipe, "--training.output_dir", tmp_path / "run"], capsys)
    assert message in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [7]}, "text_encoder.layers: got 7"),
        ({"max_length": 1}, "tokens"),
        ({"name": "./nowhere"}, "text_encoder.name: got './nowhere', which is not a folder"),
    ],
)
def test_text_encoders_that_do_not_fit(dit_run, reader, tmp_path, capsys, fields, message):
    changes = {"dit_from": str(dit_run), "text_encoder": {"name": str(reader), **fields}}
    recipe = write_recipe(tmp_path / "recipe.yaml", Q_FORMER, **changes, sampling={"prompts": ["3 of 7"]})
    text = refused(train, [recipe, "--training.output_dir", tmp_path / "run"], capsys)
    assert message in text and not (tmp_path / "run").exists()


def test_a_dit_that_is_none_is_refused(dit_run, cross_run, tmp_path, capsys):
    gone = write_recipe(tmp_path / "recipe.yaml", Q_FORMER, dit_from=str(tmp_path / "gone" / "x" / "y"))
    assert "no such folder" in refused(train, [gone, "--training.output_dir", tmp_path / "run"], capsys)
    other = write_recipe(tmp_path / "recipe.yaml", Q_FORMER, dit_from=str(cross_run))
    assert "dit_from: got" in (text := refused(train, [other], capsys)) and "draws images of classes" in text
    larger = write_recipe(tmp_path / "recipe.yaml", CROSS, model={"input_size": 16})
    assert "model.input_size: got 16; the data set digits has (8, 8); set --model.input_size to that" in refused(
        train, [larger, "--training.output_dir", tmp_path / "run"], capsys
    )
    crossing = write_recipe(tmp_path / "recipe.yaml", CROSS, train="q_former", dit_from=str(dit_run))
    assert "which has no Q-Former; expected 'all'" in refused(train, [crossing], capsys)


def test_another_text_encoder_of_that_name_is_refused(cross_run, tmp_path):
    run = tmp_path / "saved"
    fastdiff.load(cross_run).save_pretrained(run)
    config = json.loads((run / "config.json").read_text())
    config["text_encoder"]["fingerprint"] = "0" * 64
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="text_encoder: got 'one_hot' with the fingerprint .* was trained with 00000"):
        fastdiff.load(run).sample("3")


# ------------------------------------------------------------------------------------------------ texts


def test_the_texts_to_train_on_are_those_of_its_images():
    captions = Captions.of(("name", "alias"), [["b", None], ["c", "a"]], [["a", "d"]])
    texts, rows = trained_texts(captions)
    assert [[texts[index] if index >= 0 else None for index in row] for row in rows.tolist()] == [
        ["b", None],
        ["c", "a"],
    ]
    assert sorted(texts) == ["a", "b", "c"]
    texts, rows = trained_texts(Captions.of(("name",), [["b"], ["b"]], [["a"]]))
    assert texts == ("b",) and rows.tolist() == [[0], [0]]


def test_texts_are_chosen_by_their_weights():
    texts = torch.tensor([[0, 1, 2], [3, -1, 4]], dtype=torch.int32)
    choose, draws = TextChoice(texts, ("base", "base_syn", "caption"), {"caption": 2.0}), torch.rand(30_000)
    for image, expected in ((0, {0: 0.25, 1: 0.25, 2: 0.5}), (1, {3: 1 / 3, 4: 2 / 3})):
        chosen = choose(torch.full((len(draws),), image), draws)
        for text, share in expected.items():
            # five standard errors of a share of 30 000 draws
            assert abs((chosen == text).float().mean() - share) < 5 * (share * (1 - share) / len(draws)) ** 0.5
        assert set(chosen.tolist()) == set(expected)
    assert TextChoice(texts, ("a", "b", "c"), {"a": 0, "b": 0})(torch.tensor([0, 1]), torch.zeros(2)).tolist() == [2, 4]
