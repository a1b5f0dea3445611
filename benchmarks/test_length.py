"""Length prediction: useful tokens/s (those before the end token) of windows of fixed and of predicted length.

FASTDIFF_LENGTH_RUN=folder is a run of recipe length_numbers with a calibration (`python -m fastdiff.evaluate RUN
--length` makes it): held-out prompts, a window of 256 tokens, blocks of 16, one token a step but where a threshold is
named. FASTDIFF_LENGTH_PROMPTS (16) are as many prompts; batches have prompts of one length, since the public loop takes
no others. "one block" are bounds forced to a single block: rows must grow. FASTDIFF_LENGTH_ANSWERS (512) prompts are in
a table of exact matches.
"""

import os

import measure
import pytest
from decoding_cases import contender, ended, exact_matches, held_out, public

from fastdiff.generation import MaskedDiffusionGenerationConfig
from fastdiff.generation.length import LengthPredictor

RUN = os.environ.get("FASTDIFF_LENGTH_RUN")
PROMPTS = int(os.environ.get("FASTDIFF_LENGTH_PROMPTS", "16"))
ANSWERS = int(os.environ.get("FASTDIFF_LENGTH_ANSWERS", "512"))
NEW, BLOCK, COVERAGE, ROUNDS = 256, 16, 0.95, 3
WITH_RUN = pytest.mark.skipif(RUN is None, reason="FASTDIFF_LENGTH_RUN names no run of recipe length_numbers")


@pytest.fixture(scope="module")
def case():
    """The model, and the contenders' options with their predictors."""
    from fastdiff.training.runs import load_language_model, load_length_predictor

    loaded = load_language_model(RUN, device=measure.DEVICE)
    fixed = dict(max_new_tokens=NEW, block_length=BLOCK)
    auto = dict(**fixed, length="auto", coverage=COVERAGE)
    predictor = load_length_predictor(loaded, MaskedDiffusionGenerationConfig(**auto))
    if not predictor.calibrated:
        raise ValueError(f"{RUN} has no calibration; run python -m fastdiff.evaluate {RUN} --length")
    one_block = LengthPredictor(loaded.model, window=NEW, rule="constant", parameter=BLOCK - 1, coverage=COVERAGE)
    threshold = dict(unmasking_rule="threshold", threshold=0.9)
    return loaded, {
        "fixed": (None, fixed),
        "fixed, early stop": (None, dict(**fixed, early_stop=True)),
        "auto": (predictor, auto),
        "auto, one block": (one_block, auto),
        "fixed, dual cache, threshold": (None, dict(**fixed, **threshold, dual_cache=True)),
        "auto, dual cache, threshold": (predictor, dict(**auto, **threshold, dual_cache=True)),
        "auto, threshold": (predictor, dict(**auto, **threshold)),
        "auto, threshold, probe reused": (predictor, dict(**auto, **threshold, reuse_probe=True)),
    }


def useful(batches: list, eos: int) -> int:
    """Tokens before the end tokens."""
    return sum(map(len, ended([row for rows in batches for row in rows.tolist()], eos)))


@WITH_RUN
@pytest.mark.parametrize("batch", [1, 16])
def test_numbers(case, batch, benchmark, report):
    loaded, options = case
    model, eos = loaded.model, loaded.tokenizer.eos_token_id
    prompts, answers = held_out(loaded.recipe, loaded.tokenizer, batch, PROMPTS)
    contenders = {"public loop": public(model, prompts, NEW, BLOCK, NEW)}
    contenders |= {name: contender(model, prompts, told, **chosen) for name, (told, chosen) in options.items()}
    tokens = {name: useful(function(), eos) for name, function in contenders.items()}
    seconds = measure.in_turns(benchmark, contenders, ROUNDS)
    values = {name: tokens[name] / seconds[name] for name in contenders}
    speedups = {name: value / values["public loop"] for name, value in values.items() if name != "public loop"}
    name = f"numbers to words, {len(answers)} prompts, batch {batch}, window {NEW}, block {BLOCK}"
    report(measure.Row(name, "useful tokens/s", values, speedups, {"auto, dual cache, threshold": 15.0}))
    beside = {"fixed": values["auto"] / values["fixed"]}
    report(measure.Row(f"{name}, auto", "useful tokens/s", {"fastdiff": values["auto"]}, beside, {"fixed": 5.0}))


@WITH_RUN
def test_exact_matches(case, report):
    """The same answers, whatever the window."""
    loaded, options = case
    prompts, answers = held_out(loaded.recipe, loaded.tokenizer, 16, ANSWERS)
    matches = {}
    for name, (told, chosen) in options.items():
        batches = contender(loaded.model, prompts, told, **chosen)()
        matches[name] = exact_matches(batches, answers, loaded.tokenizer.eos_token_id)
    report(measure.Row(f"numbers to words, {len(answers)} prompts, window {NEW}, block {BLOCK}", "exact", matches))
