"""Decoding against the published loops, token for token, in float64 on random tiny models."""

import pytest
import torch
from generation.plain import llada, padded, parallel, prompts, randomise, tiny, transfer_counts, without_draws

from fastdiff.generation import MaskedDiffusionGenerationConfig, generate

SEEDS = 200
NEW = 6


def config(**options):
    return MaskedDiffusionGenerationConfig(**{**dict(max_new_tokens=NEW), **options})


@pytest.fixture(scope="module")
def models():
    return tiny("llada"), tiny("dream"), tiny("mdlm")


def scaled(models, seed):
    """Flat, sharp and peaked heads; with and without logit shift, learned and rotary positions."""
    return randomise(models[seed % 3], seed, head_scale=(0.3, 1.0, 3.0, 6.0)[seed // 3 % 4])


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(("block_length", "steps"), [(6, 4), (3, 4), (2, 6)])
def test_tokens_are_those_of_the_published_loop(models, monkeypatch, block_length, steps, scale):
    """200 seeds, two in a batch: prompts of several lengths; 6 tokens in 4 steps or 3 in 2 are uneven counts."""
    without_draws(monkeypatch)
    for seed in range(0, SEEDS, 2):
        model = scaled(models, seed // 2)
        rows = prompts(seed, 2 + seed % 3, 5) + prompts(seed + 1, 1 + seed % 4, 4)
        ids, mask = padded(rows, ("left", "right")[seed // 2 % 2])
        options = config(block_length=block_length, num_inference_steps=steps, guidance_scale=scale)
        ours = generate(model, ids, mask, options)
        assert ours.statistics.forward_passes == steps and ours.statistics.tokens == 4 * NEW
        assert torch.equal(ours.sequences[:, : ids.shape[1]], ids)
        for row, sequence in zip(rows, ours.sequences, strict=True):
            plain = llada(model, row, steps, NEW, block_length, scale - 1)
            assert torch.equal(sequence[ids.shape[1] :], plain[0, row.shape[1] :]), f"seeds {seed}, {seed + 1}"


def test_more_steps_than_tokens_change_nothing(models):
    """Steps that commit nothing are left out."""
    for seed in range(10):
        model, (row,) = scaled(models, seed), prompts(seed, 3)
        ours = generate(model, row, None, config(block_length=2, num_inference_steps=12))
        assert torch.equal(ours.sequences, llada(model, row, 12, NEW, 2))
        assert ours.statistics.forward_passes == NEW
    assert transfer_counts(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("block", [3, 4])
@pytest.mark.parametrize(
    ("rule", "number"), [("threshold", 0.7), ("threshold", 0.2), ("factor", 0.8), ("entropy_budget", 0.4)]
)
def test_parallel_rules_are_those_of_plain_loops(models, monkeypatch, rule, number, block):
    """Blocks of 4 leave a last one of 2."""
    without_draws(monkeypatch)
    saved = 0
    for seed in range(40):
        model, rows = scaled(models, seed), prompts(seed, 2, 4)
        ids, mask = padded(rows)
        ours = generate(model, ids, mask, config(block_length=block, unmasking_rule=rule, **{rule: number}))
        steps = []
        for row, sequence in zip(rows, ours.sequences, strict=True):
            plain, taken = parallel(model, row, NEW, block, rule, number)
            assert torch.equal(sequence[4:], plain[0, row.shape[1] :]), f"seed {seed}"
            steps.append(taken)
        assert ours.statistics.forward_passes == max(steps)  # a row goes on when another one's block is not full
        saved += NEW - max(steps)
    assert saved > 13  # steps: the rules did commit in parallel


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0, num_inference_steps=3),
        dict(temperature=0.8, top_k=5, block_length=3),
        dict(temperature=1.0, top_p=0.9, guidance_scale=2.0, block_length=2),
        dict(unmasking_order="random", num_inference_steps=4, block_length=3),
        dict(unmasking_order="entropy", temperature=0.5, num_inference_steps=3),
        dict(unmasking_order="margin", unmasking_rule="threshold", threshold=0.6, temperature=1.0, block_length=3),
        dict(unmasking_rule="ancestral", num_inference_steps=4, block_length=3, temperature=1.0),
        dict(temperature=1.0, dual_cache=True, block_length=4),
        dict(unmasking_rule="ancestral", unmasking_schedule="maskgit_cosine", temperature=1.0, prefix_cache=True),
        dict(
            unmasking_schedule="dream",
            unmasking_order="entropy",
            score_distribution="sampling",
            alg_temp=0.3,
            top_p=0.9,
            temperature=0.7,
            num_inference_steps=4,
            block_length=4,
        ),
        dict(
            begin_suppress_tokens=list(range(20, 41)),
            temperature=1.0,
            guidance_scale=2.0,
            cfg_keep_tokens=[7, 9],
            block_length=4,
            num_inference_steps=5,
            unmasking_schedule="cosine",
        ),
        dict(unmasking_rule="threshold", temperature=0.5, prefix_cache=True, cache_refresh_interval=2, block_length=3),
    ],
)
def test_a_prompt_gives_the_same_alone_in_a_batch_and_in_another_order(models, options):
    for seed in range(8):
        model, rows = scaled(models, seed), prompts(seed, 4, 1, 6, 3)
        rows[1] = torch.tensor([[3, 9, 3]])  # with masks of its own, filled first
        options = {**options, "seed": seed}
        together = generate(model, *padded(rows), config(**options)).sequences[:, -NEW:]
        order = [2, 0, 3, 1]
        shuffled = generate(model, *padded([rows[i] for i in order], "right"), config(**options)).sequences[:, -NEW:]
        assert torch.equal(together[order], shuffled)
        for i, row in enumerate(rows):
            assert torch.equal(generate(model, row, None, config(**options)).sequences[0, -NEW:], together[i])


def test_seeds_and_copies_of_a_prompt_draw_differently(models):
    model, (row,) = randomise(models[0], 0, 0.3), prompts(0, 3)
    options = dict(temperature=1.0)
    batch = generate(model, row.repeat(4, 1), None, config(seed=1, **options)).sequences
    assert len({tuple(r) for r in batch.tolist()}) == 4
    assert torch.equal(generate(model, row, None, config(seed=1, **options)).sequences[0], batch[0])
    assert not torch.equal(generate(model, row, None, config(seed=2, **options)).sequences[0], batch[0])
    torch.manual_seed(5)
    first = generate(model, row, None, config(**options)).sequences
    torch.manual_seed(5)
    assert torch.equal(generate(model, row, None, config(**options)).sequences, first)
    assert not torch.equal(generate(model, row, None, config(**options)).sequences, first)
