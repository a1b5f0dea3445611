"""Decoding: tokens/s of LLaDA's public loop and of fastdiff's modes, the same model and prompts.

GPT-2's size, random weights: prompt 64, 448 new tokens, blocks of 32, 2 steps a block for every contender that counts
(FASTDIFF_DECODING_STEPS, and FASTDIFF_DECODING_BLOCKS of the 14 blocks for a quick look; both are in the case's name).
Tokens of the public loop and of the exact mode are compared first.

FASTDIFF_NUMBERS_RUN=folder adds a trained model (recipe mdlm_numbers): held-out prompts, one token a step in the public
loop and the exact mode, accuracy beside tokens/s.
"""

import os

import masked_lm_baselines
import measure
import torch

from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig

PROMPT, BLOCK = 64, 32
STEPS = int(os.environ.get("FASTDIFF_DECODING_STEPS", "2"))
BLOCKS = int(os.environ.get("FASTDIFF_DECODING_BLOCKS", "14"))
MASK = 50257
ROUNDS = 3
THRESHOLD = 0.9
APPROXIMATE = {"prefix cache": dict(prefix_cache=True), "dual cache": dict(dual_cache=True)}
PARALLEL = dict(dual_cache=True, unmasking_rule="threshold", threshold=THRESHOLD, num_inference_steps=None)


def gpt2_small() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    config = MaskedDiffusionLMConfig(
        architecture="gpt2", vocab_size=MASK + 1, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        mask_token_id=MASK, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MaskedDiffusionLM(config).to(measure.DEVICE).eval()


def rates(case: str, seconds: dict[str, float], tokens: int, targets: dict[str, float]) -> measure.Row:
    """A row in tokens/s; speed-ups over the public loop of every contender."""
    values = {name: tokens / value for name, value in seconds.items()}
    speedups = {name: value / values["public loop"] for name, value in values.items() if name != "public loop"}
    return measure.Row(case, "tokens/s", values, speedups, targets)


def test_gpt2_small(benchmark, report):
    model, new = gpt2_small(), BLOCK * BLOCKS
    prompt = torch.randint(MASK, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(measure.DEVICE)

    def ours(**options):
        fields = dict(max_new_tokens=new, block_length=BLOCK, num_inference_steps=STEPS * BLOCKS, **{})
        config = MaskedDiffusionGenerationConfig(**{**fields, **options})
        return lambda: generate(model, prompt, None, config)

    def public():
        return masked_lm_baselines.llada_generate(model, prompt, new, BLOCK, STEPS * BLOCKS, MASK)

    exact = ours()
    if not torch.equal(public(), exact().sequences):
        raise AssertionError("the exact mode gives other tokens than the public loop: nothing is compared")
    contenders = {"public loop": public, "exact": exact}
    contenders |= {name: ours(**options) for name, options in APPROXIMATE.items()}
    parallel = ours(**PARALLEL)
    passes = parallel().statistics.forward_passes
    if passes <= 4 * STEPS * BLOCKS:  # random weights are seldom sure: then it takes up to a step a token
        contenders["dual cache, threshold"] = parallel
    seconds = measure.in_turns(benchmark, contenders, ROUNDS)
    case = f"GPT-2 small, random, prompt {PROMPT}, {new} new tokens, block {BLOCK}, {STEPS} steps a block, fp32"
    report(rates(case, seconds, new, {"exact": 1.6}))
