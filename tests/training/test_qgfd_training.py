"""QGFD models through the trainer and the commands: samples people can look at, numbers, exact resume, bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from models.qgfd_models import write_checkpoints
from PIL import Image
from training.qgfd_recipes import recipe_of, write_data, write_recipe

from fastdiff import evaluate, sample, train
from fastdiff.models import QGFDModel
from fastdiff.recipes import parse_recipe
from fastdiff.tasks.qgfd.recipe import QGFDRecipe
from fastdiff.tasks.qgfd.run import load_run
from fastdiff.tasks.qgfd.task import QGFDTask
from fastdiff.training import Trainer

MODALITIES = ("text", "image", "audio", "video", "tabular")
FILES = {
    "text": {".png", ".txt"},
    "image": {".png"},
    "audio": {".png", ".wav"},
    "video": {".png", ".gif"},
    "tabular": {".png", ".csv"},
}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qgfd_data")
    write_data(folder)
    return folder


@pytest.fixture
def train_run(data, tmp_path):
    """train_run("image", …, options=[…], **sections) → the folder of a finished run."""

    def run(*modalities, options=(), name="run", **sections):
        recipe = write_recipe(tmp_path / f"{name}.yaml", recipe_of(data, *modalities, **sections))
        train.main([str(recipe), "--training.output_dir", str(tmp_path / name), *map(str, options)])
        return tmp_path / name

    return run


@pytest.fixture
def make_task(data, tmp_path):
    def make(*modalities, **sections):
        path = write_recipe(tmp_path / "task.yaml", recipe_of(data, *modalities, **sections))
        return QGFDTask(parse_recipe(QGFDRecipe, [str(path)]))

    return make


def failure(command, arguments, capsys) -> str:
    """Runs a command that must fail for a reason of the user's: its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command.main([str(a) for a in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("data ")]
    assert exit_.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_modality_from_recipe_to_number(train_run, modality, capsys):
    run = train_run(modality, sampling={"evaluation_samples": 20, "num_inference_steps": 2, "num_samples": 2})
    assert {path.suffix for path in run.glob("samples.*")} == FILES[modality]
    assert "trained 6 steps" in capsys.readouterr().out
    measured = json.loads((run / "evaluation.json").read_text())[modality]
    if modality == "image":
        assert 0 <= measured["samples"]["class_accuracy"] <= 1 < measured["samples"]["frechet_distance"]
        assert measured["held_out"]["class_accuracy"] > 0.7  # seen: 0.96; 0.1 by chance
    elif modality == "tabular":
        assert measured["rows_synthetic"] == 20 and measured["real"]["value"] > 0.8
    else:  # an untrained denoiser is farther from the training examples than held-out ones are
        assert measured["samples"] > measured["held_out"] > -1e-3
    if modality == "text":
        assert 0 <= measured["token_pairs"]["samples"] < 0.9 < measured["token_pairs"]["held_out"] <= 1
    validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert validation[-1]["step"] == 6
    assert validation[-1]["loss"] == pytest.approx(validation[-1]["diffusion"] + validation[-1]["reconstruction"])
    sample.main([str(run), "--seed", "3"])
    written = capsys.readouterr().out.split()
    assert {path[path.rindex(".") :] for path in written} == FILES[modality]
    assert all((run / f"samples-seed-3{suffix}").stat().st_size > 0 for suffix in FILES[modality])
    evaluate.main([str(run), "--num-samples", "20", "--output", str(run / "again.json")])
    assert json.loads((run / "again.json").read_text())[modality] == measured


@pytest.mark.parametrize("order", ["in_turn", "mixed"])
def test_several_modalities_share_a_backbone(train_run, order, capsys):
    run = train_run("text", "image", "tabular", objective={"order": order, "validation_samples": 8})
    names = {path.name for path in run.glob("samples*")}
    assert names == {"samples.png", "samples_text.png", "samples_text.txt", "samples_image.png"} | {
        "samples_tabular.png", "samples_tabular.csv",
    }  # fmt: skip
    heights = [Image.open(run / f"samples_{name}.png").height for name in ("text", "image", "tabular")]
    with Image.open(run / "samples.png") as sheet:
        assert max(heights) < sheet.height <= sum(heights)
    sample.main([str(run), "--modality", "image", "--labels", "3,7", "--images-per-label", "1"])
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "samples-seed-0.png")
    assert "this model has text, image, tabular" in failure(sample, [run, "--modality", "audio"], capsys)
    sample.main([str(run), "--labels", "3", "--images-per-label", "2", "--output", str(run / "threes.png")])
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "threes.png")  # of what has classes
    assert "--images-per-label: got it for text" in failure(
        sample, [run, "--modality", "text", "--images-per-label", "2"], capsys
    )
    assert "--length: got 4, whose unit differs by modality" in failure(sample, [run, "--length", "4"], capsys)
    evaluate.main([str(run), "--modality", "text", "--num-samples", "8"])
    assert "text" in json.loads((run / "evaluation_text.json").read_text())
    assert not (run / "evaluation.json").exists()  # which has the numbers of all, where they were measured
    assert "which it does not fit; expected --images-per-label" in failure(
        sample, [run, "--modality", "image", "--num-samples", "2"], capsys
    )
    sample.main([str(run), "--modality", "tabular", "--num-samples", "3", "--output", str(run / "mine.csv")])
    assert len((run / "mine.csv").read_text().splitlines()) == 4 and (run / "mine.png").exists()
    assert "not conditioned on classes" in failure(sample, [run, "--modality", "text", "--labels", "1"], capsys)
    assert "got '11'; expected 0 to 9" in failure(sample, [run, "--modality", "image", "--labels", "11"], capsys)


@pytest.mark.parametrize("order", ["in_turn", "mixed"])
def test_batches_do_not_depend_on_the_number_of_processes(make_task, order):
    task = make_task("text", "image", "tabular", objective={"order": order}, image={"condition_dropout": 0.5})
    for step in range(4):
        whole = task.batch(step, range(6))
        parts = [task.batch(step, slots) for slots in (range(0, 2), range(2, 5), range(5, 6))]
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([part[name] for part in parts if name in part])), name
        assert sum(task.weight(part) for part in parts) == task.weight(whole) == 6
        modalities = {name.partition(".")[0] for name in whole}
        in_turn = {("text", "image", "tabular")[step % 3]}
        assert modalities == (in_turn if order == "in_turn" else {"text", "image", "tabular"})


def test_every_example_is_read_once_an_epoch_by_each_modality(make_task):
    task = make_task("image", "tabular")
    rows = len(task.sources["tabular"].data.train)
    steps = [step for step in range(2 * (rows // 6)) if step % 2]  # tables have the odd steps
    read = [index for step in steps for index in task.sample_ids(step)]
    assert len(set(read)) == len(read) == rows // 6 * 6


def test_conditions_are_dropped_for_guidance(make_task):
    labels = [make_task("image", image={"condition_dropout": p}).batch(0, range(6))["image.labels"] for p in (0.0, 1.0)]
    assert (labels[0] < 10).all() and (labels[1] == 10).all()


def test_a_mixed_step_is_the_sum_of_its_modalities(make_task):
    task = make_task("image", "tabular", objective={"order": "mixed"})
    batch = task.batch(0, range(6))
    parts = [{k: v for k, v in batch.items() if k.startswith(name)} for name in ("image.", "tabular.")]
    torch.testing.assert_close(
        task.loss(task.model, batch), sum(task.loss(task.model, part) for part in parts), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("order", ["in_turn", "mixed"])
def test_resume_is_exact(make_task, data, tmp_path, order, same_files):
    """Also before every modality had its turn, when the optimizer has no state of its adapter."""

    def trainer(folder, *options):
        recipe = recipe_of(data, "text", "image", "tabular", objective={"order": order, "validation_samples": 8})
        path = write_recipe(tmp_path / "resume.yaml", recipe)
        arguments = [str(path), "--training.output_dir", str(folder), "--training.checkpoint_every", "1", *options]
        recipe = parse_recipe(QGFDRecipe, arguments)
        return Trainer(QGFDTask(recipe), recipe.training)

    whole = trainer(tmp_path / "whole").train(stop_at=4).checkpoint
    trainer(tmp_path / "parts").train(stop_at=1)
    resumed = trainer(tmp_path / "parts", "--training.resume", "true").train(stop_at=4).checkpoint
    same_files(whole, resumed)


@pytest.mark.slow
def test_two_processes_equal_one(data, tmp_path):
    options = dict(objective={"order": "in_turn"}, training={"max_steps": 4, "checkpoint_every": 4})
    recipe = write_recipe(tmp_path / "r.yaml", recipe_of(data, "image", "tabular", **options))
    folders = [tmp_path / "one", tmp_path / "two"]
    arguments = [[str(recipe), "--training.output_dir", str(folder)] for folder in folders]
    train.main(arguments[0])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, "-m", "fastdiff.train", *arguments[1]], check=True, capture_output=True)
    curves = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves.append([(line["loss"], line["gradient_norm"]) for line in lines])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


def test_adapters_of_a_finished_run_serve_another_backbone(train_run, make_task, capsys):
    first = train_run("image", image={"diffuse_attention": False}, name="first")
    sections = dict(
        image={"diffuse_attention": False},
        objective={"adapters_from": str(first), "validation_samples": 8},
        backbone={"steps": 0},
    )
    second = train_run("image", name="second", **sections)
    old, new = (load_run(run).model.adapters["image"].state_dict() for run in (first, second))
    taken = [name for name in old if not name.startswith("label_embedding")]
    assert all(torch.equal(old[name], new[name]) for name in taken)
    assert not torch.equal(old["label_embedding.embedding_table.weight"], new["label_embedding.embedding_table.weight"])
    assert "reconstruction" not in json.loads((second / "validation.jsonl").read_text().splitlines()[-1])
    with pytest.raises(ValueError, match="other sizes"):
        make_task("image", **{**sections, "image": {"diffuse_attention": False, "decoder_layers": 3}})
    with pytest.raises(ValueError, match="diffuses attention as"):
        make_task("image", **{**sections, "image": {"diffuse_attention": True}, "backbone": {"steps": 2}})
    words = train_run("text", name="words")  # embeddings alone, without attention of their own
    make_task("text", objective={"adapters_from": str(words)}, backbone={"steps": 2})
    with pytest.raises(ValueError, match="has the modalities image; expected video"):
        make_task("video", objective=sections["objective"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random tiny T5, ViT and Wav2Vec2; the tokenizer knows an end of text."""
    folders = write_checkpoints(tmp_path_factory.mktemp("checkpoints"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folders["text"]))
    tokenizer.eos_token = tokenizer.pad_token  # as GPT-2's kind has it
    tokenizer.save_pretrained(str(folders["text"]))
    return folders


def test_pretrained_encoders_of_every_modality_that_has_them(train_run, checkpoints, capsys):
    names = ("text", "image", "audio", "video")
    sections = {name: {"backbone_name": str(checkpoints[name])} for name in names}
    audio = {"sampling_rate": 8000, "num_samples": 512}
    run = train_run(*names, options=("--training.max_steps", 4), audio_data=audio, **sections)
    model = load_run(run).model
    assert {name: model.adapters[name].backbone.config.model_type for name in names} == {
        "text": "t5", "image": "vit", "audio": "wav2vec2", "video": "vit",
    }  # fmt: skip
    sample.main([str(run)])
    assert len(capsys.readouterr().out.splitlines()[-7:]) == 7
    QGFDModel.from_pretrained(run / "checkpoints" / "step_4")  # nothing else is needed


def test_token_frequencies_are_known_from_the_start(make_task):
    task = make_task(
        "text", text={"token_posterior": True}, backbone={"latent_dim": 16},
        diffusion={"prediction_type": "sample"}, objective={"reconstruction_weight": 0},
    )  # fmt: skip
    tokens = task.sources["text"].data.train.part.targets.tokens
    prior = task.model.adapters["text"].token_head.bias.detach().softmax(0)
    space = task.sources["text"].processor.encode(" ")[0]
    assert prior[space].item() == pytest.approx(
        (int((tokens == space).sum()) + 1) / (len(tokens) + len(prior)), rel=1e-4
    )


@pytest.mark.parametrize("length_format", ["eos_fill", "pad_fill", "eos_only"])
def test_counts_of_tokens_are_those_of_the_windows(make_task, tmp_path, length_format):
    pairs = [{"prompt": f"{n}", "answer": "a" * (n % 5 + 1)} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    text_data = {"name": "jsonl", "path": str(tmp_path / "pairs.jsonl"), "sample": "pairs", "max_length": 8}
    source = make_task("text", text_data={**text_data, "length_format": length_format}).sources["text"].data.train
    batch = source.batch(range(len(source)))
    ids = batch["input_ids"][batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()]
    counts = source.token_counts()
    assert torch.equal(counts, torch.bincount(ids, minlength=len(counts)))


def test_text_conditioned_on_text(train_run, tmp_path, capsys):
    pairs = [{"prompt": f"{n} and {n}", "answer": f"{2 * n}"} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    text_data = {"name": "jsonl", "path": str(tmp_path / "pairs.jsonl"), "sample": "pairs", "max_length": 6}
    run = train_run("text", text_data={**text_data, "min_length": 6})
    first, *texts = re.split(r"^--- \d+ ---\n", (run / "samples.txt").read_text(), flags=re.MULTILINE)
    assert first == "" and len(texts) == 2 and all(" → " in text for text in texts)
    sample.main([str(run), "--prompt", "7 and 7", "--num-samples", "2", "--guidance-scale", "2"])
    _, *texts = re.split(r"^--- \d+ ---\n", (run / "samples-seed-0.txt").read_text(), flags=re.MULTILINE)
    assert len(texts) == 2 and all(text.startswith("7 and 7 → ") for text in texts)
    evaluate.main([str(run), "--num-samples", "10"])


BAD = {
    "unknown modality": (("image",), {"smell": {"hidden_size": 8}}, "there is no section 'smell'; expected"),
    "no modality": ((), {}, "expected a section of one or more of text, image, audio, video, tabular"),
    "size of other data": (("image",), {"image": {"image_size": 64}}, "image.image_size: got 64; the data set digits"),
    "sampler": (("image",), {"sampling": {"sampler": "ddim"}}, "expected one of euler, dpm-solver++, renoise"),
    "small mixed batch": (
        ("image", "tabular"),
        {"objective": {"order": "mixed"}, "training": {"batch_size": 1}},
        "a mixed batch of 2 modalities needs at least 2",
    ),
    "hub id of a table": (
        ("tabular",), {"tabular": {"backbone_name": "t5-small"}}, "modality 'tabular' has no Hugging Face encoder",
    ),
    "no folder": (("audio",), {"audio_data": {"folder": "/nowhere"}}, "audio_data.folder: got '/nowhere', which"),
    "out of range": (("video",), {"video_data": {"num_frames": 0}}, "video_data.num_frames: got 0; expected at least"),
    "no run": (("image",), {"objective": {"adapters_from": "/nowhere"}}, "/nowhere: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_recipes_that_do_not_fit(data, tmp_path, case, capsys):
    modalities, sections, message = BAD[case]
    recipe = write_recipe(tmp_path / "bad.yaml", recipe_of(data, *modalities, **sections))
    assert message in failure(train, [recipe, "--training.output_dir", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


def test_a_backbone_of_another_modality(data, checkpoints, tmp_path, capsys):
    for modality, other in (("image", "text"), ("text", "audio"), ("audio", "image")):
        sections = {modality: {"backbone_name": str(checkpoints[other])}}
        recipe = write_recipe(tmp_path / "bad.yaml", recipe_of(data, modality, **sections))
        assert f"modality {modality!r} takes one of" in failure(train, [recipe], capsys)


def test_an_encoder_of_another_rate(data, checkpoints, tmp_path, capsys):
    recipe = recipe_of(data, "audio", audio={"backbone_name": str(checkpoints["audio"])})
    message = failure(train, [write_recipe(tmp_path / "bad.yaml", recipe)], capsys)
    assert (
        "audio_data.sampling_rate: got 4000" in message and "expects 8000 Hz audio" in message and "to 512" in message
    )


def test_sounds_of_another_rate_are_resampled_and_it_is_said(train_run, capsys):
    train_run("audio", audio_data={"sampling_rate": 2000, "num_samples": 128})
    assert "6 sounds of 4000 Hz are resampled to 2000 Hz" in capsys.readouterr().err


@pytest.mark.parametrize(("column", "message"), [("1,,3", "missing values"), ("2,2,2", "is constant")])
def test_tables_that_cannot_be_learnt(data, tmp_path, column, message, capsys):
    rows = [f"{value},{name}" for value, name in zip(column.split(",") * 4, "abababababab", strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(["width,kind", *rows]) + "\n")
    table = {"name": "csv", "path": str(tmp_path / "table.csv")}
    recipe = write_recipe(tmp_path / "bad.yaml", recipe_of(data, "tabular", tabular_data=table))
    error = failure(train, [recipe, "--training.output_dir", tmp_path / "run"], capsys)
    assert "column 'width'" in error and message in error and "name it in tabular_data.drop" in error


def test_frames_of_different_sizes(data, tmp_path, capsys):
    for name in ("a", "b"):
        for video in ("one", "two"):
            folder = tmp_path / "videos" / name / video
            folder.mkdir(parents=True)
            for frame in range(2):
                Image.new("L", (8, 8 + frame * (name == "b"))).save(folder / f"{frame}.png")
    videos = {"name": "video_folder", "folder": str(tmp_path / "videos")}
    recipe = write_recipe(tmp_path / "bad.yaml", recipe_of(data, "video", video_data=videos))
    assert "expected frames of one size in a video" in failure(train, [recipe], capsys)


def test_data_that_changed_since_training_is_not_measured_by(train_run, tmp_path, capsys):
    lines = [f"{i},{i % 3},{'ab'[i % 2]}" for i in range(30)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["x,y,kind", *lines]) + "\n")
    run = train_run("tabular", tabular_data={"name": "csv", "path": str(table)})
    table.write_text("\n".join(["x,y,kind", *lines, "77,1,a"]) + "\n")
    assert "23 examples and 8 held-out ones, not 22 and 8" in failure(evaluate, [run], capsys)


def test_commands_name_what_is_for_other_runs(train_run, capsys):
    run = train_run("image")
    assert "nrecognized arguments: --num-pairs" in failure(evaluate, [run, "--num-pairs", "3"], capsys)
    assert "nrecognized arguments: --prompt" in failure(sample, [run, "--prompt", "x"], capsys)
    from fastdiff import generate

    assert "use fastdiff.sample or fastdiff.evaluate" in failure(generate, [run, "--prompt", "x"], capsys)


def test_shipped_recipes_parse():
    from pathlib import Path

    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("qgfd_*.yaml"))
    assert [path.stem for path in recipes] == [
        f"qgfd_{name}" for name in ("audio", "image", "shared", "tabular", "text", "video")
    ]
    for path in recipes:
        recipe = parse_recipe(QGFDRecipe, [str(path)])
        assert recipe.training.output_dir == f"runs/{path.stem}"
        expected = MODALITIES if path.stem == "qgfd_shared" else (path.stem.removeprefix("qgfd_"),)
        assert recipe.modalities == expected


def test_the_study_of_hops(train_run, tmp_path, monkeypatch, capsys):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("qgfd_study", Path(__file__).parents[2] / "tools" / "qgfd_study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    run = train_run("image", image={"diffuse_attention": False})

    in_its_own = subprocess.run

    def in_this_process(command, *arguments, **options):
        if command[1:3] != ["-m", "fastdiff.train"]:  # libraries run programs, too
            return in_its_own(command, *arguments, **options)
        train.main(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(study.subprocess, "run", in_this_process)
    options = f"--hops 0 2 --seeds 0 1 --max-steps 2 --draws 8 --workers 1 --folder {tmp_path / 'study'}"
    files = ["--output", str(tmp_path / "study.json"), "--picture", str(tmp_path / "study.png")]
    monkeypatch.setattr(sys, "argv", ["qgfd_study.py", str(run), *options.split(), *files])
    study.main()
    report = json.loads((tmp_path / "study.json").read_text())
    assert [(r["hops"], r["seed"], r["step"]) for r in report["results"]] == [
        (0, 0, 2),
        (2, 0, 2),
        (0, 1, 2),
        (2, 1, 2),
    ]
    assert len({r["losses"]["0"] for r in report["results"]}) == 4
    assert all(r["losses"]["0.4"] > r["losses"]["0"] for r in report["results"])
    with Image.open(tmp_path / "study.png") as picture:
        assert picture.width > 300
    printed = capsys.readouterr().out
    mean = np.mean([r["losses"]["0"] for r in report["results"] if r["hops"] == 2])
    assert f"| 2 | {mean:.4f} ± " in printed
    assert study.interval([1.0, 2.0], "{:.2f}") == "1.50 ± 6.35"  # Student's t of one degree of freedom
