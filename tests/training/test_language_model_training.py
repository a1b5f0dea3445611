"""Language models through the trainer: what is masked, what the loss is, every way to begin, resume, two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastdiff import train
from fastdiff.data import load_text_data
from fastdiff.models import MaskedDiffusionLM
from fastdiff.recipes import load_recipe, parse_recipe
from fastdiff.tasks.kinds import recipe_kind
from fastdiff.tasks.masked_lm.held_out import likelihood_arguments
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe
from fastdiff.tasks.masked_lm.run import load_language_model
from fastdiff.tasks.masked_lm.task import MaskedLMTask
from fastdiff.training import Trainer

RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml") if recipe_kind(path) == "masked_lm"
)
TINY = {
    "task": "masked_lm",
    "model": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 64},
    "tokenizer": {"name": "characters"},
    "data": {
        "name": "numbers", "sample": "pairs", "max_digits": 3, "num_pairs": 300, "min_length": 8, "max_length": 40,
    },
    "objective": {"likelihood_samples": 32},
    "training": {
        "batch_size": 7, "max_steps": 6, "checkpoint_every": 3, "log_every": 2, "warmup_steps": 2,
        "mixed_precision": "no", "device": "cpu",
    },
    "sampling": {"generation": {"max_new_tokens": 8, "block_length": 4, "num_inference_steps": 4}},
}  # fmt: skip
SENTENCES = "The crow sat on a wall. It saw water in a jar. It dropped stones into it! Then the crow drank.\n\n"


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    """A JSONL of short documents."""
    path = tmp_path_factory.mktemp("prose") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": f"Fable {i}. {SENTENCES}"}) + "\n" for i in range(120)))
    return path


@pytest.fixture
def make_task(tiny_yaml):
    return lambda *options: MaskedLMTask(parse_recipe(MaskedLMRecipe, [str(tiny_yaml), *map(str, options)]))


@pytest.fixture
def make_trainer(make_task):
    def make(folder, *options):
        task = make_task("--training.output_dir", folder, *options)
        return Trainer(task, task.config.training)

    return make


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(path):
    recipe = parse_recipe(MaskedLMRecipe, [str(path)])
    assert recipe.training.output_dir == f"runs/{path.stem}" and len(RECIPES) >= 7


def documents(prose):
    return ("--data.name", "jsonl", "--data.path", prose, "--data.sample", "documents")


# ------------------------------------------------------------------------------------------------ what is masked


@pytest.mark.parametrize("length_format", ["eos_fill", "pad_fill", "eos_only"])
def test_what_may_be_masked_in_pairs(make_task, length_format):
    task = make_task("--data.length_format", length_format, "--objective.fully_masked_fraction", 1.0)
    config, tokens = task.model.config, task.tokenizer
    assert config.length_format == length_format
    for step in range(3):
        batch = task.batch(step, range(7))
        ids, labels = batch["input_ids"], batch["labels"]
        masked = labels != -100
        seen_masked = ids == config.mask_token_id
        if length_format == "eos_only":  # what follows EoS is masked, too, but not in the loss
            assert (seen_masked | ~masked).all() and (seen_masked.sum() > masked.sum())
        else:
            assert torch.equal(masked, seen_masked)  # all that may be masked is, and it alone is in the loss
        assert torch.equal(masked.sum(1), batch["maskable"])
        for row in range(7):
            pair = task.stream.indices(step)[row]
            prompt = tokens.decode(ids[row][: int(masked[row].to(torch.int8).argmax())])
            answer = tokens.decode(labels[row][labels[row] >= 5])
            assert task.data.train.conditions.document(int(pair)).tolist() == tokens.encode(prompt)
            whole = tokens.decode(task.data.train.targets.document(int(pair)))
            assert whole.startswith(answer) and answer
            if length_format == "eos_only":
                assert (labels[row] == config.eos_token_id).sum() <= 1 and not (
                    labels[row] == config.pad_token_id
                ).any()
            if length_format == "pad_fill" and answer == whole:
                assert (labels[row] == config.eos_token_id).sum() <= 1
        if length_format == "eos_fill":
            assert not (labels == config.pad_token_id).any()
        if "attention_mask" in batch:  # padding is neither attended to nor masked
            assert not (masked & ~batch["attention_mask"]).any()
            assert (ids[~batch["attention_mask"]] == config.pad_token_id).all()


@pytest.mark.parametrize("length_format", ["eos_fill", "pad_fill", "eos_only"])
def test_how_ends_are_masked(make_task, length_format):
    def batch(masking, *options):
        task = make_task("--data.length_format", length_format, "--objective.end_masking", masking, *options)
        return task.batch(0, range(7)), task.model.config

    always, config = batch("always", "--diffusion.t_min", 0.01)
    as_text, _ = batch("as_text", "--diffusion.t_min", 0.01)
    everything, _ = batch("as_text", "--objective.fully_masked_fraction", 1.0)
    visible, _ = batch("visible", "--objective.fully_masked_fraction", 1.0)
    ends = torch.isin(everything["labels"], torch.tensor([config.eos_token_id, config.pad_token_id]))
    assert ends.any()
    assert (always["labels"][ends] == everything["labels"][ends]).all()  # masked, and in the loss
    assert torch.equal(always["labels"][~ends], as_text["labels"][~ends])
    assert (as_text["labels"][ends] == -100).any()
    first = ends & (ends.cumsum(1) == 1)
    assert torch.equal(visible["labels"] == -100, (everything["labels"] == -100) | first)
    assert (visible["input_ids"][first] == config.eos_token_id).all()
    assert (visible["input_ids"][ends & ~first] == config.mask_token_id).all()


def test_ends_of_documents_are_text(make_task, prose):
    with pytest.raises(ValueError, match="objective.end_masking: got 'visible', which is for pairs; this text has doc"):
        make_task(*documents(prose), "--objective.end_masking", "visible")


def test_windows_are_of_random_length_and_a_pure_function_of_the_step(make_task, prose):
    task = make_task(*documents(prose))
    lengths = {task.batch(step, range(7))["input_ids"].shape[1] for step in range(60)}
    assert min(lengths) >= 8 and max(lengths) <= 40 and len(lengths) > 20
    again = make_task(*documents(prose))
    for name, whole in task.batch(5, range(7)).items():
        assert torch.equal(again.batch(5, range(2, 6))[name], whole[2:6])
    assert task.sample_ids(5) != task.sample_ids(6) and len(task.sample_ids(5)) == 7


@pytest.mark.parametrize("weighting", ["elbo", "none"])
@pytest.mark.parametrize("normalizer", ["masked_tokens", "all_tokens", "answer"])
def test_the_loss_is_the_one_that_the_recipe_names(make_task, normalizer, weighting):
    task = make_task("--objective.normalizer", normalizer, "--diffusion.weighting", weighting)
    model = task.model.double().eval()
    batch = task.batch(2, range(7))
    loss = task.loss(model, batch) / task.weight(batch)

    logits = model(batch["input_ids"], batch.get("attention_mask")).logits
    logits[..., task.process.mask_token_id] = -torch.inf
    times = task.process.sample_times(7, _times(task, 2))
    total, count = 0.0, 0.0
    for row in range(7):
        kept = batch["labels"][row] != -100
        nats = torch.nn.functional.cross_entropy(logits[row][kept], batch["labels"][row][kept], reduction="sum")
        weight = 1 / float(times[row]) if weighting == "elbo" else 1.0
        total += weight * nats.item() / (int(batch["maskable"][row]) if normalizer == "answer" else 1)
        count += {"masked_tokens": int(kept.sum()), "all_tokens": int(batch["maskable"][row]), "answer": 1}[normalizer]
    assert loss.item() == pytest.approx(total / count, rel=2e-5)  # seen 2e-7: the weights are float32


def _times(task, step):
    from fastdiff.tasks.masked_lm.task import _TIMES
    from fastdiff.training.randomness import generator

    return generator(task.config.training.seed, step, _TIMES)


# ------------------------------------------------------------------------------------------------ ways to begin


def test_the_first_token_is_in_the_loss_or_out_of_it(make_task, prose):
    """Left out, it may still be masked, but is no label, and does not count in the normaliser or the bound."""
    options = [*documents(prose), "--diffusion.t_min", "0.5"]
    within, without = make_task(*options), make_task(*options, "--objective.loss_on_first_token", "false")
    first = []
    for step in range(4):
        full, cut = (task.batch(step, range(7)) for task in (within, without))
        assert torch.equal(full["input_ids"], cut["input_ids"])
        assert torch.equal(full["labels"][:, 1:], cut["labels"][:, 1:]) and (cut["labels"][:, 0] == -100).all()
        assert torch.equal(full["maskable"], cut["maskable"] + 1)
        first += (full["labels"][:, 0] != -100).tolist()
    assert any(first)
    for task, counted in ((within, True), (without, False)):
        maskable = likelihood_arguments(task.config, task.model.config, task.data)["maskable"]
        assert bool(maskable[:, 0].all()) == counted == bool(maskable[:, 0].any()) and bool(maskable[:, 1:].any())


def test_annealing_goes_from_causal_to_bidirectional(make_task):
    task = make_task("--objective.annealing_steps", 50)
    first, half = (task.batch(step, range(7))["attention_pattern"][0] for step in (0, 25))
    causal = torch.ones_like(first).tril()
    assert torch.equal(first, causal)
    above = half[~torch.ones_like(half).tril()]
    assert half[torch.ones_like(half).tril()].all() and 0.3 < above.float().mean() < 0.7
    assert "attention_pattern" not in task.batch(50, range(7))
    task.loss(task.model, task.batch(25, range(7))).backward()


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory, tiny_yaml):
    """A random GPT-2 with a tokenizer of its own, as transformers saves them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    recipe = parse_recipe(MaskedLMRecipe, [str(tiny_yaml)])
    tokenizer = load_text_data(recipe.data, recipe.tokenizer).tokenizer
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    shape = dict(n_embd=32, n_head=2, n_layer=2, n_positions=64, bos_token_id=2, eos_token_id=2)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.mask_token = None  # GPT-2 has neither
    tokenizer.save_pretrained(folder)
    return folder


def test_gpt2_is_adapted(make_trainer, gpt2, tmp_path):
    from transformers import GPT2LMHeadModel

    options = ("--model.init_from", gpt2, "--objective.annealing_steps", 4, "--model.dropout", 0.1)
    with pytest.raises(ValueError, match=r"nor tokenizer has a mask token.*--model.mask_token_id"):
        make_trainer(tmp_path / "run", *options)
    trainer = make_trainer(tmp_path / "run", *options, "--model.mask_token_id", 4)
    model, theirs = trainer.task.model, GPT2LMHeadModel.from_pretrained(gpt2).eval()
    assert model.config.logit_shift and model.config.mask_token_id == 4 and model.config.dropout == 0.1
    vocab = theirs.config.vocab_size
    assert model.config.pad_token_id == vocab and model.config.vocab_size == vocab + 1
    ids = torch.randint(5, vocab, (2, 9))
    causal = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    with torch.no_grad():  # position i predicts token i, which GPT-2 predicts at i - 1; seen 3e-7
        ours = model.eval()(ids, causal).logits[:, 1:, :vocab]
        torch.testing.assert_close(ours, theirs(ids).logits[:, :-1], rtol=0, atol=2e-6)
    outcome = trainer.train()
    assert outcome.finished
    assert MaskedDiffusionLM.from_pretrained(outcome.checkpoint).config.logit_shift


@pytest.mark.parametrize("sample", ["first_sentence", "first_and_last"])
def test_conditional_text_through_an_encoder_begun_from_a_denoiser(make_trainer, prose, tmp_path, sample):
    tokenizer = ("--tokenizer.name", "bpe", "--tokenizer.vocab_size", 320)
    make_trainer(tmp_path / "denoiser", *documents(prose), *tokenizer, "--training.max_steps", 2).train()
    staged = make_trainer(
        tmp_path / "staged",
        *("--data.name", "jsonl", "--data.path", prose, "--data.sample", sample),
        *("--model.init_from", tmp_path / "denoiser", "--model.num_encoder_layers", 1),
        *("--training.max_steps", 2),
    )
    task = staged.task
    batch = task.batch(0, range(7))
    assert batch["encoder_input_ids"].shape[0] == 7 and (batch["input_ids"][:, 0] == task.tokenizer.bos_token_id).all()
    first = task.tokenizer.decode(batch["encoder_input_ids"][0][batch["encoder_attention_mask"][0]])
    assert first.startswith("Fable") and ("drank" in first) == (sample == "first_and_last")
    denoiser = load_language_model(tmp_path / "denoiser").model  # the averaged weights
    with torch.no_grad():  # the new branch begins at zero
        with_encoder = task.model.eval()(
            batch["input_ids"],
            batch.get("attention_mask"),
            encoder_input_ids=batch["encoder_input_ids"],
            encoder_attention_mask=batch["encoder_attention_mask"],
        ).logits
        without = denoiser(batch["input_ids"], batch.get("attention_mask")).logits
    torch.testing.assert_close(with_encoder, without, rtol=0, atol=1e-6)
    outcome = staged.train()
    trained = MaskedDiffusionLM.from_pretrained(outcome.checkpoint)
    assert any(layer.cross_attn.o_proj.weight.abs().max() > 0 for layer in trained.model.layers)  # it was trained
    assert (tmp_path / "staged" / "samples.png").exists()
    conditions = task.data.held_out.conditions
    expected = [task.tokenizer.decode(conditions.document(i)) + " → " for i in range(6)]
    assert [sample.prompt for sample in task.samples(trained)] == expected


def test_texts_that_a_run_shows(make_task, prose):
    task = make_task(*documents(prose))
    samples = task.samples(task.model)
    for sample in samples:  # documents are not cut at their ends, and 8 new tokens take 4 steps of 2
        assert sorted(sample.steps) == [0, 0, 1, 1, 2, 2, 3, 3] and len(sample.pieces) == 8 and len(sample.prompt) >= 16
    prompts = yaml.safe_dump(["The crow", ""])
    shown = make_task(*documents(prose), "--sampling.prompts", prompts).samples(task.model)
    assert [sample.prompt for sample in shown] == ["The crow", task.tokenizer.eos_token]
    stop = yaml.safe_dump({"max_new_tokens": 8, "block_length": 4, "stop_strings": ["e"]})
    assert all(
        len(s.pieces) == 8 for s in make_task(*documents(prose), "--sampling.generation", stop).samples(task.model)
    )


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_from_the_command_line(tiny_yaml, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--training.output_dir", str(run), "--model.timestep_embedding", "true", "--training.preview_every", "3"]
    train.main([str(tiny_yaml), *options])
    captured = capsys.readouterr()
    assert "trained 6 steps" in captured.out and "nats per token" in captured.err
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(line["nats_per_token"] > 0 and line["standard_error"] > 0 for line in lines)
    assert (run / "samples.png").stat().st_size > 1000 and (run / "loss.png").stat().st_size > 1000
    checkpoint = run / "checkpoints" / "step_6"
    assert (checkpoint / "tokenizer.json").is_file()
    model = MaskedDiffusionLM.from_pretrained(checkpoint)
    assert model.config.timestep_embedding and model.head_weight is model.get_input_embeddings().weight
    assert load_recipe(MaskedLMRecipe, run / "config.yaml").data.max_digits == 3


def test_a_stopped_run_resumes_bit_for_bit(make_trainer, tmp_path, same_files, curve):
    whole = make_trainer(tmp_path / "whole").train()
    make_trainer(tmp_path / "parts").train(stop_at=3)
    resumed = make_trainer(tmp_path / "parts", "--training.resume", "true").train()
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same_files(resumed.checkpoint, whole.checkpoint)


def test_two_processes_and_accumulation_equal_one(make_trainer, tiny_yaml, tmp_path, curve):
    make_trainer(tmp_path / "one", "--training.max_steps", 3).train()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
        *("-m", "fastdiff.train", tiny_yaml, "--training.max_steps", 3, "--training.output_dir", tmp_path / "two"),
        *("--training.accumulation_steps", 2),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_a_model_learns_to_copy(make_trainer, tmp_path):
    """Answers that repeat the prompt's digits: the held-out bound falls far below that of the untrained model."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i:03}", "answer": f"{i:03}"}) + "\n" for i in range(300)))
    options = ("--data.name", "jsonl", "--data.path", path, "--data.min_length", 5, "--data.max_length", 6)
    trainer = make_trainer(
        tmp_path / "run", *options, "--training.max_steps", 250, "--training.batch_size", 32,
        "--training.learning_rate", 1e-2, "--training.checkpoint_every", 1000, "--training.ema_decay", 0.95,
        "--training.log_every", 50, "--training.schedule", "constant_then_linear", "--model.position_embedding", "rope",
    )  # fmt: skip
    before = trainer.task.validate(trainer.ema.module)["nats_per_token"]
    trainer.train()
    after = trainer.task.validate(trainer.ema.module)["nats_per_token"]
    assert before > 2 and after < 0.25 * before  # seen 2.9 and 0.1


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.max_length", "62"], "model.max_position_embeddings: got 64; samples have up to 65 tokens"),
        (["--data.min_length", "50"], "data.min_length: got 50 and data.max_length 40; expected 1 <= min_length"),
        (["--data.sample", "documents"], "data.sample: got 'documents'; the data set numbers needs 'pairs'"),
        (["--data.name", "jsonl"], "data.path: got none; jsonl needs the file"),
        (["--model.architecture", "rnn"], "architecture: got 'rnn'; expected one of mdlm, gpt2, llada, dream, llama"),
        (["--model.init_from", "/nowhere"], "/nowhere: no such folder"),
        (["--model.init_from", "README.md"], "README.md: got a file; expected a folder"),
        (["--objective.normalizer", "words"], "objective.normalizer"),
        (["--diffusion.schedule", "steep"], "diffusion.schedule"),
        (
            ["--sampling.generation", "{block_length: 0, max_new_tokens: 8}"],
            "block_length: got 0; expected an int of 1",
        ),
        (["--tokenizer.vocab_size", "10"], "tokenizer.vocab_size: got 10; expected at least 300"),
    ],
)
def test_bad_recipes_are_one_line(tiny_yaml, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        train.main([str(tiny_yaml), "--training.output_dir", str(tmp_path / "run"), *options])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and text.startswith("error: ") and message in text
    assert not (tmp_path / "run").exists()


def test_empty_and_broken_corpora(tiny_yaml, tmp_path, capsys):
    cases = {"empty": b"", "latin": b'{"text": "caf\xe9"}\n', "fields": b'{"txt": "a"}\n'}
    for name, content in cases.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        with pytest.raises(SystemExit):
            options = ["--data.name", "jsonl", "--data.path", str(tmp_path / f"{name}.jsonl")]
            train.main([str(tiny_yaml), *options, "--data.sample", "documents"])
        text = capsys.readouterr().err.strip()
        assert "\n" not in text and f"{name}.jsonl" in text, text
        assert name != "latin" or "byte 13" in text
