"""Length prediction: useful tokens/s (those before the end token) of windows of fixed and of predicted length.

FASTDIFF_LENGTH_RUN=folder is a run of recipe length_numbers with a calibration (`python -m fastdiff.evaluate RUN
--length` makes it): held-out prompts, a window of 256 tokens, blocks of 16, one token a step but where a threshold is
named. FASTDIFF_LENGTH_PROMPTS (16) are as many prompts; batches have prompts of one length, since the public loop takes
no others. "one block" are bounds forced to a single block: rows must grow. Exact matches stand beside the rates.
"""

import os

import measure
import pytest
from decoding_cases import contender, ended, exact_matches, held_out, public

from fastdiff.generation import MaskedDiffusionGenerationConfig
from fastdiff.generation.length import LengthPredictor

RUN = os.environ.get("FASTDIFF_LENGTH_RUN")
PROMPTS = int(os.environ.get("FASTDIFF_LENGTH_PROMPTS", "16"))
NEW, BLOCK, COVERAGE, ROUNDS = 256, 16, 0.95, 3
QUICK = dict(unmasking_rule="threshold", threshold=0.9, dual_cache=True)


@pytest.mark.skipif(RUN is None, reason="FASTDIFF_LENGTH_RUN names no run of recipe length_numbers")
@pytest.mark.parametrize("batch", [1, 16])
def test_numbers(batch, benchmark, report):
    from fastdiff.training.runs import load_language_model, load_length_predictor

    loaded = load_language_model(RUN, device=measure.DEVICE)
    model, eos = loaded.model, loaded.tokenizer.eos_token_id
    prompts, answers = held_out(loaded.recipe, loaded.tokenizer, batch, PROMPTS)
    fixed = dict(max_new_tokens=NEW, block_length=BLOCK)
    auto = dict(**fixed, length="auto", coverage=COVERAGE)
    predictor = load_length_predictor(loaded, MaskedDiffusionGenerationConfig(**auto))
    if not predictor.calibrated:
        raise ValueError(f"{RUN} has no calibration; run python -m fastdiff.evaluate {RUN} --length")
    one_block = LengthPredictor(model, window=NEW, rule="constant", parameter=BLOCK - 1, coverage=COVERAGE)
    contenders = {
        "public loop": public(model, prompts, NEW, BLOCK, NEW),
        "fixed": contender(model, prompts, **fixed),
        "fixed, early stop": contender(model, prompts, **fixed, early_stop=True),
        "auto": contender(model, prompts, predictor, **auto),
        "auto, one block": contender(model, prompts, one_block, **auto),
        "fixed, dual cache, threshold": contender(model, prompts, **fixed, **QUICK),
        "auto, dual cache, threshold": contender(model, prompts, predictor, **auto, **QUICK),
        "auto, threshold, probe reused": contender(
            model, prompts, predictor, **auto, reuse_probe=True, unmasking_rule="threshold", threshold=0.9
        ),
    }
    batches = {name: function() for name, function in contenders.items()}
    seconds = measure.in_turns(benchmark, contenders, ROUNDS)
    case = f"numbers to words, {len(answers)} prompts, batch {batch}, window {NEW}, block {BLOCK}"
    useful = {name: [row for part in parts for row in part.tolist()] for name, parts in batches.items()}
    useful = {name: sum(map(len, ended(rows, eos))) for name, rows in useful.items()}
    values = {name: useful[name] / seconds[name] for name in contenders}
    speedups = {name: value / values["public loop"] for name, value in values.items() if name != "public loop"}
    report(measure.Row(case, "useful tokens/s", values, speedups, {"auto, dual cache, threshold": 15.0}))
    of_fixed = {"auto": values["auto"] / values["fixed"]}
    report(measure.Row(f"{case}, beside fixed", "useful tokens/s", {"fixed": values["fixed"]}, of_fixed, {"auto": 5.0}))
    matches = {name: exact_matches(parts, answers, eos) for name, parts in batches.items()}
    report(measure.Row(case, "exact", matches))
