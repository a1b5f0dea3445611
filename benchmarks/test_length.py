"""Length prediction: useful tokens/s (those before the end token) of windows of fixed and of predicted length.

FASTDIFF_LENGTH_RUN=folder is a run of recipe length_numbers with a calibration (`python -m fastdiff.evaluate RUN
--length` makes it): held-out prompts, a window of 256 tokens, blocks of 16, one token per step but where a threshold is
named. FASTDIFF_LENGTH_PROMPTS (16) are as many prompts; batches have prompts of one length, since the public loop takes
no others. "one block" are bounds forced to a single block: rows must grow. test_length_answers.py has exact matches.
"""

import os

import measure
import pytest
from decoding_cases import contender, ended, held_out, length_modes, public

RUN = os.environ.get("FASTDIFF_LENGTH_RUN")
PROMPTS = int(os.environ.get("FASTDIFF_LENGTH_PROMPTS", "16"))
NEW, BLOCK, COVERAGE, ROUNDS = 256, 16, 0.95, 2
WITH_RUN = pytest.mark.skipif(
    RUN is None, reason="FASTDIFF_LENGTH_RUN does not name a run of the recipe length_numbers"
)


def useful(batches: list, eos: int) -> int:
    """Tokens before the end tokens."""
    return sum(map(len, ended([row for rows in batches for row in rows.tolist()], eos)))


@WITH_RUN
@pytest.mark.parametrize("batch", [1, 16])
def test_numbers(batch, benchmark, report):
    loaded, options = length_modes(RUN, NEW, BLOCK, COVERAGE)
    model, eos = loaded.model, loaded.tokenizer.eos_token_id
    prompts, answers = held_out(loaded.recipe, loaded.tokenizer, batch, PROMPTS)
    contenders = {"public loop": public(model, prompts, NEW, BLOCK, NEW)}
    contenders |= {name: contender(model, prompts, told, **chosen) for name, (told, chosen) in options.items()}
    tokens = {name: useful(function(), eos) for name, function in contenders.items()}
    seconds = measure.in_turns(benchmark, contenders, ROUNDS)
    values = {name: tokens[name] / seconds[name] for name in contenders}
    speedups = {name: value / values["public loop"] for name, value in values.items() if name != "public loop"}
    mean = sum(map(len, answers)) / len(answers)
    name = f"numbers to words, {len(answers)} answers of {mean:.1f} tokens, batch {batch}, window {NEW}, block {BLOCK}"
    report(measure.Row(name, "useful tokens/s", values, speedups, {"auto, dual cache, threshold": 15.0}))
    beside = {"fixed": values["auto"] / values["fixed"]}
    report(measure.Row(f"{name}, auto", "useful tokens/s", {"fastdiff": values["auto"]}, beside, {"fixed": 5.0}))
