"""`python -m fastdiff.evaluate` on runs of language models: likelihood of held-out text, exact match of answers."""

import json
import math
import re
import shutil

import pytest
import torch
from language_runs import make_runs
from tokenizers_of_kinds import with_holes

from fastdiff import evaluate, generate
from fastdiff.data.text import load_text_data
from fastdiff.evaluation.likelihood import likelihood_bound
from fastdiff.generation import MaskedDiffusionGenerationConfig
from fastdiff.generation.text import TextGenerator
from fastdiff.tasks.masked_lm.evaluate import exact_match
from fastdiff.tasks.masked_lm.held_out import likelihood_arguments
from fastdiff.tasks.masked_lm.run import load_language_model

RECIPE = {
    "task": "masked_lm",
    "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64},
    "tokenizer": {"name": "characters"},
    "data": {"min_length": 4, "max_length": 8, "held_out_fraction": 0.2},
    "objective": {"likelihood_samples": 64},
    "training": {"batch_size": 4, "max_steps": 2, "warmup_steps": 1, "mixed_precision": "no", "device": "cpu"},
    "sampling": {"generation": {"max_new_tokens": 4}},
}


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """make_run(**data) → the folder of a run of 2 steps."""
    yield from make_runs(tmp_path_factory, RECIPE)


@pytest.fixture(scope="module")
def pairs_run(make_run, tmp_path_factory):
    """Pairs whose answer is x or y."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"prompt": f"{i}", "answer": "x" if i % 3 else "y"} for i in range(150)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_run(name="jsonl", path=str(path), sample="pairs", max_prompt_length=8)


def test_documents(make_run, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text("\n".join(f"line {j} of text {i}." for j in range(30)))
    run = make_run(name="text_folder", path=str(texts))
    capsys.readouterr()
    evaluate.main([str(run)])
    printed, results = capsys.readouterr().out, json.loads((run / "evaluation.json").read_text())
    loaded = load_language_model(run, device="cpu")
    data = load_text_data(loaded.recipe.data, loaded.recipe.tokenizer)
    expected = likelihood_bound(loaded.model, **likelihood_arguments(loaded.recipe, loaded.model.config, data))
    got = results["likelihood"]
    assert got["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6) and got["samples"] == 64
    assert f"| bound, nats per token | {got['nats_per_token']:.4f} | {got['standard_error']:.4f} |" in printed
    assert f"{got['perplexity']:.2f}" in printed and "exact match" not in printed
    assert printed.rstrip().endswith(f"step 2, ema weights; written to {run / 'evaluation.json'}")
    assert results["step"] == 2 and "exact_match" not in results
    validated = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert any(line.get("nats_per_token") == pytest.approx(got["nats_per_token"], rel=1e-5) for line in validated)
    evaluate.main([str(run), "--likelihood-samples", "2000", "--weights", "model"])
    again = json.loads((run / "evaluation.json").read_text())
    assert again["likelihood"]["samples"] >= 2000 and again["weights"] == "model"
    assert again["likelihood"]["standard_error"] < got["standard_error"]


def test_pairs(pairs_run, capsys):
    evaluate.main([str(pairs_run), "--num-pairs", "20", "--max-new-tokens", "2"])
    results = json.loads((pairs_run / "evaluation.json").read_text())
    match = results["exact_match"]
    assert match["pairs"] == 20 and match["generation"]["max_new_tokens"] == 2 and match["forward_passes"] == 2
    assert (
        f"| exact match, 20 pairs | {match['accuracy']:.1%} | {match['standard_error']:.1%} |"
        in capsys.readouterr().out
    )
    evaluate.main([str(pairs_run), "--num-pairs", "0"])  # what was measured of these weights stays
    assert json.loads((pairs_run / "evaluation.json").read_text())["exact_match"] == match
    evaluate.main([str(pairs_run), "--num-pairs", "0", "--weights", "model"])
    assert "exact_match" not in json.loads((pairs_run / "evaluation.json").read_text())


def test_exact_match_counts_the_answers_that_are_right(pairs_run):
    loaded = load_language_model(pairs_run, device="cpu")
    model, tokenizer = loaded.model, loaded.tokenizer
    (x,) = tokenizer("x")["input_ids"]
    with torch.no_grad():  # it always answers x, then ends
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.head_weight))
        model.model.norm.bias[:] = 1
        model.head_weight[x] = 1
    data = load_text_data(loaded.recipe.data, loaded.recipe.tokenizer)
    answers = [tokenizer.decode(data.held_out.targets.document(i)) for i in range(len(data.held_out.targets))]
    generator = TextGenerator(model, tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=1))
    match = exact_match(generator, data, 1000, batch_size=7)
    share = answers.count("x") / len(answers)
    assert 0 < share < 1 and match.pairs == len(answers) and match.accuracy == pytest.approx(share)
    assert match.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (len(answers) - 1)))
    longer = TextGenerator(model, tokenizer, MaskedDiffusionGenerationConfig(max_new_tokens=2))
    assert exact_match(longer, data, 10).accuracy == 0  # "xx" is not "x"


def test_the_corpus_is_gone(make_run, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("\n".join(f"line {j}." for j in range(60)))
    run = make_run(name="text_folder", path=str(texts))
    (texts / "a.txt").unlink()
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(run)])
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and text.startswith("error: ") and "texts" in text


def test_a_checkpoint_without_a_run_has_no_held_out_text(pairs_run, tmp_path, capsys):
    taken = shutil.copytree(pairs_run / "checkpoints" / "step_2", tmp_path / "taken")
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(taken)])
    text = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and re.search("is not a run, and has no held-out text; pass --lm-eval TASKS", text)


def test_the_old_evaluation_survives_a_full_disk(pairs_run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "scores.json"
    output.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.files.os.fsync", full)
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(pairs_run), "--num-pairs", "0", "--output", str(output)])
    assert exit_.value.code == 2 and capsys.readouterr().err.strip().endswith("scores.json: No space left on device")
    assert output.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_a_tokenizer_whose_ids_have_holes(tmp_path_factory, tmp_path, capsys):
    """Seven tokens with ids up to 40: the run generates and is evaluated, and texts have no id without a token."""
    with_holes().save_pretrained(tmp_path / "words")
    rows = [{"prompt": "red " * (i % 5 + 1), "answer": "cat " * (i % 7 + 1)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE | {"tokenizer": {"name": str(tmp_path / "words")}}
    for make in make_runs(tmp_path_factory, recipe):
        run = make(name="jsonl", path=str(tmp_path / "pairs.jsonl"), sample="pairs")
        evaluate.main([str(run), "--num-pairs", "5"])
        generate.main([str(run), "--prompt", "red cat", "--temperature", "1", "--output", str(tmp_path / "out.jsonl")])
    tokens = json.loads((tmp_path / "out.jsonl").read_text())["tokens"]
    assert set(tokens) <= {0, 1, 2, 4, 7, 40}
    loaded = load_language_model(run, device="cpu")
    assert loaded.model.config.vocab_size == 41 and not loaded.model.config.add_special_tokens
    assert "error: " not in capsys.readouterr().err
