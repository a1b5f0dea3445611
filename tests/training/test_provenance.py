"""A run knows its data and its files: what changed since is refused, by name, unless it is accepted knowingly."""

import json
import os
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from training.qgfd_recipes import BASE, SMALL

from fastdiff import evaluate, train
from fastdiff.data import load_data
from fastdiff.data.config import DataConfig
from fastdiff.files import fingerprint_of_files
from fastdiff.tasks.dit.run import load_run
from fastdiff.training.provenance import changes_of

RESUME = ("--training.resume", "true", "--training.max_steps", "3")
ACCEPT = ("--training.accept_changed_data", "true")


def failure(command, arguments, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command.main([str(a) for a in arguments])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and text.startswith("error: "), text
    return text


def write(path, recipe, folder, **training):
    fields = {
        "max_steps": 2,
        "checkpoint_every": 2,
        "output_dir": str(folder),
        "device": "cpu",
        "mixed_precision": "no",
    }
    recipe = {**recipe, "training": {**recipe.get("training", {}), **fields, **training}}
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def pictures(tmp_path, tiny_yaml):
    """A folder of two classes, and the recipe of a run on it."""
    folder, noise = tmp_path / "pictures", np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(noise.integers(0, 255, (8, 8), np.uint8)).save(folder / name / f"{index}.png")
    data = {"name": "image_folder", "folder": str(folder), "image_size": 8, "channels": 1}
    tiny = yaml.safe_load(tiny_yaml.read_text())
    recipe = {**tiny, "data": data, "model": {**tiny["model"], "num_classes": 2}}
    train.main([str(write(tmp_path / "recipe.yaml", recipe, tmp_path / "run"))])
    return folder


def test_a_renamed_class_is_refused_on_resume_and_in_evaluation(pictures, tmp_path, capsys):
    (pictures / "dog").rename(pictures / "ant")  # now it sorts first: every label would move by one
    for command, arguments, option in (
        (train, [tmp_path / "recipe.yaml", *RESUME], "--training.accept_changed_data true"),
        (evaluate, [tmp_path / "run", "--num-samples", "2"], "--accept-changed-data"),
    ):
        text = failure(command, arguments, capsys)
        assert "data: got other data than the run" in text and f"pass {option} to go on" in text
        assert "(class 'dog' gone, class 'ant' new)" in text
    assert not (tmp_path / "run" / "checkpoints" / "step_3").exists()


def test_files_that_were_added_are_refused_or_accepted_knowingly(pictures, tmp_path, capsys):
    shutil.copy(pictures / "cat" / "0.png", pictures / "cat" / "9.png")
    text = failure(train, [tmp_path / "recipe.yaml", *RESUME], capsys)
    assert "(7 examples and 2 held-out ones, not 6 and 2)" in text
    train.main([str(tmp_path / "recipe.yaml"), *RESUME, *ACCEPT])
    captured = capsys.readouterr()
    assert "data: going on with data that changed: 7 examples" in captured.err and "trained 3 steps" in captured.out
    # from then on this is the run's data
    train.main([str(tmp_path / "recipe.yaml"), "--training.resume", "true", "--training.max_steps", "4"])
    assert "changed" not in capsys.readouterr().err


def test_content_of_files_counts_and_their_times_and_place_do_not(pictures, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(pictures, moved)
    shutil.rmtree(pictures)
    moved.rename(pictures)
    for path in pictures.rglob("*.png"):
        os.utime(path, (1, 1))
    train.main([str(tmp_path / "recipe.yaml"), *RESUME])
    first, second = pictures / "cat" / "0.png", pictures / "dog" / "0.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    text = failure(train, [tmp_path / "recipe.yaml", "--training.resume", "true"], capsys)
    assert "(the same number of examples with other content)" in text


def test_data_that_was_moved_is_the_same_where_its_content_is(pictures, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    pictures.rename(moved)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"]["folder"] = str(moved)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train.main([str(tmp_path / "recipe.yaml"), *RESUME])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["folder"] == str(moved)
    (moved / "dog").rename(moved / "ant")
    text = failure(train, [tmp_path / "recipe.yaml", *RESUME], capsys)
    assert "class 'dog' gone, class 'ant' new" in text
    state = tmp_path / "run" / "checkpoints" / "step_3" / "trainer_state.json"
    values = json.loads(state.read_text())
    del values["data"], values["sha256"]  # as fastdiff 0.1.0 wrote it: nothing tells whether it is the same
    state.write_text(json.dumps(values))
    text = failure(train, [tmp_path / "recipe.yaml", *RESUME, "--data.folder", str(pictures)], capsys)
    assert "data.folder: got" in text


def test_large_folders_are_told_by_sizes(tmp_path, monkeypatch):
    from fastdiff import files

    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(b"12")
    whole = fingerprint_of_files(paths)
    paths[0].write_bytes(b"34")
    assert fingerprint_of_files(paths) != whole
    monkeypatch.setattr(files, "_CONTENT_READ", 3)
    by_size = fingerprint_of_files(paths)
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("read although it is large"))
    paths[0].write_bytes(b"12")
    assert fingerprint_of_files(paths) == by_size
    paths[0].write_bytes(b"123")
    assert fingerprint_of_files(paths) != by_size


def test_renamed_categories_of_a_table(tmp_path, capsys):
    table = tmp_path / "table.csv"
    lines = [f"{i},{'ab'[i % 2]}" for i in range(30)]
    table.write_text("\n".join(["x,kind", *lines]))
    recipe = {**BASE, "tabular": SMALL, "tabular_data": {"name": "csv", "path": str(table)}}
    arguments = [write(tmp_path / "recipe.yaml", recipe, tmp_path / "run"), *RESUME]
    train.main([str(arguments[0])])
    table.write_text(table.read_text().replace("b", "A"))
    text = failure(train, arguments, capsys)
    assert "tabular_data: got other data" in text and "column 'kind': category 'b' gone, category 'A' new" in text
    table.write_text("\n".join(["x,kind", *(f"{2 * i},{'ab'[i % 2]}" for i in range(30))]))
    assert "column 'x' has 2" in failure(train, arguments, capsys)  # in other units: standardised, the rows are equal


@pytest.fixture
def answers(tmp_path):
    """Pairs, a run of a language model on them and one of a length head on that: (pairs, recipe, recipe)."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "answer": "xyz"[: i % 3 + 1]} for i in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {
        "task": "masked_lm",
        "model": {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 24},
        "tokenizer": {"name": "characters"},
        "data": {"name": "jsonl", "path": str(pairs), "sample": "pairs", "min_length": 2, "max_length": 4},
        "objective": {"likelihood_samples": 2},
        "sampling": {"prompts": ["p1"], "generation": {"max_new_tokens": 4, "block_length": 4}},
    }  # fmt: skip
    recipes = [write(tmp_path / "model.yaml", model, tmp_path / "model", batch_size=4)]
    head = {"task": "length_head", "run": str(tmp_path / "model")}
    recipes.append(write(tmp_path / "head.yaml", head, tmp_path / "head", batch_size=4))
    for recipe in recipes:
        train.main([str(recipe)])
    return pairs, *recipes


def test_text_and_tokenizer(answers, tmp_path, capsys):
    pairs, model, head = answers
    whole = pairs.read_text()
    pairs.write_text(whole.replace("p1", "p9", 1))
    for recipe in (model, head):
        text = failure(train, [recipe, *RESUME], capsys)
        assert "data: got other data than the run" in text and "other content" in text
    assert "pass --accept-changed-data" in failure(evaluate, [tmp_path / "model", "--num-pairs", "0"], capsys)
    pairs.write_text(whole.replace("p1", "é1", 1))  # a character that the tokenizer did not know
    assert "(another tokenizer" in failure(train, [model, *RESUME], capsys)
    train.main([str(head), *RESUME, *ACCEPT])  # its tokenizer is the language model's own
    assert "going on with data that changed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.json"])
def test_a_flipped_bit_is_found_when_the_file_is_read(make_trainer, tmp_path, name):
    make_trainer(tmp_path / "run", "--training.max_steps", 2).train()
    file = tmp_path / "run" / "checkpoints" / "step_2" / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} was changed after it was written \(its SHA-256 differs\); delete"):
        make_trainer(tmp_path / "run", "--training.max_steps", 3, "--training.resume", "true")
    reads = {"model.safetensors": "model", "ema.safetensors": "ema", "config.json": "ema"}
    if name not in reads:
        load_run(tmp_path / "run")  # whoever draws samples does not read the optimizer
        return
    with pytest.raises(ValueError, match="was changed"):
        load_run(tmp_path / "run", weights=reads[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.update(step=1),
            "got the trainer state of step 1; expected that of step 2; name the folder",
        ),
        (lambda state: state.update(files={}), "not a whole trainer state"),
        (lambda state: state["files"].pop("ema.safetensors"), "trainer_state.json was changed after it was written"),
        (lambda state: state.update(seed=5), "trainer_state.json was changed after it was written"),
        (lambda state: state["files"].update(a={}), "not a whole trainer state"),
    ],
)
def test_a_changed_state_is_refused(make_trainer, tmp_path, change, message):
    make_trainer(tmp_path / "run", "--training.max_steps", 2).train()
    file = tmp_path / "run" / "checkpoints" / "step_2" / "trainer_state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", "--training.max_steps", 3, "--training.resume", "true")
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path / "run")


def test_a_checkpoint_elsewhere_is_not_told_to_be_deleted(make_trainer, tmp_path):
    make_trainer(tmp_path / "run", "--training.max_steps", 2).train()
    copy = shutil.copytree(tmp_path / "run" / "checkpoints" / "step_2", tmp_path / "kept" / "step_2")
    load_run(copy)
    renamed = copy.rename(tmp_path / "kept" / "step_999")
    with pytest.raises(ValueError, match="got the trainer state of step 2; .* 999; name the folder step_2"):
        load_run(renamed)
    best = renamed.rename(tmp_path / "kept" / "step_best")
    load_run(best)
    (best / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="cut short; copy it again, whole"):
        load_run(best)


def renumbered(pictures):
    """The names "1", "10" and "2": fastdiff of before gave them the labels 0, 1 and 2."""
    for old, new in (("cat", "1"), ("dog", "10")):
        (pictures / old).rename(pictures / new)
    shutil.copytree(pictures / "10", pictures / "2")


def test_classes_in_the_order_of_before(tiny_yaml, pictures, tmp_path, capsys):
    renumbered(pictures)
    tiny = yaml.safe_load(tiny_yaml.read_text())
    data = {"name": "image_folder", "folder": str(pictures), "image_size": 8, "channels": 1}
    recipe = {**tiny, "data": data, "model": {**tiny["model"], "num_classes": 3}}
    before = write(
        tmp_path / "before.yaml", {**recipe, "data": {**data, "class_names": ["1", "10", "2"]}}, tmp_path / "b"
    )
    train.main([str(before)])
    config = tmp_path / "b" / "config.yaml"  # as an older fastdiff wrote it
    stored = yaml.safe_load(config.read_text())
    del stored["data"]["class_names"]
    config.write_text(yaml.safe_dump(stored))
    text = failure(train, [config, *RESUME, *ACCEPT], capsys)  # labels would mean others: never accepted
    assert "data.class_names: got another order" in text and """--data.class_names '["1", "10", "2"]'""" in text
    train.main([str(config), *RESUME, "--data.class_names", '["1", "10", "2"]'])
    assert load_run(tmp_path / "b").class_names == ("1", "10", "2")
    stored = yaml.safe_load(config.read_text())
    stored["data"]["class_names"] = None
    config.write_text(yaml.safe_dump(stored))
    evaluate.main([str(tmp_path / "b"), "--num-samples", "3"])  # takes the run's order by itself


def test_a_renamed_class_is_accepted_where_the_recipe_orders_them(tiny_yaml, pictures, tmp_path, capsys):
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"]["class_names"] = ["dog", "cat"]
    train.main([str(write(tmp_path / "ordered.yaml", recipe, tmp_path / "ordered"))])
    (pictures / "dog").rename(pictures / "cow")
    text = failure(evaluate, [tmp_path / "ordered", "--num-samples", "2"], capsys)
    assert "class 'dog' gone, class 'cow' new" in text and "pass --accept-changed-data" in text
    evaluate.main([str(tmp_path / "ordered"), "--num-samples", "2", "--accept-changed-data"])
    assert "going on with data that changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", "2"], "got 2 names; expected each of the 3 subfolders of .* once, and no other: '10'"),
        (["1", "2", "10", "10"], "got 4 names; expected each of the 3 subfolders"),
        (["1", "2", "3"], "no other: '10', '3'"),
    ],
)
def test_class_names_that_are_not_the_folders(pictures, names, message):
    renumbered(pictures)
    with pytest.raises(ValueError, match=f"class_names: .*{message}"):
        load_data(DataConfig("image_folder", folder=str(pictures), class_names=names))


def test_class_names_of_a_set_that_has_its_own():
    with pytest.raises(ValueError, match="class_names: got .* with mnist5k, whose classes have their order"):
        DataConfig("mnist5k", class_names=["1"])


def test_data_that_moved_is_evaluated_with_data_path(pictures, tmp_path, capsys):
    pictures.rename(tmp_path / "moved")
    assert "or pass --data-path with where it lies now" in failure(evaluate, [tmp_path / "run"], capsys)
    evaluate.main([str(tmp_path / "run"), "--num-samples", "2", "--data-path", str(tmp_path / "moved")])
    assert (tmp_path / "run" / "evaluation.json").is_file()


def test_what_changed_is_said_in_words():
    record = {"class_names": ["a", "b"], "columns": {"x": "1 ± 2", "y": ["u", "v"]}, "tokenizer": "1"}
    assert changes_of(record, dict(record)) == []
    assert changes_of({}, record) == []  # what only one of them has
    assert changes_of(record, {**record, "class_names": ["b", "a"]}) == ["another order of class names"]
    assert changes_of(record, {**record, "columns": {"x": ["1"], "y": ["u", "v"]}}) == ["column 'x' has categories now"]
    assert changes_of(record, {**record, "columns": {"x": "1 ± 2"}}) == ["column 'y' gone"]
    many = {"class_names": list("acdefg"), "tokenizer": "2"}
    assert changes_of(record, many) == ["class 'b' gone, class 'c', 'd', 'e', … new", "another tokenizer"]
