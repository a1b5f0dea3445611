"""`python -m fastdiff.evaluate runs/x --length`, and what each rule reads off the pairs that it shares."""

import json
import math
import shutil

import pytest
import torch
from language_runs import make_runs, tiny_model
from PIL import Image
from torch import nn

from fastdiff import evaluate
from fastdiff.data.text import load_text_data
from fastdiff.evaluation.length_comparison import read_rules
from fastdiff.generation import MaskedDiffusionGenerationConfig
from fastdiff.generation.length import (
    LENGTH_RULES,
    LengthPredictor,
    calibrate,
    load_calibration,
    model_hash,
    prompt_inputs,
)
from fastdiff.generation.length import rules as length_rules
from fastdiff.generation.length.rules import CURVE_RULES, TIE_MARGIN
from fastdiff.models.length_heads import EndClassifier, LengthRegressor, save_length_head
from fastdiff.tasks.length_head.run import load_length_head
from fastdiff.tasks.masked_lm.evaluate_lengths import LengthOptions, held_out_halves
from fastdiff.tasks.masked_lm.length_report import describe_threshold
from fastdiff.tasks.masked_lm.run import load_language_model, load_length_predictor

RECIPE = {
    "task": "masked_lm",
    "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32},
    "tokenizer": {"name": "characters"},
    "data": {"min_length": 4, "max_length": 12, "held_out_fraction": 0.5},
    "objective": {"likelihood_samples": 16, "fully_masked_fraction": 0.5},
    "training": {"batch_size": 8, "max_steps": 60, "warmup_steps": 1, "learning_rate": 1e-2, "ema_decay": 0.5,
                 "mixed_precision": "no", "device": "cpu", "preview_every": 0},
    "sampling": {"generation": {"max_new_tokens": 12}},
}  # fmt: skip
OUTPUTS = ("evaluation.json", "length.md", "length_predictions.png", "length_tradeoff.png")


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """make_run(**data) → the folder of a run of a few steps."""
    yield from make_runs(tmp_path_factory, RECIPE)


@pytest.fixture(scope="module")
def pairs_run(make_run, tmp_path_factory):
    """The prompt's first letter tells the answer's length; one in 26 does not fit into 12 tokens with its EoS."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"{chr(97 + i % 26)}{i}", "answer": "x" * (14 if i % 26 == 25 else 1 + i % 26 // 3)}
        for i in range(260)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_run(name="jsonl", path=str(path), sample="pairs", max_prompt_length=8)


@pytest.fixture(scope="module")
def evaluated(pairs_run):
    """The run's folder after one evaluation, and its JSON."""
    evaluate.main([str(pairs_run), "--length", "--coverage", "0.9", "--length-expansion-pairs", "60"])
    return pairs_run, json.loads((pairs_run / "evaluation.json").read_text())


def test_files(evaluated, capsys):
    run, results = evaluated
    evaluate.main([str(run), "--length", "--coverage", "0.9", "--length-expansion-pairs", "60"])
    told = capsys.readouterr()
    printed = told.out
    assert "length_calibration.json: replaced; the calibrations that were there are gone" in told.err
    table = [line for line in (run / "length.md").read_text().splitlines() if line.startswith("|")]
    assert json.loads((run / "evaluation.json").read_text()) == results  # no draw but by the seed
    for line in table:  # a few of its columns are printed
        assert "|".join(line.split("|")[:3]) + "|" in printed
    assert len(table) == 2 + len(results["length"]["rules"]) == 2 + 13
    checkpoint = run / "checkpoints" / "step_60"
    assert str(checkpoint / "length_calibration.json") in printed
    for name in OUTPUTS[2:]:
        with Image.open(run / name) as picture:
            assert picture.format == "PNG"
    assert "likelihood" not in results and "exact_match" not in results
    load_language_model(run, device="cpu")  # the file beside the weights does no harm


def test_numbers(evaluated):
    """The JSON against the public predictor and `calibrate` on the same halves."""
    run, results = evaluated
    found = results["length"]
    loaded = load_language_model(run, device="cpu")
    data = load_text_data(loaded.recipe.data, loaded.recipe.tokenizer)
    calibration, test = held_out_halves(loaded, data, LengthOptions(window=12, coverage=0.9))
    assert found["calibration_pairs"] == len(calibration) == found["test_pairs"] == len(test) == 65
    assert {name: found[name] for name in ("window", "length_format", "coverage", "seed", "resamples")} == {
        "window": 12, "length_format": "eos_fill", "coverage": 0.9, "seed": 0, "resamples": 1000,
    }  # fmt: skip
    lengths = [len(answer) for _, answer in test]
    assert found["too_long"] == sum(length >= 12 for length in lengths) > 0
    assert found["mean_length"] == pytest.approx(sum(lengths) / len(lengths))
    entries = {(entry["rule"], entry["bounds"]): entry for entry in found["rules"]}
    for rule in ("cdf", "constant", "daedal"):
        predictor = LengthPredictor(loaded.model, window=12, rule=rule)
        half = slice(0, 30 if rule == "daedal" else None)
        expected = calibrate(predictor, calibration[half], 0.9, tokenizer=loaded.tokenizer)
        saved = load_calibration(run / "checkpoints" / "step_60", rule, loaded.model, loaded.tokenizer)
        assert saved.scores == pytest.approx(expected.scores, abs=TIE_MARGIN) and saved.num_pairs == len(
            expected.scores
        )
        calibrated = LengthPredictor(loaded.model, window=12, rule=rule, calibration=saved, coverage=0.9)
        reading = calibrated(**prompt_inputs(loaded.model, [prompt for prompt, _ in test[half]])).reading
        entry, rows = entries[rule, "calibrated"], len(reading)
        assert entry["threshold"] == saved.threshold(0.9) < math.inf
        assert entry["rows"] == rows and entry["calibration_pairs"] == len(calibration[half])
        # This batch is not the command's, and rounds otherwise: what lies within the margin may fall to either side.
        lower, upper = (_measures(rule, reading, entry["threshold"] + m, lengths) for m in (-TIE_MARGIN, TIE_MARGIN))
        assert lower[0] - 1e-9 <= entry["correctness"]["value"] <= upper[0] + 1e-9
        assert upper[1] - 1e-9 <= entry["saved_tokens"]["value"] <= lower[1] + 1e-9 and lower[1] > 0
        assert entry["correctness"]["low"] <= entry["correctness"]["value"] <= entry["correctness"]["high"]
        (point,) = (point for point in found["tradeoff"][rule] if point["coverage"] == 0.9)
        assert point["saved_share"] == pytest.approx(entry["saved_tokens"]["value"] / 12)
        assert point["correctness"] == entry["correctness"]["value"]
    config = MaskedDiffusionGenerationConfig(max_new_tokens=12, length="auto", coverage=0.9)
    assert load_length_predictor(loaded, config).threshold == entries["cdf", "calibrated"]["threshold"] + TIE_MARGIN
    assert ("constant", "published") not in entries and ("cdf", "published") in entries
    assert entries["constant", "calibrated"]["forward_passes_a_row"] == 0
    # 65 pairs are enough for .98, 30 for .96
    assert found["tradeoff"]["cdf"][-1]["coverage"] == 0.98 and found["tradeoff"]["rho"][-1]["coverage"] == 0.96


def _measures(rule, reading, threshold, lengths):
    """(share of right bounds, mean of saved tokens) at a threshold; rules of whole tokens have no margin."""
    threshold = threshold if rule in CURVE_RULES else round(threshold)
    bounds = length_rules.bounds(rule, reading, threshold, window=12).tolist()
    right = sum(bound >= min(length, 12) for bound, length in zip(bounds, lengths, strict=False))
    saved = sum(12 - min(bound + 1, 12) for bound in bounds)
    return right / len(bounds), saved / len(bounds)


def test_halves_are_mixed_and_disjoint(evaluated):
    loaded = load_language_model(evaluated[0], device="cpu")
    data = load_text_data(loaded.recipe.data, loaded.recipe.tokenizer)
    first, second = held_out_halves(loaded, data, LengthOptions(window=12, num_pairs=101))
    whole = [tuple(data.held_out.conditions.document(i).tolist()) for i in range(len(data.held_out.targets))]
    places = [sorted(whole.index(tuple(prompt)) for prompt, _ in half) for half in (first, second)]
    assert [len(half) for half in places] == [51, 50] and not set(places[0]) & set(places[1])
    for half in places:
        assert half[0] < 13 and half[-1] > 117  # from all over the 130 held-out pairs
    again, _ = held_out_halves(loaded, data, LengthOptions(window=12, num_pairs=101))
    other, _ = held_out_halves(loaded, data, LengthOptions(window=12, num_pairs=101, seed=1))
    assert first == again and first != other


def test_other_results_of_the_same_weights_stay(evaluated, tmp_path):
    run, results = shutil.copytree(evaluated[0], tmp_path / "run"), evaluated[1]
    evaluated_as = {"model": str(run)}  # the file says which run it is about
    (run / "evaluation.json").write_text(json.dumps(results | evaluated_as))
    evaluate.main([str(run), "--num-pairs", "0"])
    both = json.loads((run / "evaluation.json").read_text())
    assert both["length"] == results["length"] and "likelihood" in both
    evaluate.main([str(run), "--length", "--coverage", "0.8", "--length-expansion-pairs", "0", "--window", "8"])
    again = json.loads((run / "evaluation.json").read_text())
    assert again["likelihood"] == both["likelihood"] and again["length"]["window"] == 8
    assert {entry["rule"] for entry in again["length"]["rules"]} == {*LENGTH_RULES[:5]}


def test_fixed_or_auto_is_how_answers_are_generated(pairs_run, tmp_path):
    run = shutil.copytree(pairs_run, tmp_path / "run")
    options = ["--num-pairs", "4", "--max-new-tokens", "12", "--coverage", "0.7"]
    evaluate.main([str(run), "--length", "auto", *options])
    match = json.loads((run / "evaluation.json").read_text())["exact_match"]
    assert match["generation"]["length"] == "auto" and match["generation"]["coverage"] == 0.7 and match["pairs"] == 4


def test_learned_heads(pairs_run, tmp_path, capsys):
    run = shutil.copytree(pairs_run, tmp_path / "run")
    model = load_language_model(run, device="cpu").model
    for head in (EndClassifier(32), LengthRegressor(32)):
        torch.manual_seed(0)
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.3)
        save_length_head(head, tmp_path / head.kind, model_hash=model_hash(model))
    heads = [str(tmp_path / "classifier"), str(tmp_path / "regression")]
    output = ["--output", str(tmp_path / "scores.json")]
    evaluate.main([str(run), "--length", "--length-expansion-pairs", "0", "--length-heads", *heads, *output])
    assert all((tmp_path / name).is_file() for name in OUTPUTS[1:])  # beside the JSON
    rules = json.loads((tmp_path / "scores.json").read_text())["length"]["rules"]
    assert [entry["rule"] for entry in rules if entry["bounds"] == "published"][-2:] == ["classifier", "regression"]
    loaded = load_language_model(run, device="cpu")
    for path in heads:
        head = load_length_head(path, loaded.model)
        saved = load_calibration(run / "checkpoints" / "step_60", head.kind, loaded.model, loaded.tokenizer, head)
        assert saved.num_pairs == 65
    _fails([str(run), "--length", "--length-heads", *heads, heads[0]], "is a second classifier", capsys)
    _fails(
        [str(run), "--length", "--length-heads", str(tmp_path / "no")],
        "no: no such folder; expected a run of `task: length_head`",
        capsys,
    )
    save_length_head(EndClassifier(32), tmp_path / "other", model_hash="another")
    _fails([str(run), "--length", "--length-heads", str(tmp_path / "other")], "for another model than this", capsys)


class _Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(1)))

    def forward(self, states):
        return states @ self.weight


class _Regressor(_Classifier):
    def forward(self, prompt_mean):
        return 10 + 5 * prompt_mean @ self.weight


def test_readings_are_those_of_the_predictors_alone():
    """One shared pass, in another order, gives each rule what it finds by itself; rows count their own passes."""
    model = tiny_model(30, length_format="pad_fill", pad_token_id=0, eos_token_id=2, max_position_embeddings=120)
    with torch.no_grad():  # in some prompts an end token is the likeliest everywhere, in others hardly anywhere
        model.head_weight[0] *= 2
    heads = {"classifier": _Classifier(), "regression": _Regressor()}
    predictors = [LengthPredictor(model, window=100, rule=rule, head=heads.get(rule)) for rule in LENGTH_RULES]
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 9, (24,), generator=random).tolist()
    prompts = [torch.randint(5, 30, (size,), generator=random).tolist() for size in sizes]
    pairs = [(prompt, [7] * length) for prompt, length in zip(prompts, range(0, 120, 5), strict=True)]
    passes = set()
    for readings in read_rules(predictors, pairs, batch_size=7):
        rule, predictor = readings.predictor.rule, readings.predictor
        alone = [predictor(**prompt_inputs(model, [prompt])) for prompt in prompts]
        torch.testing.assert_close(readings.readings, torch.cat([each.reading for each in alone]), rtol=1e-4, atol=1e-4)
        assert readings.bounds(predictor.threshold) == [each.bounds[0] for each in alone], rule
        assert readings.passes.tolist() == [each.passes for each in alone], rule
        answers = [[len(answer)] for _, answer in pairs]
        expected = torch.cat([predictor.scores(each, length) for each, length in zip(alone, answers, strict=True)])
        torch.testing.assert_close(readings.scores(), expected, rtol=1e-4, atol=1e-4)
        assert readings.scores()[20:].isinf().all() and readings.scores()[:20].isfinite().all()
        passes |= set(readings.passes.tolist())
        first, rest = readings.split(10)
        assert first.lengths.tolist() == list(range(0, 50, 5)) and len(rest.readings) == len(rest.passes) == 14
    assert len(passes) > 3


@pytest.mark.parametrize(
    ("rule", "threshold", "text"),
    [
        ("cdf", -math.log(0.05), "F > 0.9500"),
        ("classifier", 0.1, "F > 0.5000"),  # never below
        ("crossing", -math.log(2e-5), "F > 1 - 2.0e-05"),
        ("argmax", -3.0, "-3 tokens"),
        ("constant", 12.0, "+12 tokens"),
        ("quantile", -0.0, "+0 tokens"),
        ("cdf", math.inf, "whole window"),
    ],
)
def test_thresholds_in_words(rule, threshold, text):
    assert describe_threshold(rule, threshold) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coverage", "1.5"], "coverage: got 1.5; expected a number between 0 and 1"),
        (["--coverage", "0"], "coverage: got 0.0"),
        (["--num-pairs", "20"], "20 pairs leave 10 to calibrate with; coverage 0.95 needs 19, one half of 38 pairs"),
        (["--coverage", "0.99"], "130 pairs leave 65 .* coverage 0.99 needs 99, .*; the run holds out 130"),
        (["--length-expansion-pairs", "10"], "--length-expansion-pairs: 10 pairs leave 5 to calibrate with"),
        (["--length-expansion-pairs", "-1"], "--length-expansion-pairs: got -1; expected at least 0"),
        (["--num-pairs", "0"], "--num-pairs: got 0; expected at least 2"),
        (["--batch-size", "0"], "--batch-size: got 0; expected at least 1"),
        (["--window", "0"], "--window: got 0; expected at least 1"),
        (["--window", "31"], r"--window: got 31, and held-out prompt \d+ has \d tokens; expected at most 32 together"),
        (["--no-held-out"], "--no-held-out: got it with --length, an evaluation of its own"),
        (["--lm-eval", "hellaswag"], "--lm-eval: got it with --length"),
        (["--unmasking-rule", "count"], "--unmasking-rule: got it with --length"),
    ],
)  # fmt: skip
def test_bad_options(pairs_run, options, message, capsys):
    _fails([str(pairs_run), "--length", *options], message, capsys)


def _fails(arguments, message, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    pytest.raises(ValueError, _raise, captured.err).match(rf"^error: [^\n]*{message}[^\n]*\n$")
    assert "probing" not in captured.err  # before work


def _raise(text):
    raise ValueError(text)


def test_options_of_length_alone(pairs_run, capsys):
    _fails([str(pairs_run), "--window", "8"], "--window: got it without --length; pass that too", capsys)


def test_runs_without_held_out_pairs(make_run, pairs_run, tmp_path, capsys):
    taken = shutil.copytree(pairs_run / "checkpoints" / "step_60", tmp_path / "taken")
    _fails([str(taken), "--length"], "is not a run, and has no held-out pairs; expected a run's folder", capsys)
    (tmp_path / "a.txt").write_text("\n".join(f"line {j}." for j in range(60)))
    documents = make_run(name="text_folder", path=str(tmp_path), min_length=4, max_length=8)
    _fails([str(documents), "--length"], "was trained on documents, which have no prompts and answers", capsys)
    images = tmp_path / "images"
    images.mkdir()
    (images / "config.yaml").write_text("task: dit\n")
    _fails([str(images), "--length"], "nrecognized arguments: --length", capsys)


def test_a_checkpoint_without_length_format(pairs_run, tmp_path, capsys):
    run = shutil.copytree(pairs_run, tmp_path / "run")
    config = run / "checkpoints" / "step_60" / "config.json"
    text = config.read_text()
    assert '"length_format": "eos_fill"' in text
    config.write_text(text.replace('"length_format": "eos_fill"', '"length_format": null      '))  # of the same size
    file = config.with_name("trainer_state.json")
    state = json.loads(file.read_text())
    del state["sha256"], state["data"]
    sizes = {name: kept["bytes"] for name, kept in state["files"].items()}
    file.write_text(json.dumps({**state, "files": sizes}))  # as fastdiff 0.1.0 wrote it: without hashes
    _fails([str(run), "--length"], "length_format: the model's config names none", capsys)
