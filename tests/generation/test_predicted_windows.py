"""Decoding of rows whose length was predicted: cropped windows, growing, ending, buckets, the probe as first step."""

import pytest
import torch
from generation.plain import growing, padded, prompts, randomise, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.generation.length import LengthPrediction, LengthPredictor
from fastdiff.generation.windows import PASS_OVERHEAD, buckets, default_predictor

EOS, MASK, ROOM = 2, 3, 16
ENDS = [EOS, *range(5, 15)]
# rows of each prompt length: what a predictor might say of it
BOUNDS = {3: 0, 5: 6, 4: 9, 6: 15, 2: 16}


class Told(LengthPredictor):
    """A predictor that knows the bound of a prompt by its number of tokens; its pass is a real one."""

    def __call__(self, input_ids, attention_mask=None, **encoder):
        prediction = super().__call__(input_ids, attention_mask, **encoder)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = real.sum(1).tolist()
        bounds = [BOUNDS[length] for length in lengths]
        return LengthPrediction(bounds, prediction.probe, prediction.passes, prediction.reading)


def auto(**options):
    options = dict(max_new_tokens=ROOM, length="auto", **options)
    return MaskedDiffusionGenerationConfig(**options)


def tiny_model(seed=7, **options):
    """A random model; a quarter of its tokens end a text, so that rows end at all places."""
    return randomise(tiny("llada", length_format="eos_fill", eos_token_id=ENDS, **options), seed)


@pytest.fixture
def model():
    return tiny_model()


@pytest.mark.parametrize("block_length", [None, 4, 8])
def test_each_row_is_as_the_plain_loop_decodes_it(block_length):
    ended = grown = 0
    for seed in range(6):
        model = tiny_model(seed)
        predictor = Told(model, window=ROOM)
        rows = prompts(seed, *BOUNDS)
        ids, mask = padded(rows, side="right" if seed % 2 else "left")
        output = generate(model, ids, mask, auto(block_length=block_length), length_predictor=predictor)
        growth, saved, extended = block_length or 8, 0, 0
        for row, sequence in zip(rows, output.sequences, strict=True):
            bound = BOUNDS[row.shape[1]]
            window = min(-(-(min(bound, ROOM - 1) + 1) // growth) * growth, ROOM)
            expected, final = growing(model, row, window, ROOM, block_length, ENDS, growth)
            assert sequence[-ROOM:].tolist() == expected.tolist()
            saved, extended = saved + ROOM - final, extended + (final > window)
        done = output.statistics
        assert (done.saved_tokens, done.extended_rows) == (saved, extended)
        assert done.window_tokens == ROOM * len(rows) and done.probe_passes == 1
        assert done.forward_passes > 1
        ended, grown = ended + saved, grown + extended
    assert ended and grown  # both happened


def test_a_row_is_the_same_alone_and_in_any_batch(model):
    predictor, rows = Told(model, window=ROOM), prompts(3, *BOUNDS)
    config = auto(block_length=4, temperature=1.0, seed=5)
    alone = [generate(model, row, None, config, length_predictor=predictor).sequences[0, -ROOM:] for row in rows]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 4]):
        ids, mask = padded([rows[i] for i in order])
        together = generate(model, ids, mask, config, length_predictor=predictor).sequences[:, -ROOM:]
        for i, sequence in zip(order, together, strict=True):
            assert torch.equal(sequence, alone[i])


def test_a_window_of_one_block_cuts_nothing(model):
    """Rows that never end fill all the room, whatever was predicted."""
    predictor = LengthPredictor(model, window=ROOM, rule="constant", parameter=0)
    ids, _ = padded(prompts(1, 4, 4))
    config = auto(block_length=4, suppress_tokens=ENDS)
    output = generate(model, ids, None, config, length_predictor=predictor)
    assert not torch.isin(output.sequences[:, 4:], torch.tensor(ENDS)).any() and not (output.sequences == MASK).any()
    assert output.statistics.saved_tokens == 0 and output.statistics.extended_rows == 2
    assert output.statistics.probe_passes == 0  # "constant" needs none


def test_a_predictor_of_its_own(model):
    """Without one, the rule cdf takes the model at its word."""
    ids, _ = padded(prompts(1, 4, 4))
    told = LengthPredictor(model, window=ROOM, coverage=0.6)
    output = generate(model, ids, None, auto(coverage=0.6))
    again = generate(model, ids, None, auto(coverage=0.6), length_predictor=told)
    assert torch.equal(output.sequences, again.sequences)
    for length_format, pad in (("eos_fill", set()), ("pad_fill", {0})):  # the generation config's end tokens
        model.config.length_format = length_format
        assert set(default_predictor(model, auto(eos_token_id=9)).end_token_ids) == {9} | pad
    assert default_predictor(model, MaskedDiffusionGenerationConfig()) is None


@pytest.mark.parametrize("options", [dict(prefix_cache=True), dict(dual_cache=True)])
def test_caches_that_are_refreshed_at_every_step_change_nothing(model, options):
    predictor, (ids, mask) = Told(model, window=ROOM), padded(prompts(3, *BOUNDS))
    plain = generate(model, ids, mask, auto(block_length=4), length_predictor=predictor)
    config = auto(block_length=4, cache_refresh_interval=1, **options)
    cached = generate(model, ids, mask, config, length_predictor=predictor)
    assert torch.equal(plain.sequences, cached.sequences)
    cached = generate(model, ids, mask, auto(block_length=4, **options), length_predictor=predictor)
    assert cached.statistics.short_passes and not (cached.sequences == MASK).any()


def test_guidance_masks_of_the_prompt_and_other_rules(model):
    predictor = Told(model, window=ROOM)
    rows = prompts(3, *BOUNDS)
    rows[1][0, 2] = MASK
    ids, mask = padded(rows)
    for options in (
        dict(guidance_scale=1.5),
        dict(unmasking_rule="threshold", threshold=0.05),
        dict(num_inference_steps=8),
        dict(unmasking_rule="ancestral", num_inference_steps=4, temperature=1.0),
        dict(stop_strings=["w17"], tokenizer=True),
    ):
        tokenizer = Words() if options.pop("tokenizer", False) else None
        config = auto(block_length=4, seed=1, **options)
        whole = generate(model, ids, mask, config, length_predictor=predictor, tokenizer=tokenizer)
        assert not (whole.sequences == MASK).any()
        one = generate(model, rows[1], None, config, length_predictor=predictor, tokenizer=tokenizer)
        assert torch.equal(one.sequences[0], whole.sequences[1, -ROOM - 5 :])


class Words:
    """Token 17 is the word w17."""

    def decode(self, tokens, **options):
        return " ".join(f"w{token}" for token in tokens)


def test_steps_are_a_share_of_those_of_the_whole(model):
    predictor = LengthPredictor(model, window=ROOM, rule="constant", parameter=7)
    config = auto(num_inference_steps=4, suppress_tokens=ENDS)
    done = generate(model, prompts(1, 4)[0], None, config, length_predictor=predictor).statistics
    assert done.forward_passes == 2 + 2  # of 8 tokens, and of 8 that they grew by


def test_the_probe_as_first_step(model):
    rows = prompts(3, *BOUNDS)
    ids, mask = padded(rows)
    predictor = LengthPredictor(model, window=ROOM, rule="cdf", parameter=0.999999)  # of the whole window
    plain = generate(model, ids, mask, auto(), length_predictor=predictor)
    reused = generate(model, ids, mask, auto(reuse_probe=True), length_predictor=predictor)
    assert plain.statistics.saved_tokens == 0
    assert torch.equal(plain.sequences, reused.sequences)  # nothing was cropped: the step is the probe
    assert reused.statistics.forward_passes < plain.statistics.forward_passes
    told = Told(model, window=ROOM)
    plain = generate(model, ids, mask, auto(block_length=4), length_predictor=told)
    reused = generate(model, ids, mask, auto(block_length=4, reuse_probe=True), length_predictor=told)
    assert not (reused.sequences == MASK).any()
    assert reused.statistics.forward_passes < plain.statistics.forward_passes
    rows[0][0, 1] = MASK  # decoded first: its bucket's first step is a pass
    ids, mask = padded(rows)
    assert not (generate(model, ids, mask, auto(reuse_probe=True), length_predictor=told).sequences == MASK).any()


def test_a_model_of_shifted_logits():
    model = randomise(tiny("gpt2", length_format="eos_only", eos_token_id=ENDS), 3)
    predictor, whole = Told(model, window=ROOM), 0
    for row in prompts(5, *BOUNDS):
        window = min(-(-(min(BOUNDS[row.shape[1]], ROOM - 1) + 1) // 4) * 4, ROOM)
        plain = generate(model, row, None, auto(block_length=4), length_predictor=predictor)
        expected, final = growing(model, row, window, ROOM, 4, ENDS, 4)
        assert plain.sequences[0, -ROOM:].tolist() == expected.tolist()
        assert plain.statistics.saved_tokens == ROOM - final
        if window == ROOM:  # nothing was cropped: the step is the probe
            reused = generate(model, row, None, auto(block_length=4, reuse_probe=True), length_predictor=predictor)
            assert torch.equal(plain.sequences, reused.sequences)
            whole += 1
    assert whole


def test_a_model_with_an_encoder():
    model = randomise(tiny("mdlm", num_encoder_layers=1, length_format="eos_fill"), 4)
    ids, mask = padded(prompts(2, 3, 6), side="right")
    start = torch.tensor([[1], [1]])
    inputs = dict(encoder_input_ids=ids, encoder_attention_mask=mask)
    predictor = LengthPredictor(model, window=ROOM, coverage=0.5)
    config = auto(block_length=4, coverage=0.5)
    both = generate(model, start, None, config, length_predictor=predictor, **inputs)
    for i, length in enumerate((3, 6)):
        own = dict(encoder_input_ids=ids[i : i + 1, :length])
        one = generate(model, start[:1], None, config, length_predictor=predictor, **own)
        assert torch.equal(one.sequences[0], both.sequences[i])


def test_the_streamer_sees_rows_of_one_length(model):
    ids, mask = padded(prompts(3, *BOUNDS))
    seen = []
    output = generate(model, ids, mask, auto(block_length=4), lambda tokens, step: seen.append((tokens, step)),
                      length_predictor=Told(model, window=ROOM))  # fmt: skip
    assert [step for _, step in seen] == list(range(len(seen)))
    assert all(tokens.shape == output.sequences.shape for tokens, _ in seen)
    assert torch.equal(seen[-1][0], output.sequences) and (seen[0][0] == MASK).any()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=9))
def test_buckets(rows):
    lengths, windows = [prompt + window for prompt, window in rows], [window for _, window in rows]

    def cost(cut):
        return sum(
            max(lengths[i] for i in part) * sum(windows[i] for i in part)
            + PASS_OVERHEAD * max(windows[i] for i in part)
            for part in cut
        )

    cut = buckets(lengths, windows)
    assert sorted(i for part in cut for i in part) == list(range(len(rows)))
    assert cost(cut) <= min(cost([list(range(len(rows)))]), cost([[i] for i in range(len(rows))]))


def test_buckets_part_long_rows_from_short_ones():
    assert buckets([20, 900, 24, 1000], [8, 850, 8, 950]) == [[0, 2], [1, 3]]
    assert buckets([20, 22], [8, 8]) == [[0, 1]]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(coverage=0.0), r"coverage: got 0.0; expected a number in \(0, 1\)"),
        (dict(coverage=1.0), r"coverage: got 1.0; expected a number in \(0, 1\)"),
        (dict(length="long"), "length: got 'long'; expected one of fixed, auto"),
        (dict(max_new_tokens=0), "length: got 'auto' with max_new_tokens = 0"),
        (dict(reuse_probe=True, length="fixed"), 'reuse_probe: got True with length="fixed"'),
        (dict(reuse_probe=True, dual_cache=True, block_length=4), "reuse_probe: got True with a cache"),
        (dict(reuse_probe=True, guidance_scale=2.0), "reuse_probe: got True with guidance"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionGenerationConfig(**{**dict(max_new_tokens=ROOM, length="auto"), **options})


def test_predictors_that_do_not_fit(model):
    ids, fixed = prompts(1, 4)[0], MaskedDiffusionGenerationConfig(max_new_tokens=ROOM)
    predictor = LengthPredictor(model, window=ROOM)
    with pytest.raises(ValueError, match='length_predictor: got one with length="fixed"'):
        generate(model, ids, None, fixed, length_predictor=predictor)
    with pytest.raises(ValueError, match="length_predictor: got one of coverage 0.95; expected this model's, of cov"):
        generate(model, ids, None, auto(coverage=0.9), length_predictor=predictor)
    with pytest.raises(ValueError, match="length_predictor: got one of another model"):
        generate(tiny_model(1), ids, None, auto(), length_predictor=predictor)
    with pytest.raises(ValueError, match="length_format: the model's config names none"):
        generate(randomise(tiny("llada"), 1), ids, None, auto())
    short = LengthPredictor(model, window=8, rule="constant")
    with pytest.raises(ValueError, match="reuse_probe: the predictor's pass does not cover the rows' windows"):
        generate(model, ids, None, auto(reuse_probe=True), length_predictor=short)
