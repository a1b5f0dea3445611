"""Decoding against plain loops of Dream, dllm, LLaDA and MDLM: token for token without draws, else in distribution."""

import math
from collections import Counter

import pytest
import torch
from generation.plain import (
    dllm,
    dllm_counts,
    dream,
    llada,
    mdlm,
    padded,
    prompts,
    randomise,
    tiny,
    transfer_counts,
    without,
    without_draws,
)  # fmt: skip

from fastdiff.generation import MaskedDiffusionGenerationConfig, generate

NEW, MASK, EOS = 6, 3, 2
RATES = {
    "linear": lambda t: t,
    "cosine": lambda t: 1 - math.cos(math.pi * t / 2),
    "maskgit_cosine": lambda t: math.cos(math.pi / 2 * (1 - t)),
}


def config(**options):
    return MaskedDiffusionGenerationConfig(**{**dict(max_new_tokens=NEW), **options})


@pytest.fixture(scope="module")
def models():
    return tiny("llada"), tiny("dream"), tiny("mdlm")


def scaled(models, seed):
    return randomise(models[seed % 3], seed, head_scale=(0.3, 1.0, 3.0)[seed // 3 % 3])


def same_as(models, plain, seeds=12, new=NEW, **options):
    """Two prompts of different lengths in a batch are what `plain(model, row)` [1, P + new] is."""
    for seed in range(seeds):
        model, rows = scaled(models, seed), prompts(seed, 2 + seed % 3, 5)
        ids, mask = padded(rows, ("left", "right")[seed % 2])
        ours = generate(model, ids, mask, config(max_new_tokens=new, **options))
        for row, sequence in zip(rows, ours.sequences, strict=True):
            assert torch.equal(sequence[ids.shape[1] :], plain(model, row)[0, row.shape[1] :]), f"seed {seed}"


# ------------------------------------------------------------------------------------------------ dllm, LLaDA
@pytest.mark.parametrize("schedule", ["even", *RATES])
@pytest.mark.parametrize(("new", "block", "steps"), [(6, 4, 3), (7, 4, 7), (5, 8, 3), (6, 6, 4), (5, 2, 20)])
def test_blocks_and_steps_that_do_not_divide(models, monkeypatch, schedule, new, block, steps):
    """The last block is shorter, each gets steps / blocks, rounded up; a longer block is shrunk."""
    without_draws(monkeypatch)
    counts = transfer_counts if schedule == "even" else dllm_counts(RATES[schedule])
    options = dict(block_length=block, num_inference_steps=steps, unmasking_schedule=schedule)
    plain = lambda model, row: dllm(model, row, steps, new, min(block, new), counts)  # noqa: E731
    same_as(models, plain, seeds=3, new=new, **options)


def test_the_plain_loops_agree_where_llada_takes_the_blocks(models):
    for seed in range(6):
        model, (row,) = scaled(models, seed), prompts(seed, 3)
        assert torch.equal(dllm(model, row, 4, NEW, 3, transfer_counts), llada(model, row, 4, NEW, 3))


def test_tokens_of_the_prompt_that_guidance_keeps(models, monkeypatch):
    without_draws(monkeypatch)
    kept, changed = (7, 11, 12, 20, 23, 30, 33, 38), 0
    plain = lambda model, row: dllm(model, row, 3, NEW, NEW, transfer_counts, 1.5, kept)  # noqa: E731
    options = dict(guidance_scale=2.5, num_inference_steps=3)
    same_as(models, plain, cfg_keep_tokens=kept, **options)
    for seed in range(18):
        model, (row,) = scaled(models, seed), prompts(seed, 5)
        both = [generate(model, row, None, config(cfg_keep_tokens=keep, **options)).sequences for keep in (None, kept)]
        changed += not torch.equal(*both)
    assert changed > 3


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_ids_that_come_last_and_ids_that_never_come(models, monkeypatch, scale):
    """LLaDA's confidence_eos_eot_inf and logits_eos_inf at temperature 0; dllm's begin_suppress_tokens."""
    without_draws(monkeypatch)
    late, never = tuple(range(4, 40, 2)), (5, 9)
    plain = lambda model, row: dllm(model, row, 4, NEW, 4, transfer_counts, scale - 1, (), never, late)  # noqa: E731
    options = dict(block_length=4, num_inference_steps=4, guidance_scale=scale, suppress_tokens=list(never))
    same_as(models, plain, begin_suppress_tokens=list(late), **options)


# ------------------------------------------------------------------------------------------------ Dream
ORDERS = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


@pytest.mark.parametrize("alg", ORDERS)
@pytest.mark.parametrize(
    ("filters", "eps"), [({}, 1e-3), (dict(top_p=0.6), 1e-3), (dict(top_k=3), 0.05), (dict(top_p=0.9), 0.2)]
)
def test_dreams_tokens_at_temperature_0(models, monkeypatch, alg, filters, eps):
    without_draws(monkeypatch)
    everything = dict(top_p=None, top_k=None) | filters
    for steps in (3, 9):
        plain = lambda model, row: dream(model, row, steps, NEW, alg, None, eps, **everything)[0]  # noqa: B023, E731
        same_as(models, plain, 6, num_inference_steps=steps, unmasking_schedule="dream", eps=eps,
                unmasking_order=ORDERS[alg], score_distribution="sampling", **filters)  # fmt: skip


def small(head_scale=1.0, seed=1):
    """Four tokens beside the mask."""
    model = tiny("dream", vocab_size=5, max_position_embeddings=8, bos_token_id=0, eos_token_id=EOS, pad_token_id=1)
    return randomise(model, seed, head_scale).float()


def ours(model, rows, new, **options):
    """(tokens, steps at which they were committed) of `rows` [B, P], each [B, new]."""
    when = torch.full((len(rows), new), -1)

    def streamer(tokens, step):
        chosen = (tokens[:, -new:] != MASK) & (when < 0)
        when[chosen] = step

    settings = config(max_new_tokens=new, seed=11, **options)
    return generate(model, rows, None, settings, streamer).sequences[:, -new:], when


def distance(first, second):
    """(total variation between two samples' shares, what two samples of one distribution stay below but for 1e-6)."""
    counts = [Counter(map(tuple, each.tolist())) for each in (first, second)]
    cells, n = counts[0].keys() | counts[1].keys(), len(first)
    assert len(second) == n
    variation = sum(abs(counts[0][cell] - counts[1][cell]) for cell in cells) / (2 * n)
    expected = sum(math.sqrt((counts[0][cell] + counts[1][cell]) / (2 * n)) for cell in cells) / math.sqrt(math.pi * n)
    return variation, expected + math.sqrt(math.log(1e6) / n)  # McDiarmid: one draw moves it by 1 / n


def ranks(when):
    """Steps as ranks: what was committed first, second, … in each row."""
    return torch.stack([row.unique(return_inverse=True)[1] for row in when])


@pytest.mark.parametrize("alg", ORDERS)
def test_dreams_draws_of_positions_and_tokens(alg):
    """alg_temp and temperature above 0, with top_p: tokens and the order in which they are committed."""
    model, n, steps = small(), 1000, 7
    rows = torch.tensor([[0, 4]]).repeat(n, 1)
    filters = dict(top_p=0.8)
    plain, when = dream(model, rows, steps, 4, alg, torch.Generator().manual_seed(1), temperature=0.7, alg_temp=0.2,
                        top_k=None, **filters)  # fmt: skip
    common = dict(unmasking_schedule="dream", num_inference_steps=steps, unmasking_order=ORDERS[alg],
                  score_distribution="sampling", temperature=0.7, **filters)  # fmt: skip
    tokens, steps_taken = ours(model, rows, 4, alg_temp=0.2, **common)
    for mine, theirs in ((tokens, plain[:, 2:]), (ranks(steps_taken), ranks(when))):
        variation, bound = distance(mine, theirs)
        assert variation < bound
    best = ours(model, rows, 4, **common)[1]
    variation, bound = distance(ranks(best), ranks(when))
    assert variation > bound, "alg_temp changes the order"


def test_dreams_origin_is_ancestral():
    model, n, steps = small(), 1000, 5
    rows = torch.tensor([[0, 4]]).repeat(n, 1)
    plain, when = dream(model, rows, steps, 3, "origin", torch.Generator().manual_seed(1), temperature=1.0, eps=0.3,
                        top_p=None, top_k=None)  # fmt: skip
    options = dict(unmasking_rule="ancestral", unmasking_schedule="dream", temperature=1.0, eps=0.3)
    tokens, steps_taken = ours(model, rows, 3, num_inference_steps=steps, **options)
    for mine, theirs in ((tokens, plain[:, 2:]), (ranks(steps_taken), ranks(when))):
        variation, bound = distance(mine, theirs)
        assert variation < bound


# ------------------------------------------------------------------------------------------------ MDLM
def two_tokens(model, row, same_step):
    """P(a, b) of two masks that are drawn together with probability `same_step`, else in either order alike."""
    mask_id, probability = MASK, torch.zeros(5, 5, dtype=torch.float64)
    with torch.no_grad():
        predict = lambda a, b: without(model(torch.cat([row, torch.tensor([[a, b]])], 1)).logits, {mask_id})  # noqa: E731
        p = predict(mask_id, mask_id)[0, -2:].double().softmax(-1)
        probability += same_step * p[0, :, None] * p[1]
        for token in (0, 1, 2, 4):
            after = predict(token, mask_id)[0, -1].double().softmax(-1)
            probability[token] += (1 - same_step) / 2 * p[0, token] * after
            before = predict(mask_id, token)[0, -2].double().softmax(-1)
            probability[:, token] += (1 - same_step) / 2 * p[1, token] * before
    return probability


def variation_from(tokens, exact):
    """(total variation of a sample from P, what it stays below but for 1e-6)."""
    n, counts = len(tokens), torch.zeros_like(exact)
    counts.index_put_(tuple(tokens.T), torch.ones(n, dtype=exact.dtype), accumulate=True)
    expected = float(exact.sqrt().sum()) / math.sqrt(2 * math.pi * n)
    return float((counts / n - exact).abs().sum() / 2), expected + math.sqrt(math.log(1e6) / (2 * n))


@pytest.mark.parametrize("steps", [8, 32])
def test_ancestral_steps_are_those_of_mdlm(steps):
    model, n = small(), 8000
    row = torch.tensor([[0, 4]])
    rows = row.repeat(n, 1)
    exact = two_tokens(model, row, same_step=1 / steps)  # in each of S steps both with probability 1 / S²
    wrong = two_tokens(model, row, same_step=1.0)
    tokens, when = ours(model, rows, 2, unmasking_rule="ancestral", num_inference_steps=steps, temperature=1.0)
    plain = mdlm(model, rows, steps, 2, torch.Generator().manual_seed(2))[:, 2:]
    for sample in (tokens, plain):
        variation, bound = variation_from(sample, exact)
        assert variation < bound < variation_from(sample, wrong)[0]
    first, last = (when[:, 0] < when[:, 1]).sum().item(), (when[:, 0] > when[:, 1]).sum().item()
    together = n - first - last
    assert abs(first - last) < 5 * math.sqrt(n)
    assert abs(together - n / steps) < 5 * math.sqrt(n / steps)


def test_a_step_in_which_chance_commits_nothing_needs_no_pass():
    options = dict(unmasking_rule="ancestral", num_inference_steps=500, temperature=1.0, max_new_tokens=4, seed=2)
    output = generate(small(), torch.tensor([[0, 4]]).repeat(40, 1), None, config(**options))
    assert output.statistics.forward_passes == 4  # 40 rows of 4 tokens, each by itself in 500 steps but for 1 row in 80
    told = tiny("mdlm", timestep_embedding=True)
    assert generate(randomise(told, 1), prompts(1, 3)[0], None, config(**options)).statistics.forward_passes <= 4


@pytest.mark.parametrize("schedule", ["cosine", "maskgit_cosine"])
def test_ancestral_on_other_schedules(schedule):
    """Positions are still masked after each of 4 steps with probability r(t)."""
    model, n, steps = small(), 6000, 4
    rows, masked = torch.tensor([[0, 4]]).repeat(n, 1), []
    from fastdiff.generation.schedule import chance_steps

    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    chosen = chance_steps(uniform, steps, schedule, 0.0)
    for step in range(steps):
        rate = RATES[schedule](1 - (step + 1) / steps)
        masked.append(int((chosen > step).sum()))
        assert abs(masked[-1] - n * rate) < 5 * math.sqrt(n / 4)
    options = dict(unmasking_rule="ancestral", unmasking_schedule=schedule, num_inference_steps=steps, temperature=1.0)
    same_step = sum((RATES[schedule](1 - i / 4) - RATES[schedule](1 - (i + 1) / 4)) ** 2 for i in range(steps))
    tokens, when = ours(model, rows, 2, **options)
    assert abs(int((when[:, 0] == when[:, 1]).sum()) - n * same_step) < 5 * math.sqrt(n / 4)
    variation, bound = variation_from(tokens, two_tokens(model, rows[:1], same_step))
    assert variation < bound


# ------------------------------------------------------------------------------------------------ EoS last
@torch.no_grad()
def late_draws(model, rows, new, late, generator):
    """dllm's loop at temperature 1, one token a step: drawn from all ids, ranked by what is left without `late`."""
    x = torch.cat([rows, torch.full((len(rows), new), MASK)], dim=1)
    when = torch.full_like(x, -1)
    for step in range(new):
        logits = without(model(x).logits, {MASK})
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(x.shape)
        score = without(logits, late).softmax(-1).gather(-1, drawn[..., None])[..., 0]
        place = score.masked_fill(x != MASK, -1).argmax(1, keepdim=True)
        x.scatter_(1, place, drawn.gather(1, place))
        when.scatter_(1, place, step)
    return x[:, -new:], when[:, -new:]


def test_ids_that_come_last_at_a_temperature():
    model, n = small(), 2500
    rows = torch.tensor([[0, 4]]).repeat(n, 1)
    plain = late_draws(model, rows, 3, {EOS}, torch.Generator().manual_seed(1))
    mine = ours(model, rows, 3, temperature=1.0, begin_suppress_tokens=[EOS])
    ordinary = ours(model, rows, 3, temperature=1.0)
    joined = [torch.cat([tokens, when], 1) for tokens, when in (plain, mine, ordinary)]
    variation, bound = distance(joined[0], joined[1])
    assert variation < bound
    variation, bound = distance(joined[0], joined[2])
    assert variation > bound
    firsts = [int((tokens.gather(1, when.argmin(1, keepdim=True)) == EOS).sum())
              for tokens, when in (mine, ordinary)]  # fmt: skip
    assert firsts[0] < firsts[1] / 2
