"""Rows that leave the batch: full ones, those that hold a stop string, and those that attend to conditions."""

import pytest
import tokenizers
import torch
from generation.plain import llada, padded, parallel, prompts, randomise, tiny
from transformers import PreTrainedTokenizerFast

from fastdiff.generation import MaskedDiffusionGenerationConfig, generate
from fastdiff.nn import head

MASK, EOS, NEW = 3, 2, 8


def config(**options):
    return MaskedDiffusionGenerationConfig(**{**dict(max_new_tokens=NEW, block_length=4), **options})


@pytest.fixture(scope="module")
def tokenizer():
    """Token 17 is the word w17."""
    vocab = {f"w{i}": i for i in range(41)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=model)


@pytest.fixture
def model():
    return randomise(tiny("llada"), 7)


def spied(monkeypatch, model):
    """Shapes of the model's input at each pass, and the rows that the head saw."""
    shapes, heads = [], []
    hidden_states, sample = type(model).hidden_states, head.lm_head_sample

    def spy(self, ids, *args, **inputs):
        shapes.append(tuple(ids.shape))
        return hidden_states(self, ids, *args, **inputs)

    def counted(states, *args, **options):
        heads.append(len(states))
        return sample(states, *args, **options)

    monkeypatch.setattr(type(model), "hidden_states", spy)
    monkeypatch.setattr(head, "lm_head_sample", counted)
    return shapes, heads


def test_full_rows_leave_the_model_the_head_and_the_sampler(model, monkeypatch):
    """The longest row has no masks of its own: it is done first, and the batch becomes narrower."""
    rows = [torch.tensor([[9, MASK, 8, MASK]]), *prompts(3, 6, 4), torch.tensor([[MASK, MASK, MASK, 5, 7]])]
    ids, mask = padded(rows)
    alone = [generate(model, row, None, config()).sequences[0] for row in rows]
    shapes, heads = spied(monkeypatch, model)
    seen = []
    together = generate(model, ids, mask, config(), lambda tokens, step: seen.append(tokens))
    assert shapes == [(4, 14)] * 8 + [(2, 13)] * 2 + [(1, 13)]
    assert heads[:2] == [2 + 4 + 4 + 3, 1 + 3 + 3 + 2] and heads[-3:] == [2 + 3, 1 + 2, 1]
    for row, sequence, expected in zip(rows, together.sequences, alone, strict=True):
        assert torch.equal(sequence[-NEW - row.shape[1] :], expected)
    assert torch.equal(seen[-1], together.sequences) and (seen[7][[1, 2]] == together.sequences[[1, 2]]).all()
    assert together.statistics.tokens == 4 * NEW + 2 + 3 and together.statistics.forward_passes == 11


def test_rows_of_a_parallel_rule_leave_when_they_are_full(monkeypatch):
    fewer = 0
    for seed in range(10):
        model, rows = randomise(tiny("mdlm"), seed, 3.0), prompts(seed, 2, 5, 3)
        steps = [parallel(model, row, NEW, 4, "threshold", 0.6)[1] for row in rows]
        shapes, _ = spied(monkeypatch, model)
        out = generate(model, *padded(rows), config(unmasking_rule="threshold", threshold=0.6))
        monkeypatch.undo()
        assert [batch for batch, _ in shapes] == [sum(n > step for n in steps) for step in range(max(steps))]
        assert out.statistics.tokens == 3 * NEW
        fewer += len(set(steps)) > 1
    assert fewer > 2


def test_a_stop_string_ends_a_row(tokenizer):
    ended = 0
    for seed in range(6):
        model, rows = randomise(tiny("dream"), seed), prompts(seed, 3, 5)
        rows.append(torch.tensor([[9, MASK, 8]]))
        plain = [generate(model, row, None, config()).sequences[0, row.shape[1] :].tolist() for row in rows]
        wanted = tokenizer.decode(plain[0][3:5])  # its words lie in two blocks
        strings = ["no such word", wanted] if seed % 2 else wanted
        options = config(stop_strings=strings, eos_token_id=[EOS, 7])
        together = generate(model, *padded(rows), options, tokenizer=tokenizer)
        expected = []
        for tokens in plain:
            found = [n for n in range(1, NEW + 1) if wanted in tokenizer.decode(tokens[:n])]
            if found:
                ended += 1
                tokens = tokens[: found[0]] + [EOS] * (NEW - found[0])
            expected.append(tokens)
        assert together.sequences[:, -NEW:].tolist() == expected, f"seed {seed}"
        for row, tokens in zip(rows, expected, strict=True):
            assert generate(model, row, None, options, tokenizer=tokenizer).sequences[0, -NEW:].tolist() == tokens
    assert ended >= 6


def test_what_fills_an_ended_row_is_not_counted_and_costs_no_pass(model, tokenizer, monkeypatch):
    """The first row ends in its first block and leaves; the pad token fills where there is no end token."""
    rows = prompts(5, 3, 6)
    plain = generate(model, rows[0], None, config()).sequences[0, 3:]
    other = generate(model, rows[1], None, config())
    model.config.eos_token_id = None
    shapes, _ = spied(monkeypatch, model)
    options = config(stop_strings=tokenizer.decode(plain[:2]), suppress_tokens=[0])
    out = generate(model, *padded(rows), options, tokenizer=tokenizer)
    assert torch.equal(out.sequences[0, 6:8], plain[:2]) and (out.sequences[0, 8:] == 0).all()
    assert shapes == [(2, 14)] * 4 + [(1, 14)] * 4 and out.statistics.tokens == NEW + 4
    assert torch.equal(out.sequences[1], other.sequences[0])


def test_stop_strings_need_a_tokenizer_and_a_token_to_fill_with(model, tokenizer):
    (row,) = prompts(0, 3)
    with pytest.raises(ValueError, match="stop_strings: .*; pass tokenizer= too"):
        generate(model, row, None, config(stop_strings=["w5"]))
    model.config.eos_token_id = model.config.pad_token_id = None
    with pytest.raises(ValueError, match="stop_strings: no eos_token_id or pad_token_id"):
        generate(model, row, None, config(stop_strings=["w5"]), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def conditional():
    return randomise(tiny("mdlm", num_hidden_layers=2, num_encoder_layers=1), 3)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_every_pass_attends_to_the_encoder(conditional, scale):
    """Conditions of different lengths, hidden from the unconditional half; rows with masks of their own stay longer."""
    changed = 0
    for seed in range(8):
        rows, conditions = prompts(seed, 4, 2), prompts(seed + 50, 3, 5)
        texts, seen = padded(conditions, ("left", "right")[seed % 2])
        ids, mask = padded([torch.cat([rows[0], torch.tensor([[MASK, 5]])], 1), *rows])
        given = dict(encoder_input_ids=texts[[0, 0, 1]], encoder_attention_mask=seen[[0, 0, 1]])
        with torch.no_grad():
            plain_states = [conditional.encode(condition) for condition in conditions]
        options = config(guidance_scale=scale, num_inference_steps=4)
        ours = generate(conditional, ids, mask, options, **given).sequences
        states = torch.zeros(3, 5, 16, dtype=torch.float64)
        for i, condition in enumerate((0, 0, 1)):
            states[i, given["encoder_attention_mask"][i].bool()] = plain_states[condition]
        given = dict(encoder_hidden_states=states, encoder_attention_mask=given["encoder_attention_mask"])
        assert torch.equal(generate(conditional, ids, mask, options, **given).sequences, ours)
        for row, condition, sequence in zip(rows, plain_states, ours[1:], strict=True):
            plain = llada(conditional, row, 4, NEW, 4, scale - 1, condition)
            assert torch.equal(sequence[-NEW:], plain[0, -NEW:]), f"seed {seed}"
            changed += not torch.equal(plain, llada(conditional, row, 4, NEW, 4, scale - 1))
    assert changed > 8


def test_a_prompt_with_several_conditions_gives_the_same_in_any_order(conditional):
    """One prompt, drawn at random: random numbers belong to the prompt and its condition."""
    (row,), conditions = prompts(0, 2), prompts(1, 4, 2, 3)
    texts, seen = padded(conditions)
    options = config(temperature=1.0, seed=3, dual_cache=True)

    def decode(order):
        given = dict(encoder_input_ids=texts[order], encoder_attention_mask=seen[order])
        return generate(conditional, row.repeat(len(order), 1), None, options, **given).sequences

    together = decode([0, 1, 2])
    assert len({tuple(tokens) for tokens in together.tolist()}) == 3
    assert torch.equal(decode([2, 0, 1]), together[[2, 0, 1]])
    for i, condition in enumerate(conditions):
        alone = generate(conditional, row, None, options, encoder_input_ids=condition).sequences[0]
        assert torch.equal(alone, together[i])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (dict(encoder_attention_mask=torch.ones(1, 4)), ValueError, "got one without encoder_input_ids"),
        (dict(encoder_input_ids=torch.ones(2, 4).long()), ValueError, r"encoder_input_ids: got shape \[2, 4\]"),
        (dict(encoder_input_ids=torch.ones(1, 0).long()), ValueError, r"got shape \[1, 0\]; expected .* not empty"),
        (dict(encoder_input_ids=torch.ones(1, 4)), TypeError, r"encoder_input_ids: got torch.float32"),
        (
            dict(encoder_input_ids=torch.ones(1, 4).long(), encoder_attention_mask=torch.ones(1, 3).long()),
            ValueError,
            r"encoder_attention_mask: got shape \[1, 3\]",
        ),
        (
            dict(encoder_input_ids=torch.ones(1, 4).long(), encoder_hidden_states=torch.ones(1, 4, 16)),
            ValueError,
            "encoder_input_ids: got encoder_hidden_states too; pass one",
        ),
    ],
)
def test_conditions_that_do_not_fit(conditional, given, error, message):
    with pytest.raises(error, match=message) as caught:
        generate(conditional, prompts(0, 3)[0], None, config(), **given)
    assert "\n" not in str(caught.value)


def test_a_model_that_takes_no_condition(model):
    (row,) = prompts(0, 3)
    with pytest.raises(ValueError, match="encoder_input_ids: this model has no cross-attention"):
        generate(model, row, None, config(), encoder_input_ids=row)
    outside = randomise(tiny("mdlm", cross_attention_dim=5), 0)
    with pytest.raises(ValueError, match="encoder_input_ids: this model has no encoder of its own"):
        generate(outside, row, None, config(), encoder_input_ids=row)
