"""Runs of task text_to_image: trained, resumed, on latents, with language models; and recipes that are refused."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from text_to_image_runs import CROSS, Q_FORMER, refused, write_reader, write_recipe

import fastdiff
from fastdiff import train
from fastdiff.data.captions import Captions
from fastdiff.models.autoencoder import AutoencoderConfig, deviation_of, make_autoencoder
from fastdiff.nn.attention_maps import attention_entropy, attention_maps
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.text_to_image import TextToImageRecipe, TextToImageTask
from fastdiff.tasks.texts import TextChoice, trained_texts
from fastdiff.training import Trainer

ONE_STEP = ("--training.max_steps", 1)
LATENT = {**CROSS, "model": {**CROSS["model"], "input_size": 4, "patch_size": 1, "in_channels": 4}}


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
    make_trainer(Q_FORMER, tmp_path / "one", *ONE_STEP, **changes).train()
    assert sorted(text for texts in read for text in texts) == [str(digit) for digit in range(10)]
    read.clear()
    prompts = {"prompts": ["3", "a digit of 7"]}
    make_trainer(Q_FORMER, tmp_path / "two", *ONE_STEP, **changes, sampling=prompts).train()
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


def test_a_model_of_latents_gives_images(make_trainer, vae, tmp_path, capsys):
    mine = tmp_path / "vae"
    shutil.copytree(vae, mine)
    trainer = make_trainer(LATENT, tmp_path / "run", *ONE_STEP, latents={"vae": str(mine)})
    assert trainer.task.batch(0, range(3))["x0"].shape == (3, 4, 4, 4)
    outcome = trainer.train()
    shutil.rmtree(mine)  # a checkpoint has its own
    run = fastdiff.load(tmp_path / "run")
    assert (outcome.checkpoint / "vae" / "config.json").is_file() and run.step == 1
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


# ------------------------------------------------------------------------------------------------ refusals


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
