"""Prefix and dual cache against a plain loop that puts stale keys and values back by hand, in float64."""

import pytest
import torch
from generation.plain import llada, padded, prompts, randomise, tiny, without_draws
from generation.plain_cache import cached

from fastdiff.generation import MaskedDiffusionGenerationConfig, generate

MASK, NEW = 3, 6
ARCHITECTURES = ("llada", "dream", "mdlm", "gpt2", "llama")
HEADS = (0.5, 1.5, 4.0)  # flat, sharp, peaked


def config(**options):
    return MaskedDiffusionGenerationConfig(**{**dict(max_new_tokens=NEW, block_length=3), **options})


def cache_options(cache, interval=None):
    return {f"{cache}_cache": True, "cache_refresh_interval": interval}


@pytest.fixture(scope="module")
def models():
    """Two blocks: keys and values of the first depend on the token alone."""
    return {name: tiny(name, num_hidden_layers=2) for name in ARCHITECTURES}


def model_and_rows(models, seed):
    """Rows of three lengths, one with a mask of its own at its beginning: it begins its blocks one step later."""
    model = randomise(models[ARCHITECTURES[seed % 5]], seed, HEADS[seed // 5 % 3])
    first, last = prompts(seed, 2 + seed % 3, 6)
    return model, [first, torch.tensor([[MASK, 9, 8, 7]]), last]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("interval", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tokens_are_those_of_a_plain_loop(models, monkeypatch, cache, interval, scale):
    """Rows that begin their blocks at different steps: whole passes of some beside short ones of others."""
    without_draws(monkeypatch)
    changed = 0
    for seed in range(20):
        model, rows = model_and_rows(models, seed)
        ids, mask = padded(rows, ("left", "right")[seed % 2])
        options = dict(num_inference_steps=4, guidance_scale=scale)
        ours = generate(model, ids, mask, config(**options, **cache_options(cache, interval)))
        assert 0 < ours.statistics.short_passes < ours.statistics.forward_passes
        for row, sequence, real in zip(rows, ours.sequences, mask.bool(), strict=True):
            plain, _ = cached(model, row, NEW, 3, cache, interval, steps=2, cfg_scale=scale - 1)
            new = torch.cat([sequence[: ids.shape[1]][real], sequence[ids.shape[1] :]])
            assert torch.equal(new, plain[0]), f"seed {seed}"
        changed += not torch.equal(ours.sequences, generate(model, ids, mask, config(**options)).sequences)
    assert changed > 3  # batches in which the cache, an approximation, gave another token


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_last_block_that_is_shorter(models, monkeypatch, cache):
    without_draws(monkeypatch)
    for seed in range(15):
        model, rows = model_and_rows(models, seed)
        ids, mask = padded(rows)
        options = config(block_length=4, num_inference_steps=4, **cache_options(cache))
        ours = generate(model, ids, mask, options)
        for row, sequence in zip(rows, ours.sequences, strict=True):
            plain, _ = cached(model, row, NEW, 4, cache, steps=2)
            assert torch.equal(sequence[-NEW:], plain[0, -NEW:]), f"seed {seed}"


@pytest.mark.parametrize(("cache", "scale"), [("prefix", 1.0), ("dual", 2.0)])
def test_rows_that_leave_within_the_blocks_of_others(models, monkeypatch, cache, scale):
    """By threshold rows begin blocks, and end, at steps of their own."""
    without_draws(monkeypatch)
    mixed = 0
    for seed in range(20):
        model, rows = model_and_rows(models, seed)
        ids, mask = padded(rows)
        calls, hidden_states = [], type(model).hidden_states

        def spy(self, ids, *args, calls=calls, hidden_states=hidden_states, **inputs):
            calls.append(inputs.get("cache_rows"))
            return hidden_states(self, ids, *args, **inputs)

        with monkeypatch.context() as patch:
            patch.setattr(type(model), "hidden_states", spy)
            options = dict(unmasking_rule="threshold", threshold=0.4, guidance_scale=scale)
            ours = generate(model, ids, mask, config(**options, **cache_options(cache, 3)))
        assert ours.statistics.forward_passes == len(calls)
        mixed += sum(rows is not None for rows in calls)
        for row, sequence in zip(rows, ours.sequences, strict=True):
            plain, _ = cached(model, row, NEW, 3, cache, 3, threshold=0.4, cfg_scale=scale - 1)
            assert torch.equal(sequence[-NEW:], plain[0, -NEW:]), f"seed {seed}"
    assert mixed > 20  # calls


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_refreshed_at_every_step_a_cache_is_exact(models, monkeypatch, cache):
    without_draws(monkeypatch)
    for seed in range(10):
        model, rows = model_and_rows(models, seed)
        ids, mask = padded(rows)
        for block in (3, NEW):
            exact = generate(model, ids, mask, config(block_length=block))
            ours = generate(model, ids, mask, config(block_length=block, **cache_options(cache, 1)))
            assert torch.equal(ours.sequences, exact.sequences) and ours.statistics.short_passes == 0


def test_a_model_that_gets_the_time_and_attends_to_an_encoder():
    options = dict(num_hidden_layers=2, timestep_embedding=True, cross_attention_dim=5)
    model = randomise(tiny("mdlm", **options), 3)
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        rows = prompts(seed, 3, 5)
        states = torch.randn(2, 4, 5, dtype=torch.float64, generator=generator)
        for cache, scale in (("prefix", 1.0), ("dual", 2.0)):
            settings = config(guidance_scale=scale, **cache_options(cache))
            ours = generate(model, *padded(rows), settings, encoder_hidden_states=states)
            for row, condition, sequence in zip(rows, states, ours.sequences, strict=True):
                given = dict(encoder_hidden_states=condition[None], told_time=True, cfg_scale=scale - 1)
                assert torch.equal(sequence[-NEW:], cached(model, row, NEW, 3, cache, **given)[0][0, -NEW:])


def test_a_short_pass_sees_the_columns_that_it_computes(models, monkeypatch):
    """Widths of the model's input: whole, then from the block to the end, or the block; one more where logits shift."""
    widths, hidden_states = [], type(models["llada"]).hidden_states

    def spy(self, ids, *args, **inputs):
        widths.append(ids.shape[1])
        return hidden_states(self, ids, *args, **inputs)

    monkeypatch.setattr(type(models["llada"]), "hidden_states", spy)
    (row,) = prompts(0, 4)
    expected = {
        ("llada", "prefix"): [10, 6, 6, 10, 3, 3],
        ("llada", "dual"): [10, 3, 3, 10, 3, 3],
        ("dream", "prefix"): [10, 7, 7, 10, 4, 4],
        ("dream", "dual"): [10, 4, 4, 10, 4, 4],
    }
    for (name, cache), columns in expected.items():
        widths.clear()
        generate(randomise(models[name], 0), row, None, config(**cache_options(cache)))
        assert widths == columns


def test_caches_work_with_the_path_of_a_gpu(models, monkeypatch):
    from fastdiff.generation import decoding, passes

    model, rows = model_and_rows(models, 1)
    options = config(**cache_options("dual"), guidance_scale=2.0, temperature=0.5, seed=1)
    expected = generate(model, *padded(rows), options)
    for module in (decoding, passes):
        monkeypatch.setattr(module, "on_cpu", lambda device: False)
    assert torch.equal(generate(model, *padded(rows), options).sequences, expected.sequences)


def test_one_block_of_model_makes_the_caches_exact(models):
    """With one transformer block keys and values depend on the token alone, and tokens outside the block stay."""
    model, (row,) = randomise(tiny("llada"), 0), prompts(0, 4)
    for cache in ("prefix", "dual"):
        ours = generate(model, row, None, config(**cache_options(cache)))
        assert torch.equal(ours.sequences, llada(model, row, NEW, NEW, 3))
