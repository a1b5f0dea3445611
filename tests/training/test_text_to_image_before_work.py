"""Text to image: what does not fit is said before work begins, and nothing that was given is ignored without a word."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from text_to_image_runs import CROSS, DIT, Q_FORMER, write_recipe

import fastdiff
from fastdiff import evaluate, sample, train
from fastdiff.data import DataConfig, load_data
from fastdiff.data.captions import CaptionedData, Captions
from fastdiff.models.autoencoder import AutoencoderConfig, deviation_of, make_autoencoder
from fastdiff.nn.attention import SelfAttention
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.autoencoder.run import AutoencoderRun
from fastdiff.tasks.latents import LatentsConfig, load_latents
from fastdiff.tasks.text_to_image import TextToImageRecipe, TextToImageRun, TextToImageTask
from fastdiff.tasks.text_to_image.evaluate import combination_prompts
from fastdiff.tasks.text_to_image.samples import SampleOptions, sample_prompted
from fastdiff.tasks.text_to_image.start import Start
from fastdiff.tasks.texts import trained_texts

LETTERS = tuple("abcdefghij")


@pytest.fixture
def make_task(tmp_path, digits):
    """make_task(recipe, data=…, section={field: value}) → TextToImageTask."""

    def make(recipe, data=None, **changes):
        path = write_recipe(tmp_path / "recipe.yaml", recipe, **changes)
        made = parse_recipe(TextToImageRecipe, [str(path), "--training.output_dir", str(tmp_path / "run")])
        return TextToImageTask(made, digits if data is None else data)

    return make


@pytest.fixture
def saved(make_task, tmp_path):
    """saved(recipe, section={field: value}) → a folder with the untrained model of a recipe."""

    def save(recipe, **changes):
        task, folder = make_task(recipe, **changes), tmp_path / "saved"
        folder.mkdir()
        task.save(task.model, folder)
        return folder

    return save


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    recipe = write_recipe(folder / "dit.yaml", DIT, training={"max_steps": 1})
    train.main([str(recipe), "--training.output_dir", str(folder / "run")])
    return folder / "run"


def refused(command, arguments, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        command.main([str(each) for each in arguments])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 2 and text.startswith("error: "), text
    return text


# ------------------------------------------------------------------------------------------------ training


def test_a_frozen_dit_draws_by_label_only_the_classes_that_it_knows(make_task, dit_run, digits):
    assert make_task(Q_FORMER, dit_from=str(dit_run)).labelled
    assert not make_task(Q_FORMER, dit_from=str(dit_run), train="all").labelled
    other = dataclasses.replace(digits, class_names=LETTERS)
    knows_digits = Start(make_task(CROSS).config.model, class_names=digits.class_names)
    assert knows_digits.draws_classes(digits.class_names) and knows_digits.draws_classes(LETTERS)  # numbers: unknown
    knows_letters = dataclasses.replace(knows_digits, class_names=LETTERS)
    assert knows_letters.draws_classes(LETTERS) and not knows_letters.draws_classes(LETTERS[::-1])
    assert not knows_letters.draws_classes(LETTERS[:9])
    assert dataclasses.replace(knows_letters, labelled=True).draws_classes(("x",))  # a checkpoint has said so
    assert make_task(Q_FORMER, other, dit_from=str(dit_run), sampling={"prompts": ["a"]}).labelled


def test_the_attention_of_a_recipe_is_that_of_the_trained_dit(make_task, dit_run):
    task = make_task(Q_FORMER, dit_from=str(dit_run), model={"attention": "sdpa"})
    backends = {module.backend for module in task.model.dit.modules() if isinstance(module, SelfAttention)}
    assert backends == {"sdpa"} and task.model.dit.config.attention == "sdpa"


def test_learned_classes_have_a_table(make_task, saved):
    one_hot, learned = (make_task(CROSS, text_encoder={"name": name}).model for name in ("one_hot", "learned"))
    assert isinstance(one_hot.text_proj, torch.nn.Linear)
    assert learned.text_proj[0].weight.shape == (32, 10)  # a column a class
    run = fastdiff.load(saved(CROSS, text_encoder={"name": "learned"}))
    assert run.model.config.text_embedding_dim == 32 and run.sample("3", output_type="pt").shape == (1, 1, 8, 8)


def test_texts_that_are_never_chosen_are_not_read(make_task, digits):
    captions = Captions.of(("name", "caption"), [["3", "a three"], ["7", None]], [["3", "a three"]])
    texts, rows = trained_texts(captions, ["caption"])
    assert texts == ("3", "7") and rows.tolist() == [[0, -1], [1, -1]]
    table = [[str(label), "words"] for label in digits.train.labels.tolist()]
    data = captioned(digits, Captions.of(("name", "caption"), table, table[: len(digits.held_out)]))
    with pytest.raises(ValueError, match="prompt: got 'words'; expected the name of a class"):
        make_task(CROSS, data)
    task = make_task(CROSS, data, objective={"entry_weights": {"caption": 0}})
    assert len(task.states) == 10 and torch.isfinite(task.loss(task.model, task.batch(0, range(4))))


def captioned(data, captions):
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return CaptionedData(**values, captions=captions, attributes={})


NO_NULL = {**DIT["model"], "class_dropout_prob": 0.0, "null_label": False}


def test_a_dit_without_a_null_label_learns_to_read_without_dropped_texts(make_task, tmp_path):
    fields = {"train": "all", "model": NO_NULL, "sampling": {"guidance_scale": 1.0}}
    with pytest.raises(ValueError, match="objective.text_dropout_prob: got 0.1 with model.null_label false"):
        make_task(Q_FORMER, **fields)
    task = make_task(Q_FORMER, **fields, objective={"text_dropout_prob": 0.0})
    assert torch.isfinite(task.loss(task.model, task.batch(0, range(4))))
    recipe = write_recipe(tmp_path / "dit.yaml", DIT, model=NO_NULL, sampling={"guidance_scale": 1.0},
                          training={"max_steps": 1})  # fmt: skip
    train.main([str(recipe), "--training.output_dir", str(tmp_path / "dit")])
    fields = {"dit_from": str(tmp_path / "dit"), "objective": {"text_dropout_prob": 0.0}}
    with pytest.raises(ValueError, match="sampling.guidance_scale: got 2.0; the DiT of dit_from was trained without"):
        make_task(Q_FORMER, **fields)
    task = make_task(Q_FORMER, **fields, sampling={"guidance_scale": 1.0})
    assert torch.isfinite(task.loss(task.model, task.batch(0, range(4))))


def test_a_text_that_is_too_long_names_the_field_that_says_so(make_task, tmp_path, digits):
    import transformers
    from tokenizers_of_kinds import bert_like

    tokenizer = bert_like("a digit of " + " ".join("0123456789"))
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16)
    config = transformers.BertConfig(**sizes, vocab_size=1 + max(tokenizer.get_vocab().values()))
    transformers.BertModel(config).save_pretrained(tmp_path / "reader")
    tokenizer.save_pretrained(tmp_path / "reader")
    encoder = {"name": str(tmp_path / "reader"), "max_length": 4}
    too_long = r"prompt: got 'a digit of 3', which has \d tokens; expected at most 4 \(text_encoder.max_length\)"
    with pytest.raises(ValueError, match=too_long):
        make_task(CROSS, text_encoder=encoder, sampling={"prompts": ["a digit of 3"]})
    task = make_task(CROSS, text_encoder=encoder)
    (folder := tmp_path / "saved").mkdir()
    task.save(task.model, folder)
    run = fastdiff.load(folder)
    with pytest.raises(ValueError, match=too_long):
        run.sample(["3", "a digit of 3"])
    with pytest.raises(TypeError, match="prompts: got .3.; expected texts"):
        run.sample(3)


# ------------------------------------------------------------------------------------------------ latents


@pytest.fixture
def vae(tmp_path, digits):
    """A folder with an autoencoder of random weights for digits: 4x4x4 latents of deviation 1."""
    shape = dict(in_channels=1, sample_size=8, latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4)
    torch.manual_seed(0)
    model = make_autoencoder(AutoencoderConfig(**shape, mid_block_add_attention=False)).eval()
    model.register_to_config(scaling_factor=1 / deviation_of(model, digits.train.images, torch.arange(64)))
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def encoded(monkeypatch, tmp_path):
    """The numbers of images of each call that encodes, in a cache of its own."""
    counts, encode = [], AutoencoderRun.encode
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(AutoencoderRun, "encode", lambda run, x: (counts.append(len(x)), encode(run, x))[1])
    return counts


LATENT = {**CROSS, "model": {**CROSS["model"], "input_size": 4, "patch_size": 1, "in_channels": 4}}


def test_a_model_of_other_latents_is_refused_before_they_are_made(make_task, vae, encoded):
    for model in ({"in_channels": 3}, {"input_size": 8}):
        with pytest.raises(ValueError, match=f"model.{next(iter(model))}: got .*; the latents of digits has"):
            make_task(LATENT, model=model, latents={"vae": str(vae)})
    assert not encoded


def test_a_scale_that_does_not_fit_is_refused_before_all_images_are_encoded(vae, encoded, digits):
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 9 * config["scaling_factor"]}))
    with pytest.raises(
        ValueError, match="latents.vae: got .*, whose latents of digits have deviation 9.*; expected ab"
    ):
        load_latents(LatentsConfig(str(vae)), digits, device="cpu", progress=False)
    assert encoded == [256]
    (vae / "config.json").write_text(json.dumps(config))
    load_latents(LatentsConfig(str(vae)), digits, device="cpu", progress=False)
    assert sum(encoded[2:]) == len(digits.train) + len(digits.held_out) and encoded[1] == 256
    before = len(encoded)
    load_latents(LatentsConfig(str(vae)), digits, device="cpu", progress=False)
    assert len(encoded) == before


def test_latents_without_a_decoder_are_no_pictures(make_task, vae, encoded, tmp_path, capsys):
    task = make_task(LATENT, latents={"vae": str(vae)})
    (folder := tmp_path / "saved").mkdir()
    task.save(task.model, folder)
    shutil.rmtree(folder / "vae")
    run = fastdiff.load(folder)
    assert run.sample("3", output_type="latent").shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="saved: got a model of latents with 4 channels and no decoder"):
        run.sample("3")
    study = tmp_path / "study.yaml"
    study.write_text("entries: [{name: a, prompts: ['3']}]")
    for options in (["--prompt", "3"], ["--config", study]):
        assert "got a model of latents with 4 channels" in refused(sample, [folder, *options], capsys)


# ------------------------------------------------------------------------------------------------ saved models


def test_saved_parts_that_do_not_fit_each_other(make_task, dit_run, vae, tmp_path):
    task = make_task(Q_FORMER, dit_from=str(dit_run))
    (folder := tmp_path / "saved").mkdir()
    task.save(task.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dit": config["dit"] | {"hidden_size": 48}}))
    with pytest.raises(ValueError, match="saved") as error:
        fastdiff.load(folder)
    assert "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vae").mkdir()
    for file in vae.iterdir():
        (folder / "vae" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="latent_channels: got 4; expected 1, as the DiT beside it has"):
        fastdiff.load(folder)


def test_guidance_of_a_model_that_always_had_a_text(saved, tmp_path, capsys):
    folder = saved(CROSS, objective={"text_dropout_prob": 0.0}, sampling={"guidance_scale": 1.0})
    run = fastdiff.load(folder)
    assert run.sample("3", output_type="pt").shape == (1, 1, 8, 8)
    message = "guidance_scale: got 2; .*saved was trained with text_dropout_prob 0 and never learnt"
    with pytest.raises(ValueError, match=message):
        run.sample("3", guidance_scale=2)
    assert "guidance_scale: got 2" in refused(sample, [folder, "--prompt", "3", "--guidance-scale", 2], capsys)
    (tmp_path / "study.yaml").write_text("entries: [{name: a, prompts: ['3'], guidance_scale: [1, 3]}]")
    assert "entry 1 (a): guidance_scale: got 3" in refused(
        sample, [folder, "--config", tmp_path / "study.yaml"], capsys
    )


# ------------------------------------------------------------------------------------------------ commands


def test_prompts_and_numbers_that_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="--config: got it beside --images-per-prompt; expected one of them"):
        SampleOptions(config="llm2dit", images_per_prompt=2)
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="--prompt-file: got .*none.txt', which has no prompt; expected one on each"):
        sample_prompted(str(tmp_path), SampleOptions(prompt_file=str(tmp_path / "none.txt")))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: a, prompts: ['3'], count: 4}", "count: got 4 without combinations; leave it out"),
        ("{name: a, prompts: ['3'], attention_average: heads}", "attention_average: got heads without attention_times"),
    ],
)
def test_fields_of_an_entry_that_would_be_ignored(saved, tmp_path, capsys, entry, message):
    (tmp_path / "study.yaml").write_text(f"entries: [{entry}]")
    text = refused(sample, [saved(CROSS), "--config", tmp_path / "study.yaml"], capsys)
    assert "study.yaml: entry 1 (a)" in text and message in text


def test_numbers_of_an_entry_that_are_too_large(saved, tmp_path, capsys):
    folder, study = saved(CROSS), tmp_path / "study.yaml"
    study.write_text(f"entries: [{{name: a, prompts: ['3'], guidance_scale: {10**400}}}]")
    assert "entry 1: guidance_scale: got 1000" in refused(sample, [folder, "--config", study], capsys)
    entry = f"{{name: b, prompts: ['3'], images_per_prompt: 2, seed: {2**64 - 1}}}"
    study.write_text(f"entries: [{{name: a, prompts: ['3']}}, {entry}]")
    assert f"entry 2 (b): seed: got {2**64}; expected at most" in refused(sample, [folder, "--config", study], capsys)
    assert not (folder / "study").exists()
    with pytest.raises(TypeError, match=r"seed: got \[5\]; expected a whole number"):
        fastdiff.load(folder).sample("3", seed=[5])


def test_a_damaged_checkpoint_is_told_of_before_pictures_of_others_are_drawn(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", CROSS, training={"max_steps": 2, "checkpoint_every": 1})
    train.main([str(recipe), "--training.output_dir", str(tmp_path / "run")])
    weights = tmp_path / "run" / "checkpoints" / "step_1" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    study = tmp_path / "study.yaml"
    study.write_text("entries: [{name: a, prompts: ['3']}, {name: b, prompts: ['3'], progression: true}]")
    text = refused(sample, [tmp_path / "run", "--config", study], capsys)
    assert "entry 2 (b): " in text and "ema.safetensors was changed after it was written" in text
    assert not (tmp_path / "run" / "study").exists()


def test_the_place_of_an_animation_is_looked_at_before_a_sample_is_drawn(saved, tmp_path, monkeypatch, capsys):
    folder = saved(CROSS)
    (tmp_path / "x.gif").mkdir()
    monkeypatch.setattr(TextToImageRun, "draw", lambda *_, **__: 1 / 0)
    options = [folder, "--prompt", "3", "--animate", "--output", tmp_path / "x.png"]
    assert "x.gif' is a folder; expected the name of a file" in refused(sample, options, capsys)


def test_noise_levels_of_several_images_of_a_text(saved, tmp_path, monkeypatch):
    from fastdiff import visualization

    seen = []
    monkeypatch.setattr(
        visualization, "save_picture_table", lambda images, rows, heads, path, **_: seen.append((images, rows)) or path
    )
    entry = "{name: a, prompts: ['3', '7'], images_per_prompt: 2, noise_levels: [0.2, 0.9], guidance_scale: 1}"
    (tmp_path / "study.yaml").write_text(f"entries: [{entry}]")
    sample.main([str(saved(CROSS)), "--config", str(tmp_path / "study.yaml")])
    ((images, rows),) = seen
    assert images.shape == (8, 2, 1, 8, 8) and rows[::2] == ["3", "3", "7", "7"]
    assert not torch.equal(images[0], images[2])  # two images of one text, each with noise of its own


@pytest.fixture
def few_features(monkeypatch):
    """In place of EfficientNet-Lite0: the mean of an image."""
    from fastdiff import evaluation

    monkeypatch.setattr(evaluation, "image_features", lambda images, *_, **__: torch.zeros(len(images), 2))


def test_a_sampler_is_looked_at_before_a_classifier_is_trained(tmp_path, few_features, monkeypatch, capsys):
    from fastdiff import evaluation

    recipe = write_recipe(tmp_path / "recipe.yaml", CROSS, training={"max_steps": 1})
    train.main([str(recipe), "--training.output_dir", str(tmp_path / "run")])
    monkeypatch.setattr(evaluation, "load_or_train_classifier", lambda *_, **__: 1 / 0)
    assert "sampler: got 'ddim'" in refused(evaluate, [tmp_path / "run", "--sampler", "ddim"], capsys)


def test_all_texts_are_read_before_a_sample_is_drawn(saved, digits, few_features, monkeypatch, tmp_path):
    from fastdiff.tasks.text_to_image import evaluate as module

    table = [["3"], ["7"]] * (len(digits.train) // 2) + [["3"]] * (len(digits.train) % 2)
    other = [["a text that no class has"]] * len(digits.held_out)
    data = captioned(digits, Captions.of(("caption",), table, other))
    run = dataclasses.replace(fastdiff.load(saved(CROSS)), folder=type("Folder", (), {"path": tmp_path})())
    monkeypatch.setattr(module, "load_run", lambda *_, **__: run)
    monkeypatch.setattr(module, "load_data_of", lambda *_: data)
    monkeypatch.setattr(TextToImageRun, "draw", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="'a text that no class has'"):
        module.evaluate_prompted("run", module.EvaluateOptions(num_samples=4))


def test_what_was_measured_is_kept_where_nobody_reads_the_tables(saved, monkeypatch, tmp_path):
    from fastdiff.tasks.text_to_image import evaluate as module

    def gone(*_):
        raise BrokenPipeError

    run = dataclasses.replace(fastdiff.load(saved(CROSS)), folder=type("Folder", (), {"path": tmp_path})())
    monkeypatch.setattr(module, "load_run", lambda *_, **__: run)
    monkeypatch.setattr(module, "load_data_of", lambda *_: None)
    monkeypatch.setattr(module, "_measured", lambda *_: iter([({"accuracy": 0.5}, "a table")]))
    monkeypatch.setattr("sys.stdout", type("Closed", (), {"write": gone, "flush": gone})())
    with pytest.raises(BrokenPipeError):
        module.evaluate_prompted("run", module.EvaluateOptions(num_samples=4))
    assert json.loads((tmp_path / "evaluation.json").read_text())["accuracy"] == 0.5


def test_cifar10_is_asked_for_by_class(tmp_path):
    """Its held-out images have no captions, with a file of them or without."""
    for number, name in enumerate((*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")):
        labels = (np.arange(12, dtype=np.uint8) + number) % 10
        pixels = np.random.default_rng(number).integers(0, 256, (12, 3072), dtype=np.uint8)
        (tmp_path / f"{name}.bin").write_bytes(np.column_stack([labels, pixels]).tobytes())
    captions = tmp_path / "captions.jsonl"
    captions.write_text(json.dumps({"index": 0, "label_index": 0, "caption": "an airplane"}))
    for fields in ({}, {"captions": str(captions)}):
        data = load_data(DataConfig(name="cifar10", folder=str(tmp_path), **fields))
        prompts, values = combination_prompts(data, 20, seen=True)
        assert len(prompts) == 20 and set(values) == {"class"} and set(values["class"].tolist()) == set(range(10))
        assert prompts[3] in ("cat", "kitty", "feline") and values["class"][3] == 3
        assert combination_prompts(data, 20, seen=False)[0] == []
