"""Length prediction: exact matches of windows of fixed and of predicted length, the same model and prompts.

FASTDIFF_LENGTH_RUN=folder is a run of recipe length_numbers with a calibration; FASTDIFF_LENGTH_ANSWERS (256) are the
held-out prompts. No times are taken. The modes are those of test_length.py.
"""

import os

from decoding_cases import contender, exact_matches, held_out, length_modes
from measure import Row
from test_length import BLOCK, COVERAGE, NEW, RUN, WITH_RUN

ANSWERS = int(os.environ.get("FASTDIFF_LENGTH_ANSWERS", "256"))


@WITH_RUN
def test_exact_matches(report):
    loaded, options = length_modes(RUN, NEW, BLOCK, COVERAGE)
    prompts, answers = held_out(loaded.recipe, loaded.tokenizer, 16, ANSWERS)
    matches = {}
    for name, (predictor, chosen) in options.items():
        batches = contender(loaded.model, prompts, predictor, **chosen)()
        matches[name] = exact_matches(batches, answers, loaded.tokenizer.eos_token_id)
    report(Row(f"numbers to words, {len(answers)} prompts, window {NEW}, block {BLOCK}", "exact", matches))
