"""`generate` beside the exact tests: infilling, guidance, streaming, early stop, other models, and bad input."""

import math
import re
from pathlib import Path

import pytest
import torch
from generation.plain import llada, padded, prompts, randomise, tiny
from torch.nn import functional

from fastdiff.generation import MaskedDiffusionGenerationConfig, decoding, generate, passes

MASK, EOS = 3, 2


def config(**options):
    return MaskedDiffusionGenerationConfig(**{**dict(max_new_tokens=4), **options})


@pytest.fixture
def model():
    return randomise(tiny("llada"), 7)


def test_infilling_alone_is_the_published_loop_on_one_block(model):
    """Masks after a prefix are what LLaDA's loop decodes; then masks between given tokens stay bound to them."""
    (row,) = prompts(0, 4)
    masks = torch.full((1, 4), MASK)
    filled = generate(model, torch.cat([row, masks], 1), None, config(max_new_tokens=0, num_inference_steps=2))
    assert torch.equal(filled.sequences, llada(model, row, 2, 4, 4))
    assert filled.statistics.forward_passes == 2 and filled.statistics.tokens == 4

    between = torch.tensor([[9, MASK, 8, MASK, MASK, 7]])
    middle = generate(model, between, None, config(max_new_tokens=0))
    kept = between != MASK
    assert torch.equal(middle.sequences[kept], between[kept]) and not (middle.sequences == MASK).any()
    expected = between.clone()
    while (expected == MASK).any():
        logits = model(expected).logits.detach()
        logits[..., MASK] = -torch.inf
        best, token = logits.softmax(-1).max(-1)
        place = best.masked_fill(expected != MASK, -1).argmax()
        expected[0, place] = token[0, place]
    assert torch.equal(middle.sequences, expected)


def test_masks_of_the_prompt_come_before_the_blocks(model):
    rows = [torch.tensor([[9, MASK, 8, MASK, MASK, 7]]), prompts(1, 3)[0]]
    ids, mask = padded(rows)
    seen = []
    options = config(max_new_tokens=4, block_length=2, num_inference_steps=4)
    out = generate(model, ids, mask, options, lambda tokens, step: seen.append(tokens))
    left = [((tokens[0, :6] == MASK).sum().item(), (tokens[0, 6:] == MASK).sum().item()) for tokens in seen]
    assert left == [(1, 4), (0, 4), (0, 3), (0, 2), (0, 1), (0, 0)]  # 3 masks in 2 steps: 2 and 1
    assert [(tokens[1, 6:] == MASK).sum().item() for tokens in seen] == [3, 2, 1, 0, 0, 0]
    assert out.statistics.tokens == 3 + 8


def test_streamer_gets_each_step_in_the_layout_of_the_result(model):
    ids, mask = padded(prompts(2, 2, 5), "right")
    calls = []
    out = generate(model, ids, mask, config(num_inference_steps=2), lambda tokens, step: calls.append((step, tokens)))
    assert [step for step, _ in calls] == [0, 1]
    for (_, tokens), masks in zip(calls, (2, 0), strict=True):
        assert torch.equal(tokens[:, :5], ids) and ((tokens[:, 5:] == MASK).sum(1) == masks).all()
        done = tokens != MASK
        assert torch.equal(tokens[done], out.sequences[done])
    assert torch.equal(calls[-1][1], out.sequences)
    statistics = out.statistics
    assert statistics.tokens_per_second == statistics.tokens / statistics.seconds > 0


SCORED = dict(score_distribution="sampling", top_p=0.9, alg_temp=0.5, unmasking_schedule="dream")


@pytest.mark.parametrize(
    "chosen",
    [
        dict(unmasking_rule="count"),
        dict(unmasking_rule="threshold"),
        dict(unmasking_rule="ancestral"),
        dict(begin_suppress_tokens=[5, 6, 7, 8], **SCORED),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_path_of_a_gpu_gives_the_same(model, monkeypatch, chosen, scale):
    """There rows are not packed and errors come at the end, so that the device is not waited for."""
    rows = [torch.tensor([[9, MASK, 8, MASK, MASK, 7]]), *prompts(1, 3, 1)]
    options = config(block_length=2, guidance_scale=scale, temperature=0.7, seed=4, **chosen)
    expected = generate(model, *padded(rows), options)
    for module in (decoding, passes):
        monkeypatch.setattr(module, "on_cpu", lambda device: False)
    again = generate(model, *padded(rows), options)
    assert torch.equal(again.sequences, expected.sequences)
    assert again.statistics.forward_passes == expected.statistics.forward_passes
    with torch.no_grad():
        model.head_weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits: the model gave no distribution"):
        generate(model, *padded(rows), options)


def test_head_and_sampling_see_only_masked_rows_of_the_block(model, monkeypatch):
    rows = []

    def counted(states, *args, **options):
        rows.append(len(states))
        return original(states, *args, **options)

    original = decoding.lm_head_sample
    monkeypatch.setattr(decoding, "lm_head_sample", counted)
    generate(model, *padded(prompts(0, 2, 5)), config(max_new_tokens=8, block_length=4, num_inference_steps=4))
    assert rows == [8, 4, 8, 4]


def test_single_precision_equals_the_published_loop():
    for seed in range(12):
        model, (row,) = randomise(tiny("mdlm"), seed).float(), prompts(seed, 3)
        ours = generate(model, row, None, config(block_length=2, num_inference_steps=4)).sequences
        assert torch.equal(ours, llada(model, row, 4, 4, 2))


def test_mask_and_suppressed_tokens_are_never_chosen(model):
    with torch.no_grad():
        model.head_weight[MASK] *= 50
    (row,) = prompts(3, 3)
    for scale in (1.0, 2.0):
        tokens = generate(model, row, None, config(guidance_scale=scale)).sequences[0, 3:]
        assert MASK not in tokens
        without = generate(model, row, None, config(guidance_scale=scale, suppress_tokens=tokens.tolist())).sequences[
            0, 3:
        ]
        assert not torch.isin(without, tokens).any()


def test_early_stop_ends_a_row_at_the_end_token_of_a_full_block(model):
    row, other = prompts(5, 3, 4)
    plain = generate(model, row, None, config(max_new_tokens=8, block_length=2, num_inference_steps=4))
    end = int(plain.sequences[0, 3])
    options = dict(max_new_tokens=8, block_length=2, num_inference_steps=4, early_stop=True, eos_token_id=end)
    stopped = generate(model, row, None, config(**options))
    assert torch.equal(stopped.sequences[0, 3:5], plain.sequences[0, 3:5])
    assert (stopped.sequences[0, 5:] == end).all() and stopped.statistics.forward_passes == 1
    both = generate(model, *padded([row, other]), config(**options))
    assert torch.equal(both.sequences[0, 4:], stopped.sequences[0, 3:])
    assert torch.equal(both.sequences[1, 4:], generate(model, other, None, config(**options)).sequences[0, 4:])
    assert torch.isin(both.sequences[1, 4:], end).sum() < 8  # the other row went on
    in_prompt = torch.tensor([[end, 9, 8, MASK]])  # an end token that the prompt itself has ends nothing
    never = dict(max_new_tokens=8, block_length=2, suppress_tokens=[end])
    plain = generate(model, in_prompt, None, config(**never))
    same = generate(model, in_prompt, None, config(**never, early_stop=True, eos_token_id=end))
    assert torch.equal(same.sequences, plain.sequences) and same.statistics.forward_passes == 9


@pytest.mark.parametrize(
    ("schedule", "time_of"),
    [("linear", lambda r: r), ("cosine", lambda r: 2 / math.pi * torch.acos(1 - r)), ("polynomial", torch.sqrt)],
)
def test_a_model_with_timesteps_gets_the_time_of_the_masked_share(schedule, time_of):
    model = randomise(tiny("mdlm", timestep_embedding=True, mask_schedule=schedule), 0)
    (row,) = prompts(0, 3)
    x = torch.cat([row, torch.full((1, 4), MASK)], 1)
    with torch.no_grad():
        while (left := (x == MASK).sum()) > 0:
            states = model.hidden_states(x, timesteps=time_of((left / 4).reshape(1)))
            logits = functional.linear(states, model.head_weight).index_fill(-1, torch.tensor(MASK), -torch.inf)
            best, token = logits.softmax(-1).max(-1)
            place = best.masked_fill(x != MASK, -1).argmax()
            x[0, place] = token[0, place]
    assert torch.equal(generate(model, row, None, config()).sequences, x)
    assert generate(model, row, None, config(guidance_scale=2.0)).sequences.shape == (1, 7)


def test_dropout_is_off_and_the_mode_is_restored():
    model = randomise(tiny("mdlm", dropout=0.5), 0)
    (row,) = prompts(0, 3)
    before = row.clone()
    expected = generate(model, row, None, config()).sequences
    model.train()
    assert torch.equal(generate(model, row, None, config()).sequences, expected)
    assert model.training and torch.equal(row, before)


def test_a_model_with_lora_decodes(model):
    peft = pytest.importorskip("peft", reason="NOT TESTED: peft is not installed (the extra 'lora')")
    (row,) = prompts(0, 3)
    expected = generate(model, row, None, config()).sequences
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert torch.equal(generate(wrapped, row, None, config()).sequences, expected)  # LoRA starts as nothing


def test_the_configuration_is_saved_and_loaded(tmp_path):
    kept = config(max_new_tokens=8, block_length=4, unmasking_rule="factor", factor=0.5, suppress_tokens=[7], seed=1)
    kept.save_pretrained(tmp_path)
    again = MaskedDiffusionGenerationConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == kept.to_diff_dict() and again.factor == 0.5 and again.temperature == 0.0
    assert config(unmasking_rule="threshold").rule_number == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_new_tokens=-1), "max_new_tokens: got -1; expected an int of 0 or more"),
        (dict(block_length=0), "block_length: got 0; expected an int of 1 or more or None"),
        (dict(block_length=3.0), "block_length: got 3.0"),
        (dict(temperature=-0.1), "temperature: got -0.1; expected a number of 0 or above"),
        (dict(temperature=float("nan")), "temperature: got nan"),
        (dict(top_k=-1), "top_k: got -1"),
        (dict(top_p=0.0), r"top_p: got 0.0; expected a number in \(0, 1\]"),
        (dict(guidance_scale=None), "guidance_scale: got None"),
        (dict(seed=1.5), "seed: got 1.5; expected an int or None"),
        (dict(early_stop=1), "early_stop: got 1"),
        (dict(dual_cache=1), "dual_cache: got 1; expected True or False"),
        (dict(prefix_cache=True, dual_cache=True), "prefix_cache: got dual_cache too, .*; drop prefix_cache"),
        (dict(cache_refresh_interval=2), "cache_refresh_interval: got 2 without a cache; set prefix_cache"),
        (dict(dual_cache=True, cache_refresh_interval=0), "cache_refresh_interval: got 0; expected an int of 1"),
        (dict(stop_strings=["a", ""]), "stop_strings: got .*; expected a list of strings that are not empty"),
        (dict(stop_strings=[]), "stop_strings: got"),
        (dict(suppress_tokens=[-1]), "suppress_tokens: got -1"),
        (dict(unmasking_rule="best"), "unmasking_rule: got 'best'; expected one of count"),
        (dict(unmasking_order="left"), "unmasking_order: got 'left'; expected one of confidence"),
        (dict(threshold=0.9), "threshold: got 0.9 with unmasking_rule='count'"),
        (dict(unmasking_rule="threshold", threshold=1.5), r"threshold: got 1.5; expected a number in \(0, 1\]"),
        (dict(unmasking_rule="factor", num_inference_steps=4), "takes as many steps as it needs"),
        (dict(unmasking_rule="ancestral", max_new_tokens=0), "num_inference_steps: got None; the rule ancestral"),
        (dict(unmasking_schedule="square"), "unmasking_schedule: got 'square'; expected one of even, linear, cosine"),
        (dict(unmasking_schedule="dream", unmasking_rule="threshold"), "unmasking_schedule: got 'dream' with"),
        (dict(eps=1e-3), "eps: got 0.001 with unmasking_rule='count', .*; expected .* or leave eps out"),
        (dict(eps=1.0, unmasking_schedule="dream"), r"eps: got 1.0; expected a number in \[0, 1\)"),
        (dict(alg_temp=-1.0), "alg_temp: got -1.0; expected a number of 0 or above"),
        (dict(alg_temp=0.1, unmasking_order="random"), "alg_temp: got 0.1 with"),
        (dict(alg_temp=0.1, unmasking_rule="factor"), "alg_temp: got 0.1 with"),
        (dict(begin_suppress_tokens=2), "begin_suppress_tokens: got 2; expected a list of token ids"),
        (dict(suppress_tokens=5), "suppress_tokens: got 5; expected a list of token ids"),
        (dict(begin_suppress_tokens=[2], unmasking_rule="ancestral"), "begin_suppress_tokens: got .2. with"),
        (dict(score_distribution="dream"), "score_distribution: got 'dream'; expected one of model, sampling"),
        (dict(cfg_keep_tokens=[2]), "cfg_keep_tokens: got some without guidance"),
        (dict(seed=2**63), "seed: got 9223372036854775808; expected an int"),
        (dict(seed="x"), "seed: got 'x'; expected an int or None"),
        (dict(num_beams=4), "num_beams: masked diffusion decoding has no such option"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "mask", "options", "error", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), None, {}, ValueError, "an empty prompt; pass at least one token"),
        (torch.ones(2, 3), None, {}, TypeError, r"got torch.float32 of shape \[2, 3\]; expected an int64 tensor"),
        ([5, 6], None, {}, TypeError, "got list"),
        (torch.full((2, 3), 5), torch.tensor([[1, 1, 1], [0, 0, 0]]), {}, ValueError, "row 1 has no token"),
        (
            torch.full((2, 3), 5),
            torch.ones(2, 4, dtype=torch.int64),
            {},
            ValueError,
            r"attention_mask: got shape \[2, 4\]; expected \[2, 3\]",
        ),
        (torch.full((1, 21), 5), None, {}, ValueError, "got a prompt of 21 tokens and max_new_tokens = 4"),
        (torch.full((1, 3), 99), None, {}, ValueError, "expected 0 to 40"),
        (torch.full((1, 3), 5), None, dict(max_new_tokens=0), ValueError, "nothing is to be generated"),
        (torch.full((1, 3), 5), None, dict(suppress_tokens=[41]), ValueError, "got 41; expected 0 to 40"),
    ],
)
def test_bad_input_is_refused_before_work(model, ids, mask, options, error, message):
    with pytest.raises(error, match=message) as caught:
        generate(model, ids, mask, config(**options))
    assert "\n" not in str(caught.value)


def test_early_stop_needs_an_end_token(model):
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match="early_stop: neither"):
        generate(model, prompts(0, 3)[0], None, config(early_stop=True))


def test_logits_without_a_distribution_are_an_error(model):
    with torch.no_grad():
        model.head_weight[5] = torch.nan
    with pytest.raises(ValueError, match="has no distribution"):
        generate(model, prompts(0, 3)[0], None, config())
    assert not model.training


def test_the_documented_call_runs():
    text = (Path(__file__).resolve().parents[2] / "docs/masked_lm.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        if "backward()" in block or "output = generate(" in block:  # the others need a trained run
            exec(block, names)
    output = names["output"]
    assert output.sequences.shape == (2, 36) and output.statistics.forward_passes == 16
    assert torch.equal(output.sequences[:, :4], names["prompts"])


def test_positions_and_steps_draw_for_themselves(model):
    """A head that says nothing: all tokens alike, so that equal random numbers would give equal tokens."""
    model = randomise(model, 7, head_scale=0.0)
    (row,) = prompts(3, 4)
    at_once = generate(model, row, None, config(max_new_tokens=16, num_inference_steps=1, temperature=1.0, seed=1))
    one_by_one = generate(model, row, None, config(max_new_tokens=16, temperature=1.0, seed=1))
    for output in (at_once, one_by_one):
        assert len(output.sequences[0, 4:].unique()) > 8  # of 40 ids; 16 draws have about 13
    assert not torch.equal(at_once.sequences, one_by_one.sequences)
