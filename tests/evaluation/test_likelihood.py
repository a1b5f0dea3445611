"""The Monte-Carlo likelihood bound against its expectation, enumerated over every mask."""

import math

import pytest
import torch
from evaluation.enumerated import exact, expected_sum

from fastdiff.diffusion import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.evaluation.likelihood import likelihood_bound
from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig

MASK = 3
TEXTS = [torch.tensor(ids) for ids in ([4, 5, 6], [7, 4], [8, 8, 5, 4], [6])]


def tiny(**options):
    fields = dict(
        vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8,
        mask_token_id=MASK,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MaskedDiffusionLM(MaskedDiffusionLMConfig(**{**fields, **options})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model


def process(schedule="linear"):
    return MaskedDiffusion(MaskedDiffusionConfig(schedule=schedule), MASK)


@pytest.mark.parametrize(
    "options", [{}, {"architecture": "gpt2"}, {"timestep_embedding": True}], ids=["plain", "shifted", "time"]
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_is_its_expectation(options, schedule):
    model, noise = tiny(**options), process(schedule)
    bound = likelihood_bound(model, noise, TEXTS, num_samples=4000, batch_size=500)
    truth = exact(model, TEXTS, time_of=noise.time_of)
    assert abs(bound.nats_per_token - truth) < 4 * bound.standard_error
    assert bound.standard_error < 0.03 * truth  # so that the line above says something
    assert bound.tokens == 10 and bound.samples == 4000
    assert bound.perplexity == pytest.approx(math.exp(bound.nats_per_token))
    assert bound.perplexity_standard_error == pytest.approx(bound.perplexity * bound.standard_error)


@pytest.mark.parametrize("num_samples", [32, 100, 320], ids=["fewer", "more", "many"])
def test_the_standard_error_is_the_spread_of_the_estimates(num_samples):
    """Draws a group: 1, 4 and 10, of 4 texts: with fewer than all texts, with all of them once, and often."""
    model = tiny()
    runs = 100
    bounds = [likelihood_bound(model, process(), TEXTS, num_samples=num_samples, batch_size=999, seed=s)
              for s in range(runs)]  # fmt: skip
    estimates = torch.tensor([bound.nats_per_token for bound in bounds], dtype=torch.float64)
    claimed = torch.tensor([bound.standard_error for bound in bounds], dtype=torch.float64).square().mean().sqrt()
    assert 0.8 < float(estimates.std() / claimed) < 1.25
    assert abs(float(estimates.mean()) - exact(model, TEXTS)) < 4 * float(claimed) / math.sqrt(runs)


def test_prompts_and_padding_are_not_masked():
    """The same texts as a padded tensor, with a prompt: the rest's likelihood given it."""
    model = tiny()
    ids = torch.tensor([[4, 5, 6, 0], [7, 4, 0, 0], [8, 8, 5, 4], [6, 4, 5, 0]])
    attention = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    maskable = attention.bool() & (torch.arange(4) > 0)
    bound = likelihood_bound(
        model, process(), ids, maskable=maskable, attention_mask=attention, num_samples=2000, batch_size=500
    )
    texts = [row[: int(seen.sum())] for row, seen in zip(ids, attention, strict=True)]
    truth = exact(model, texts, [torch.arange(len(row)) > 0 for row in texts])
    assert abs(bound.nats_per_token - truth) < 4 * bound.standard_error < 0.2 * truth
    assert bound.tokens == 8


def test_an_encoder_sees_the_condition():
    model = tiny(num_encoder_layers=1)
    conditions = [torch.tensor([4]), torch.tensor([5, 6, 7]), torch.tensor([8, 8]), torch.tensor([6, 6, 6, 6])]
    options = dict(encoder_input_ids=conditions, num_samples=2000, batch_size=500)
    bound = likelihood_bound(model, process(), TEXTS, **options)
    truth = 0.0
    for ids, condition in zip(TEXTS, conditions, strict=True):
        with torch.no_grad():
            states = model.encode(condition[None])
        every = torch.ones_like(ids, dtype=torch.bool)
        truth += expected_sum(model, ids, every, None, encoder_hidden_states=states) / 10
    assert abs(bound.nats_per_token - truth) < 4 * bound.standard_error < 0.2 * truth
    assert abs(bound.nats_per_token - exact(model, TEXTS)) > 4 * bound.standard_error


def test_states_of_another_encoder_stand_for_the_condition():
    model = tiny(num_encoder_layers=1)
    conditions = torch.tensor([[4, 5], [5, 6], [8, 8], [6, 7]])
    with torch.no_grad():
        states = model.encode(conditions)
    found = [likelihood_bound(model, process(), TEXTS, num_samples=64, **condition).nats_per_token
             for condition in ({"encoder_input_ids": conditions}, {"encoder_hidden_states": states})]  # fmt: skip
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert abs(likelihood_bound(model, process(), TEXTS, num_samples=64).nats_per_token - found[0]) > 0.01


@pytest.mark.parametrize("conditional", [False, True])
def test_guidance_is_llada_s(conditional, monkeypatch):
    """Logits of a prompt, or of a condition's text, against those without."""
    monkeypatch.setattr("fastdiff.evaluation.likelihood._GUIDED_ROWS", 5)
    model = tiny(num_encoder_layers=int(conditional))
    texts = [torch.tensor([4, 5, 6]), torch.tensor([7, 4]), torch.tensor([8, 8, 5, 4]), torch.tensor([6, 4, 5])]
    maskable = [torch.arange(len(ids)) >= (0 if conditional else 1) for ids in texts]
    conditions = [torch.tensor([4]), torch.tensor([5, 6, 7]), torch.tensor([8, 8]), torch.tensor([6, 6, 6, 6])]
    options = dict(maskable=maskable, num_samples=2000, batch_size=500)
    options |= dict(encoder_input_ids=conditions) if conditional else {}
    bound = likelihood_bound(model, process(), texts, guidance_scale=2.5, **options)
    truth, tokens = 0.0, sum(int(mask.sum()) for mask in maskable)
    for ids, mask, condition in zip(texts, maskable, conditions, strict=True):
        with torch.no_grad():
            inputs = dict(encoder_hidden_states=model.encode(condition[None])) if conditional else {}
        truth += expected_sum(model, ids, mask, None, cfg=1.5, **inputs) / tokens
    assert abs(bound.nats_per_token - truth) < 4 * bound.standard_error < 0.2 * truth
    unguided = likelihood_bound(model, process(), texts, **options)
    assert abs(unguided.nats_per_token - truth) > 4 * (unguided.standard_error + bound.standard_error)


def test_the_batch_size_changes_nothing_and_the_mode_is_kept():
    model = tiny().train()
    options = dict(num_samples=50, seed=3)
    one, all_ = (likelihood_bound(model, process(), TEXTS, batch_size=size, **options) for size in (1, 64))
    assert one.nats_per_token == pytest.approx(all_.nats_per_token, rel=1e-9)
    assert one.samples == 64 and model.training  # two a group
    assert likelihood_bound(model, process(), TEXTS, **{**options, "seed": 4}).nats_per_token != one.nats_per_token


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "sequences: got none"),
        (TEXTS, {"num_samples": 1}, "num_samples: got 1"),
        (TEXTS, {"guidance_scale": math.inf}, "guidance_scale: got inf"),
        ([torch.full((9,), 4)], {}, "got 9 tokens; expected at most max_position_embeddings = 8"),
        ([torch.tensor([4, 9])], {}, "got ids 4 to 9; expected 0 to 8"),
        ([torch.tensor([4, MASK])], {}, "got the mask token 3"),
        (torch.tensor([[4, 5]]), {"maskable": torch.zeros(1, 2, dtype=torch.bool)}, "no token may be masked"),
        (torch.tensor([[4, 5]]), {"maskable": torch.zeros(2, dtype=torch.bool)}, r"maskable: got shape \[2\]"),
        (torch.tensor([4, 5]), {}, r"sequences: got shape \[2\]"),
        (TEXTS, {"encoder_input_ids": TEXTS[:2]}, "encoder_input_ids: got 2 texts; expected 4"),
        (TEXTS, {"encoder_hidden_states": torch.zeros(2, 3, 4)}, "encoder_hidden_states: got 2 rows; expected them"),
    ],
)
def test_bad_input(texts, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        likelihood_bound(tiny(), process(), texts, **options)


def test_another_mask_token_is_refused():
    with pytest.raises(ValueError, match="masks with token 2; expected the model's, 3"):
        likelihood_bound(tiny(), MaskedDiffusion(MaskedDiffusionConfig(), 2), TEXTS)
