"""Conformal calibration: coverage on synthetic pairs, the file, and everything that it refuses."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch
from generation.test_length import Classifier, ending_model
from hypothesis import given
from hypothesis import strategies as st
from language_runs import byte_tokenizer

from fastdiff.generation.length import (
    CALIBRATION_FILE,
    Calibration,
    LengthPredictor,
    calibrate,
    load_calibration,
    model_hash,
    pairs_needed,
    prompt_inputs,
    rules,
    save_calibrations,
)
from fastdiff.models import MaskedDiffusionLM

WINDOW = 10


def made(scores, **fields):
    given = dict(rule="cdf", window=8, length_format="eos_fill", end_token_ids=(2,), parameter=None)
    return Calibration(**{**given, **fields}, scores=tuple(sorted(scores)), model_hash="m", tokenizer_hash="t")


def random_pairs(count, seed=0, longest=WINDOW + 2):
    """Prompts of 1 to 12 tokens and answers of up to `longest`, which the model knows nothing of."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (
        torch.randint(1, 13, (count,), generator=generator),
        torch.randint(0, longest + 1, (count,), generator=generator),
    )
    return [(torch.randint(4, 41, (p,), generator=generator).tolist(), [5] * a) for p, a in zip(*sizes, strict=True)]


@pytest.fixture(scope="module")
def model():
    return ending_model("mdlm", push=2.5)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(60)


def predictor_of(model, rule="cdf", **options):
    head = None
    if rule in ("classifier", "regression"):
        torch.manual_seed(5)
        head = Classifier()
    return LengthPredictor(model, window=WINDOW, rule=rule, head=head, **options)


@pytest.mark.parametrize(
    "coverage, needed", [(0.95, 19), (0.9, 9), (0.5, 1), (0.8, 4), (0.99, 99), (0.999, 999), (0.1, 1), (0.07, 1)]
)
def test_pairs_that_a_coverage_needs(coverage, needed):
    """The last one's threshold is the highest score; with one pair less there is none."""
    assert pairs_needed(coverage) == needed
    scores = [float(i) for i in range(needed)]
    assert made(scores).threshold(coverage) == needed - 1
    with pytest.raises(ValueError, match=f"got {needed - 1} pairs; a coverage of {coverage:g} needs at least {needed}"):
        made(scores[1:]).threshold(coverage)


@given(st.integers(1, 99), st.integers(1, 400))
def test_the_threshold_is_the_smallest_that_enough_scores_are_within(percent, count):
    """In integers: the k-th score for the smallest k with 100 k >= (n + 1) · percent."""
    k = next((k for k in range(1, count + 1) if 100 * k >= (count + 1) * percent), None)
    calibration = made(range(count))
    if k is None:
        assert pairs_needed(percent / 100) > count
    else:
        assert calibration.threshold(percent / 100) == k - 1


@pytest.mark.parametrize("coverage", [0, 1, -0.5, 1.5, math.nan, True, "0.9", None])
def test_coverage_outside_is_refused(coverage, model, tokenizer, pairs):
    for call in (
        lambda: made(range(50)).threshold(coverage),
        lambda: calibrate(predictor_of(model), pairs, coverage, tokenizer=tokenizer),
        lambda: predictor_of(model, coverage=coverage),
    ):
        with pytest.raises(ValueError, match="coverage: got .*; expected a number between 0 and 1") as error:
            call()
        assert "\n" not in str(error.value)


def synthetic(splits, pairs, seed, informative):
    """Curves `[S, N, 16]` and lengths `[S, N]` of exchangeable pairs; some lengths do not fit into the window.

    Not informative: curves that have nothing to do with the lengths, as those of a model that knows nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 17, (splits, pairs), generator=generator)
    centre = lengths if informative else torch.randint(1, 17, (splits, pairs), generator=generator)
    centre = centre + torch.randn(splits, pairs, generator=generator)
    slope = 0.3 + torch.rand(splits, pairs, generator=generator)
    logits = slope[..., None] * (torch.arange(16) - centre[..., None])
    noise = torch.randn(logits.shape, generator=generator)
    return torch.nn.functional.logsigmoid(logits + noise), lengths


@pytest.mark.parametrize("informative", [True, False])
@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_bounds_cover_what_was_asked_on_average_over_splits(coverage, informative):
    """400 splits of 99 pairs and 50 tests; one length of 16 never fits."""
    splits, count = 400, 99
    curves, lengths = synthetic(splits, count + 50, 7, informative)
    levels = rules.cdf_levels(curves.flatten(0, 1), "eos_fill")
    scores = rules.curve_scores(levels, lengths.flatten()).view(splits, -1)
    levels, lengths = levels.view(splits, -1, 16)[:, count:], lengths[:, count:]
    thresholds = [made(scores[split, :count].tolist()).threshold(coverage) for split in range(splits)]
    bounds = torch.stack([rules.curve_bounds(*of_split) for of_split in zip(levels, thresholds, strict=True)])
    infinite = torch.tensor(thresholds)[:, None] == math.inf
    right = (bounds >= lengths) & ((lengths < 16) | infinite)
    covered = right.double().mean(1)
    mean, error = float(covered.mean()), float(covered.std()) / splits**0.5
    assert mean > coverage - 4 * error and error < 0.004
    assert bool((bounds[infinite[:, 0]] == 16).all())
    if coverage == 0.8:  # scores do not tie, and thresholds are above that of F = 0.5: the mean is k / (n + 1) itself
        assert min(thresholds) > rules.LOWEST_THRESHOLD and not infinite.any()
        assert abs(mean - 80 / 100) < 4 * error
        slack = float((bounds - lengths)[right].double().mean())
        assert slack < 5 if informative else slack > 5  # it holds for any curve; a good one is tight
    else:
        assert 0.5 < float(infinite.double().mean()) < 1  # .0625 of the lengths do not fit


def test_predictions_plus_a_threshold_cover_too():
    """Whole numbers tie, so that the coverage may be above what was asked."""
    generator = torch.Generator().manual_seed(3)
    splits, count = 400, 99
    lengths = torch.randint(0, 40, (splits, count + 50), generator=generator)
    predictions = (lengths + 4 * torch.randn(lengths.shape, generator=generator)).ceil().clamp(0, 48).double()
    covered = []
    for split in range(splits):
        scores = rules.length_scores(predictions[split], lengths[split], 48)
        threshold = made(scores[:count].tolist()).threshold(0.9)
        bounds = rules.length_bounds(predictions[split, count:], threshold, 48)
        covered.append((bounds >= lengths[split, count:]).double().mean())
    mean, error = float(torch.stack(covered).mean()), float(torch.stack(covered).std()) / splits**0.5
    assert 0.9 - 4 * error < mean < 0.96 and error < 0.004


@pytest.mark.parametrize("rule", rules.LENGTH_RULES)
def test_every_rule_is_calibrated_to_hold_for_the_pairs_that_it_saw(rule, model, tokenizer, pairs):
    pairs = [(prompt, answer[: WINDOW - 1]) for prompt, answer in pairs]
    plain = predictor_of(model, rule)
    calibration = calibrate(plain, pairs, 0.9, tokenizer=tokenizer, batch_size=16)
    assert calibration.num_pairs == 60 and list(calibration.scores) == sorted(calibration.scores)
    alone = []
    for prompt, answer in pairs:
        alone += plain.scores(plain(torch.tensor([prompt])), [len(answer)]).tolist()
    assert torch.allclose(torch.tensor(calibration.scores), torch.tensor(sorted(alone)), rtol=1e-6, atol=1e-6)
    calibrated = predictor_of(model, rule, calibration=calibration, coverage=0.9)
    margin = rules.TIE_MARGIN if rule in rules.CURVE_RULES else 0
    assert calibrated.threshold == calibration.scores[54] + margin  # the 55th: 61 · .9 = 54.9
    bounds = calibrated(**prompt_inputs(model, [prompt for prompt, _ in pairs])).bounds
    right = sum(bound >= len(answer) for bound, (_, answer) in zip(bounds, pairs, strict=True))
    assert right >= 55
    if rule == "constant":
        assert bounds == [sorted(len(answer) for _, answer in pairs)[54]] * 60


def test_answers_that_do_not_fit_count_as_infinite(model, tokenizer, pairs):
    too_long = sum(len(answer) >= WINDOW for _, answer in pairs)
    assert 6 < too_long < 30
    calibration = calibrate(predictor_of(model), pairs, 0.5, tokenizer=tokenizer)
    assert sum(map(math.isinf, calibration.scores)) == too_long
    assert math.isfinite(calibration.threshold(0.5)) and calibration.threshold(0.95) == math.inf
    kept = predictor_of(model, calibration=calibration, coverage=0.95)
    assert kept(**prompt_inputs(model, [prompt for prompt, _ in pairs])).bounds == [WINDOW] * 60


def test_calibration_of_prompts_behind_an_encoder(tokenizer, pairs):
    model = ending_model("mdlm", num_encoder_layers=1)
    for rule in ("cdf", "regression", "daedal"):
        predictor = predictor_of(model, rule)
        calibration = calibrate(predictor, pairs[:9], 0.9, tokenizer=tokenizer, batch_size=4)
        alone = [
            float(predictor.scores(predictor(**prompt_inputs(model, [prompt])), [len(answer)]))
            for prompt, answer in pairs[:9]
        ]
        assert torch.allclose(torch.tensor(calibration.scores), torch.tensor(sorted(alone)), rtol=1e-6, atol=1e-6)


def test_too_few_pairs_and_tokenizers_without_an_end_are_refused_before_a_pass(model, tokenizer, pairs, monkeypatch):
    monkeypatch.setattr(type(model), "hidden_states", None)
    with pytest.raises(ValueError, match="pairs: got 18 pairs; a coverage of 0.95 needs at least 19: calibrate with"):
        calibrate(predictor_of(model), pairs[:18], 0.95, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer: it has no end token"):
        calibrate(predictor_of(model), pairs, 0.95, tokenizer=byte_tokenizer(eos_token=None))
    for prompts, message in (([[5], []], "prompt 1 is empty"), ([], "got none")):
        with pytest.raises(ValueError, match=message):
            prompt_inputs(model, prompts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model, tokenizer, pairs):
    """A checkpoint's folder with calibrations of four rules."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    rules = ("cdf", "quantile", "daedal", "classifier")
    made = [calibrate(predictor_of(model, rule), pairs, 0.9, tokenizer=tokenizer) for rule in rules]
    assert save_calibrations(folder, made) == folder / CALIBRATION_FILE
    return folder, dict(zip(rules, made, strict=True))


def test_calibrations_come_back_as_they_were(saved, model, tokenizer):
    folder, calibrations = saved
    json.loads((folder / CALIBRATION_FILE).read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN
    for rule, calibration in calibrations.items():
        head = predictor_of(model, rule).head
        for path in (folder, folder / CALIBRATION_FILE):
            assert load_calibration(path, rule, model, tokenizer, head) == calibration
        loaded = predictor_of(model, rule, calibration=calibration, coverage=0.7)
        margin = rules.TIE_MARGIN if loaded.rule in rules.CURVE_RULES else 0
        assert loaded.threshold == calibration.threshold(0.7) + margin
    assert predictor_of(model, "daedal", calibration=calibrations["daedal"], coverage=0.7).parameter == 0.5


def test_scores_of_another_form_of_a_rule_are_refused(saved, model, tokenizer, tmp_path):
    """Files of 0.1.0 have no version; of their rules DAEDAL's alone reads a window differently now."""
    entries = json.loads((saved[0] / CALIBRATION_FILE).read_text())
    for entry in entries["calibrations"].values():
        del entry["rule_version"]
    file = tmp_path / CALIBRATION_FILE
    file.write_text(json.dumps(entries))
    assert load_calibration(file, "cdf", model, tokenizer) == saved[1]["cdf"]
    with pytest.raises(ValueError, match="made with another form of the rule 'daedal'; calibrate again"):
        load_calibration(file, "daedal", model, tokenizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_checkpoint_is_known_again_in_any_dtype(saved, tokenizer, dtype):
    folder, calibrations = saved
    again = MaskedDiffusionLM.from_pretrained(folder, dtype=dtype)
    assert next(again.parameters()).dtype == dtype
    calibration = load_calibration(folder, "cdf", again, tokenizer)
    assert calibration == calibrations["cdf"]
    LengthPredictor(again, window=WINDOW, calibration=calibration, coverage=0.7)


def test_other_weights_tokens_tokenizers_and_heads_are_noticed(saved, model, tokenizer):
    folder, calibrations = saved
    file = str(folder / CALIBRATION_FILE)
    other = ending_model("mdlm", push=2.5)
    assert load_calibration(folder, "cdf", other, tokenizer) == calibrations["cdf"]  # the same seed
    with torch.no_grad():
        other.model.layers[0].input_layernorm.weight[3] += 0.1
    refused = f"^{file}: this calibration was made for another checkpoint"
    with pytest.raises(ValueError, match=refused):
        load_calibration(folder, "cdf", other, tokenizer)
    with pytest.raises(ValueError, match="^calibration: this calibration was made for another checkpoint"):
        predictor_of(other, calibration=calibrations["cdf"])
    other_token = ending_model("mdlm", push=2.5, eos_token_id=[2, 9])
    with pytest.raises(ValueError, match=refused):
        load_calibration(folder, "cdf", other_token, tokenizer)
    with pytest.raises(ValueError, match=f"^{file}: this calibration was made with another tokenizer; calibrate again"):
        load_calibration(folder, "cdf", model, byte_tokenizer(bos_token=None))
    for head in (None, Classifier()):
        with pytest.raises(ValueError, match=f"^{file}: this calibration was made for another learned head"):
            load_calibration(folder, "classifier", model, tokenizer, head)
    with pytest.raises(ValueError, match="has no calibration of the rule 'rho'; expected one of cdf, quantile, daedal"):
        load_calibration(folder, "rho", model, tokenizer)


@pytest.mark.parametrize(
    "rule, options, message",
    [
        ("argmax", {}, "calibration: made for rule = 'cdf'; this predictor has 'argmax'"),
        ("cdf", {"window": 9}, "calibration: made for window = 10; this predictor has 9: calibrate it again"),
        ("cdf", {"end_token_ids": [2, 9]}, r"made for end_token_ids = \(2,\); this predictor has \(2, 9\)"),
        ("cdf", {"parameter": 0.9}, "parameter: got 0.9 with a calibration, whose threshold takes its place"),
        ("quantile", {"parameter": 0.5}, "made for parameter = 0.75; this predictor has 0.5"),
        ("cdf", {"coverage": 0.99}, "calibration: got 60 pairs; a coverage of 0.99 needs at least 99"),
    ],
)
def test_a_calibration_of_another_predictor_is_refused(saved, model, rule, options, message):
    calibration = saved[1]["quantile" if rule == "quantile" else "cdf"]
    with pytest.raises(ValueError, match=message):
        LengthPredictor(model, **{"window": WINDOW, "rule": rule, "calibration": calibration, **options})


def test_a_calibration_of_another_format_is_refused(saved, model, tokenizer, pairs):
    other = ending_model("mdlm", push=2.5, length_format="eos_only")
    with pytest.raises(ValueError, match="made for length_format = 'eos_fill'; this predictor has 'eos_only'"):
        LengthPredictor(other, window=WINDOW, calibration=saved[1]["cdf"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"calibrations": {"cdf": {}}}', '{"calibrations": {"cdf": {"scores": [2, 1]}}}', "\x80"],
)
def test_files_that_are_damaged_or_missing(tmp_path, model, tokenizer, text):
    with pytest.raises(FileNotFoundError, match="no such file; calibrate the rule 'cdf' first"):
        load_calibration(tmp_path, "cdf", model, tokenizer)
    (tmp_path / CALIBRATION_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="not a length calibration, or damaged .*; calibrate again") as error:
        load_calibration(tmp_path, "cdf", model, tokenizer)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = save_calibrations(tmp_path, [made([1.0, math.inf])])
    before = file.read_text()

    write = Path.write_bytes

    def full(path, content):
        write(path, content[:20])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_calibrations(tmp_path, [made([2.0])])
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]
    with pytest.raises(ValueError, match="got two of the rule 'cdf'"):
        save_calibrations(tmp_path, [made([2.0]), made([3.0])])


def test_hashes_are_of_names_shapes_and_values():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    same, named, other = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2)), torch.nn.Linear(3, 2)
    for copy in (same, named[0], other):
        copy.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.bias[1] += 0.1
    assert model_hash(same) == model_hash(layer)
    assert len({model_hash(module) for module in (layer, named, other)}) == 3
