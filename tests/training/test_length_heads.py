"""Length heads through the trainer: what they learn from a frozen model, resume, and what they refuse."""

import copy
import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastdiff import evaluate, generate, sample, train
from fastdiff.generation.length import LengthPredictor, prompt_inputs
from fastdiff.models.length_heads import EndClassifier, LengthRegressor, read_length_head, save_length_head
from fastdiff.recipes import load_recipe, parse_recipe
from fastdiff.tasks.length_head.recipe import LengthHeadRecipe
from fastdiff.tasks.length_head.run import load_length_head
from fastdiff.tasks.length_head.task import LengthHeadTask
from fastdiff.tasks.masked_lm.run import load_language_model
from fastdiff.training import Trainer
from fastdiff.training.run_folder import RunFolder
from fastdiff.visualization import save_length_scatter

HEADS = ("classifier", "regression")
WINDOW = 12  # digit n → n tokens for n = 1 … 9, and one answer that does not fit
TRAINING = {
    "batch_size": 24, "max_steps": 200, "learning_rate": 0.02, "warmup_steps": 5, "ema_decay": 0.9, "log_every": 100,
    "mixed_precision": "no", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """JSONL of pairs: the first letter of a prompt says how many tokens answer it, z more than the window holds."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {"prompt": first + "".join(rest), "answer": "x" * (20 if first == "z" else int(first)), "text": "To be."}
        for first in "123456789z"
        for rest in product("abc", repeat=3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, pairs):
    """make_run(training fields, **model fields) → the folder of a run on the pairs."""

    def make(training, **fields):
        folder = tmp_path_factory.mktemp("language_model") / "run"
        recipe = {
            "task": "masked_lm",
            "model": {
                "hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 24,
            } | fields,
            "tokenizer": {"name": "characters"},
            "data": {
                "name": "jsonl", "path": str(pairs), "sample": "pairs", "min_length": 4, "max_length": WINDOW,
                "max_prompt_length": 8, "held_out_fraction": 0.3,
            },
            "objective": {"likelihood_samples": 8, "fully_masked_fraction": 0.5, "normalizer": "masked_tokens"},
            "diffusion": {"weighting": "none"},
            "training": TRAINING | {"learning_rate": 0.005, "output_dir": str(folder)} | training,
            "sampling": {"generation": {"max_new_tokens": 4, "block_length": 4}},
        }  # fmt: skip
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(recipe))
        train.main([str(path)])
        return folder

    return make


@pytest.fixture(scope="session")
def run(make_run):
    """A model that has learned the pairs: nearly all of its held-out answers end where they should."""
    return make_run({"max_steps": 300, "batch_size": 32})


@pytest.fixture(scope="session")
def make_recipe(run, tmp_path_factory):
    """make_recipe("--head", "regression", …) → LengthHeadRecipe on the run."""
    path = tmp_path_factory.mktemp("recipe") / "head.yaml"
    path.write_text(yaml.safe_dump({"task": "length_head", "run": str(run), "training": TRAINING}))
    return lambda *options: parse_recipe(LengthHeadRecipe, [str(path), *map(str, options)])


@pytest.fixture(scope="session", params=HEADS)
def trained(request, make_recipe, tmp_path_factory):
    """A finished run of each head: its task and the trainer's outcome."""
    folder = tmp_path_factory.mktemp("trained") / request.param
    recipe = make_recipe("--head", request.param, "--training.output_dir", folder)
    task = LengthHeadTask(recipe)
    before = copy.deepcopy(task.frozen.state_dict())
    outcome = Trainer(task, recipe.training).train()
    return task, before, outcome


def prior_loss(task: LengthHeadTask) -> float:
    """Held-out loss of the best guess that does not look at the prompt."""
    parts = (part.targets.document_lengths.clamp(max=WINDOW) for part in (task.data.train, task.data.held_out))
    if task.config.head == "regression":
        known, asked = (lengths.float().log1p() for lengths in parts)
        return torch.nn.functional.huber_loss(known.mean().expand_as(asked), asked).item()
    known, asked = ((lengths[:, None] <= torch.arange(WINDOW)).double() for lengths in parts)
    return torch.nn.functional.binary_cross_entropy(known.mean(0).expand_as(asked), asked).item()


def test_heads_learn_what_the_prompt_tells(trained):
    task, _, outcome = trained
    path = RunFolder(task.config.training.output_dir).validation
    measures = json.loads(path.read_text().splitlines()[-1])
    assert measures["step"] == 200 and len(task.data.held_out) == 81
    assert measures["loss"] < 0.25 * prior_loss(task), (measures, prior_loss(task))
    assert measures["rmse_tokens"] < 0.4 * measures["rmse_of_the_mean_tokens"], measures
    lengths = task.data.held_out.targets.document_lengths.clamp(max=WINDOW).double()
    mean = task.data.train.targets.document_lengths.clamp(max=WINDOW).double().mean()
    assert measures["rmse_of_the_mean_tokens"] == pytest.approx((lengths - mean).square().mean().sqrt().item())


def test_only_the_head_is_trained_and_stored(trained):
    task, before, outcome = trained
    after = task.frozen.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not task.frozen.training and all(p.grad is None and not p.requires_grad for p in task.frozen.parameters())
    for name in ("model", "ema", "optimizer"):
        names = {key.split("|")[-1] for key in load_file(outcome.checkpoint / f"{name}.safetensors")}
        assert names == set(task.model.state_dict())
    folder = RunFolder(task.config.training.output_dir)
    assert folder.loss_picture.stat().st_size > 1000 and folder.samples_picture.stat().st_size > 1000


@pytest.mark.parametrize("head", HEADS)
def test_resume_equals_a_run_that_was_not_interrupted(make_recipe, tmp_path, head):
    def recipe(folder, *options):
        steps = ("--training.max_steps", 8, "--training.batch_size", 7, "--training.checkpoint_every", 4)
        return make_recipe("--head", head, "--training.output_dir", tmp_path / folder, *steps, *options)

    whole, first = recipe("whole"), recipe("parts")
    done = Trainer(LengthHeadTask(whole), whole.training).train()
    assert Trainer(LengthHeadTask(first), first.training).train(stop_at=4).steps == 4
    rest = recipe("parts", "--training.resume", "true", "--training.accumulation_steps", 1)
    resumed = Trainer(LengthHeadTask(rest), rest.training).train()
    assert resumed.steps == done.steps == 8
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "config.json"):
        assert (resumed.checkpoint / name).read_bytes() == (done.checkpoint / name).read_bytes(), name


def test_parts_of_a_step_add_up_to_it(make_recipe):
    task = LengthHeadTask(make_recipe())
    whole = task.loss(task.model, task.batch(5, range(24)))
    parts = [task.loss(task.model, task.batch(5, slots)) for slots in (range(10), range(10, 24))]
    assert whole.item() == pytest.approx(sum(parts).item(), rel=1e-6)
    windows = {task.batch(step, range(2))["columns"].shape[1] for step in range(60)}
    assert windows == set(range(4, WINDOW + 1))  # data.min_length … data.max_length
    narrow = LengthHeadTask(make_recipe("--window", 3))
    assert {narrow.batch(step, range(2))["columns"].shape[1] for step in range(10)} == {3}
    regression = LengthHeadTask(make_recipe("--head", "regression"))
    assert {regression.batch(step, range(2))["columns"].shape[1] for step in range(10)} == {WINDOW}


@pytest.mark.parametrize("logit", [-1.5, 0.7])
def test_what_the_losses_are(make_recipe, logit):
    """A head that says the same everywhere: the loss of each answer on paper, those that do not fit included."""

    def softplus(x):
        return math.log1p(math.exp(x))

    task = LengthHeadTask(make_recipe("--window", 6))
    batch = {**task.batch(0, range(24))}
    window, indices = batch["columns"].shape[1], task.stream.indices(0)
    true = task.data.train.targets.document_lengths[indices].tolist()
    assert max(true) == 20 and min(true) < window
    expected = 0.0
    for length in true:
        ended = max(window - length, 0)  # offsets length … window - 1
        expected += (ended * softplus(-logit) + (window - ended) * softplus(logit)) / window
    task.model.out.bias.data.fill_(logit)
    assert task.loss(task.model, batch).item() == pytest.approx(expected, rel=1e-6)
    task = LengthHeadTask(make_recipe("--window", 6, "--head", "regression"))
    task.model.out.weight.data.zero_()
    task.model.out.bias.data.fill_(logit)
    errors = [abs(logit - math.log1p(min(length, 6))) for length in true]
    expected = sum(0.5 * e * e if e < 1 else e - 0.5 for e in errors)
    assert task.loss(task.model, task.batch(0, range(24))).item() == pytest.approx(expected, rel=1e-6)
    assert task.model(torch.randn(2, 48)).tolist() == pytest.approx([max(math.expm1(logit), 0)] * 2)


@pytest.mark.parametrize(
    "fields", [{}, {"architecture": "gpt2"}, {"num_encoder_layers": 1}, {"timestep_embedding": True}]
)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_from_what_prediction_shows_it(make_run, make_recipe, fields, head):
    """The features of training are those of the predictor's probe, whatever the model."""
    task = LengthHeadTask(make_recipe("--run", make_run({"max_steps": 1}, **fields), "--head", head))
    batch = task.batch(0, range(24))
    predictor = LengthPredictor(task.frozen, window=batch["columns"].shape[1], rule=head, head=task.model)
    prompts = [task.data.train.conditions.document(int(i)).tolist() for i in task.stream.indices(0)]
    probe = predictor.probe(**prompt_inputs(task.frozen, prompts))
    torch.testing.assert_close(
        task._features(batch), probe.states if head == "classifier" else probe.prompt_mean, rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------------------------------------ loading


def test_a_head_is_loaded_for_its_own_model_alone(trained, run, tmp_path):
    task, _, outcome = trained
    model = load_language_model(run).model
    kind = EndClassifier if task.config.head == "classifier" else LengthRegressor
    averaged = load_file(outcome.checkpoint / "ema.safetensors")
    elsewhere = shutil.copytree(outcome.checkpoint, tmp_path / "taken_out")
    for path in (task.config.training.output_dir, outcome.checkpoint, elsewhere):
        head = load_length_head(path, model)
        assert type(head) is kind and not head.training
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in head.state_dict().items())
    plain = load_length_head(outcome.checkpoint, model, weights="model")
    assert torch.equal(plain.out.weight, load_file(outcome.checkpoint / "model.safetensors")["out.weight"])
    save_length_head(head, tmp_path / "head", model_hash=task.model_hash, note="of a test")
    assert read_length_head(tmp_path / "head")[1]["note"] == "of a test"
    again = load_length_head(tmp_path / "head", model.to(torch.bfloat16))  # the same model in another type
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in again.state_dict().items())
    states = torch.randn(3, 5, 48, dtype=torch.bfloat16)
    output = again(states if kind is EndClassifier else states[:, 0])
    assert output.shape == ((3, 5) if kind is EndClassifier else (3,)) and output.dtype == torch.float32
    with pytest.raises(ValueError, match="a length head for another model than this one"):
        load_length_head(outcome.checkpoint, load_language_model(run, weights="model").model)


def test_bounds_of_a_trained_head(trained, run):
    task, _, outcome = trained
    model = load_language_model(run).model
    predictor = LengthPredictor(
        model, window=WINDOW, rule=task.config.head, head=load_length_head(outcome.checkpoint, model)
    )
    part = task.data.held_out
    prompts = [part.conditions.document(i).tolist() for i in range(len(part))]
    bounds = torch.tensor(predictor(**prompt_inputs(model, prompts)).bounds)
    lengths = part.targets.document_lengths.clamp(max=WINDOW)
    assert ((bounds - lengths).abs() <= 1).float().mean() > 0.9


def test_a_picture_needs_answers(tmp_path):
    for predicted, lengths in (([], []), ([1.0], [1, 2])):
        with pytest.raises(ValueError, match="predicted: got"):
            save_length_scatter(predicted, lengths, tmp_path / "x.png")


def test_what_is_no_head(run, trained, tmp_path):
    model = load_language_model(run).model
    with pytest.raises(FileNotFoundError, match="none: no such folder; expected a run of `task: length_head`"):
        load_length_head(tmp_path / "none", model)
    with pytest.raises(FileNotFoundError, match="no config.yaml and no config.json in it"):
        load_length_head(tmp_path, model)
    with pytest.raises(ValueError, match="got a masked diffusion language model; expected a head"):
        load_length_head(run, model)
    (tmp_path / "config.json").write_text('{"model_type": "fastdiff_masked_lm"}')
    with pytest.raises(ValueError, match="got a masked diffusion language model; expected a head"):
        load_length_head(tmp_path, model)
    checkpoint = shutil.copytree(trained[2].checkpoint, tmp_path / "damaged")
    (checkpoint / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="ema.safetensors has 5 bytes"):
        load_length_head(checkpoint, model)
    with pytest.raises(ValueError, match="got a head .*; expected a masked diffusion language model"):
        load_language_model(shutil.copytree(trained[2].checkpoint, tmp_path / "alone"))


# ------------------------------------------------------------------------------------------------ errors


def failure(command, arguments, capsys) -> str:
    """Runs a command that must fail for a reason of the user's: its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        command.main([str(argument) for argument in arguments])
    text = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and text.startswith("error: ") and "\n" not in text, text
    return text


def test_what_cannot_be_trained_on(run, pairs, tmp_path, capsys):
    def refuse(**fields):
        recipe = tmp_path / "head.yaml"
        training = TRAINING | {"output_dir": str(tmp_path / "out")}
        recipe.write_text(yaml.safe_dump({"task": "length_head", "training": training} | fields))
        return failure(train, [recipe], capsys)

    jsonl = {"name": "jsonl", "path": str(pairs)}
    assert "run: got none; expected the folder of a finished run" in refuse()
    assert "which is not a folder; train it first" in refuse(run=str(tmp_path / "none"))
    pairs_of = {**jsonl, "sample": "pairs"}
    assert "no such folder" in refuse(run=str(tmp_path / "none"), data=pairs_of)
    images = tmp_path / "images"
    (images / "checkpoints").mkdir(parents=True)
    (images / "config.yaml").write_text("data: {name: digits}")
    assert "not a run of text; a length head needs a language model's run of pairs" in refuse(run=str(images))
    assert "which have no answers whose length" in refuse(run=str(run), data={**jsonl, "sample": "documents"})
    assert "window: got 0; expected at least 1 token" in refuse(run=str(run), window=0)
    assert "prompts and window have up to 25 tokens" in refuse(run=str(run), window=21)
    assert "there is no field data.nmae; did you mean data.name?" in refuse(run=str(run), data={"nmae": 1})
    assert "median" in refuse(run=str(run), head="median")
    loaded = load_language_model(run)
    loaded.model.save_pretrained(tmp_path / "foreign")
    loaded.tokenizer.save_pretrained(tmp_path / "foreign")
    assert "has no pairs of its own; name them as" in refuse(run=str(tmp_path / "foreign"))
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_run_with_pairs_of_ones_own(run, make_recipe, pairs, tmp_path):
    loaded = load_language_model(run)
    loaded.model.save_pretrained(tmp_path / "foreign")
    loaded.tokenizer.save_pretrained(tmp_path / "foreign")
    data = ("--data.name", "jsonl", "--data.path", pairs, "--data.sample", "pairs")
    data += ("--data.min_length", 2, "--data.max_length", 9)
    steps = ("--training.max_steps", 2, "--training.output_dir", tmp_path / "out")
    recipe = make_recipe("--run", tmp_path / "foreign", *data, *steps)
    task = LengthHeadTask(recipe)
    assert task.window == 9 and Trainer(task, recipe.training).train().finished
    assert load_recipe(LengthHeadRecipe, tmp_path / "out" / "config.yaml") == recipe
    load_length_head(tmp_path / "out", loaded.model)


def test_a_run_goes_on_with_its_own_model_alone(make_run, make_recipe, tmp_path, capsys):
    run = make_run({"max_steps": 2})
    options = ("--run", run, "--training.output_dir", tmp_path / "head", "--training.max_steps", 2)
    recipe = make_recipe(*options)
    Trainer(LengthHeadTask(recipe), recipe.training).train()
    moved = run.parent / "moved"
    run.rename(moved)  # the same model in another place is the run's own
    again = ("--run", moved, *options[2:-1], 3, "--training.resume", "true")
    recipe = make_recipe(*again)
    assert Trainer(LengthHeadTask(recipe), recipe.training).train().steps == 3
    moved.rename(run)
    train.main([str(run.with_suffix(".yaml")), "--training.resume", "true", "--training.max_steps", "3"])
    with pytest.raises(ValueError, match="was trained on another model than .* is now"):
        LengthHeadTask(make_recipe("--run", run, *again[2:]))
    LengthHeadTask(make_recipe(*options, "--training.overwrite", "true"))


def test_commands_say_what_a_head_is_for(trained, capsys):
    folder = trained[0].config.training.output_dir
    for command, options in ((generate, ["--prompt", "1"]), (evaluate, []), (sample, [])):
        for path in (folder, trained[2].checkpoint):
            text = failure(command, [path, *options], capsys)
            assert "got a head that tells an answer's length" in text and "fastdiff.load(path).model" in text


@pytest.mark.parametrize("head", HEADS)
def test_recipes(head, capsys):
    path = Path(__file__).parents[2] / "recipes" / f"eos_head_{head}.yaml"
    recipe = parse_recipe(LengthHeadRecipe, [str(path)])
    assert recipe.head == head and recipe.training.output_dir == f"runs/{path.stem}" and recipe.data is None
    with pytest.raises(SystemExit) as exit_:
        train.main([str(path), "--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "--head" in text and "--window" in text and "length" in text
