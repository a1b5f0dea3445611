"""Decoding: tokens/s of LLaDA's public loop and of fastdiff's modes, the same model and prompts in one run.

GPT-2's size, random weights: prompt 64, 448 new tokens, blocks of 32, 2 steps a block for every contender. Random
weights are never sure of a token, so that rules of confidence belong to the second case. FASTDIFF_DECODING_STEPS (2)
are the steps a block, FASTDIFF_DECODING_BLOCKS (14) the blocks, fewer for a quick look; the case's name has both.

FASTDIFF_NUMBERS_RUN=folder adds a trained model (recipe mdlm_numbers): held-out prompts, one token per step in the
public loop and the exact mode, and exact matches beside tokens/s. Batches have prompts of one length: the public loop
takes no others. FASTDIFF_NUMBERS_PROMPTS (64) are as many prompts.

Both cases first compare the tokens of the public loop and of the exact mode.
"""

import os

import measure
import pytest
import torch
from decoding_cases import contender, exact_matches, held_out, public, rates

from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig

PROMPT, BLOCK = 64, 32
STEPS = int(os.environ.get("FASTDIFF_DECODING_STEPS", "2"))
BLOCKS = int(os.environ.get("FASTDIFF_DECODING_BLOCKS", "14"))
MASK = 50257
ROUNDS = 3
RUN = os.environ.get("FASTDIFF_NUMBERS_RUN")
PROMPTS = int(os.environ.get("FASTDIFF_NUMBERS_PROMPTS", "64"))
DIFFERENT = "the exact mode gives other tokens than the public loop: nothing is compared"


def gpt2_small() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    config = MaskedDiffusionLMConfig(
        architecture="gpt2", vocab_size=MASK + 1, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        mask_token_id=MASK, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MaskedDiffusionLM(config).to(measure.DEVICE).eval()


def test_gpt2_small(benchmark, report):
    model, new = gpt2_small(), BLOCK * BLOCKS
    prompts = [torch.randint(MASK, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(measure.DEVICE)]
    steps = STEPS * BLOCKS
    options = dict(max_new_tokens=new, block_length=BLOCK, num_inference_steps=steps)
    contenders = {
        "public loop": public(model, prompts, new, BLOCK, steps),
        "exact": contender(model, prompts, **options),
        "prefix cache": contender(model, prompts, **options, prefix_cache=True),
        "dual cache": contender(model, prompts, **options, dual_cache=True),
    }
    if not torch.equal(contenders["public loop"]()[0], contenders["exact"]()[0]):
        raise AssertionError(DIFFERENT)
    seconds = measure.in_turns(benchmark, contenders, ROUNDS)
    case = f"GPT-2 small, random, prompt {PROMPT}, {new} new tokens, block {BLOCK}, {STEPS} steps a block, fp32"
    report(rates(case, seconds, new, {"exact": 1.6}))


@pytest.mark.skipif(RUN is None, reason="FASTDIFF_NUMBERS_RUN does not name a run of the recipe mdlm_numbers")
@pytest.mark.parametrize("batch", [1, 16])
def test_numbers(batch, benchmark, report):
    from fastdiff.tasks.masked_lm.run import load_language_model

    loaded = load_language_model(RUN, device=measure.DEVICE)
    model, generation = loaded.model, loaded.recipe.sampling.generation
    prompts, answers = held_out(loaded.recipe, loaded.tokenizer, batch, PROMPTS)
    new, block = generation["max_new_tokens"], generation["block_length"]
    options = dict(max_new_tokens=new, block_length=block)
    contenders = {
        "public loop": public(model, prompts, new, block, new),
        "exact": contender(model, prompts, **options),
        "dual cache, threshold": contender(
            model, prompts, **options, dual_cache=True, unmasking_rule="threshold", threshold=0.9
        ),
    }
    tokens = {name: function() for name, function in contenders.items()}
    if not all(map(torch.equal, tokens["public loop"], tokens["exact"])):
        raise AssertionError(DIFFERENT)
    seconds = measure.in_turns(benchmark, contenders, ROUNDS)
    case = f"numbers to words, {len(answers)} prompts, batch {batch}, {new} new tokens, block {block}, threshold 0.9"
    report(rates(case, seconds, len(answers) * new, {"dual cache, threshold": 8.0}))
    eos = loaded.tokenizer.eos_token_id
    matches = {name: exact_matches(batches, answers, eos) for name, batches in tokens.items()}
    report(measure.Row(case, "exact", matches))
