"""Text that is denoised by Bayes' rule over the vocabulary: against the rule itself, on enumerated tokens."""

import pytest
import torch
import torch.nn.functional as F
from qgfd_models import SMALL, qgfd_config

from fastdiff.diffusion import Diffusion, DiffusionConfig
from fastdiff.models import QGFDModel, QGFDModelConfig
from fastdiff.models.qgfd.adapters import TextAdapterConfig
from fastdiff.models.qgfd.adapters.base import unit_scale

VOCABULARY = 11


def make(prediction_type="sample", noise_levels="uniform", backbone=None, **options) -> QGFDModel:
    torch.manual_seed(0)
    text = TextAdapterConfig(vocab_size=VOCABULARY, max_length=5, token_posterior=True, **SMALL, **options)
    diffusion = DiffusionConfig(prediction_type=prediction_type, noise_levels=noise_levels)
    return QGFDModel(QGFDModelConfig(qgfd_config(**(backbone or {})), diffusion, text=text, reconstruction_weight=0.0))


@pytest.mark.parametrize("noise_levels", ["uniform", "linear"])
def test_evidence_is_bayes_rule(noise_levels):
    model = make(noise_levels=noise_levels)
    adapter, diffusion = model.adapter(), model.diffusion
    with torch.no_grad():
        adapter.token_head.bias.copy_(torch.randn(VOCABULARY))  # how frequent tokens are
    t = torch.tensor([100, 400, 900]) if noise_levels == "linear" else torch.tensor([0.3, 0.6, 0.9])
    alpha, sigma = diffusion.alpha_sigma(t)
    noisy = torch.randn(3, 5, 12)
    embeddings = unit_scale(adapter.embedding.weight)
    distances = (noisy[:, :, None] - alpha.view(3, 1, 1, 1) * embeddings).square().sum(-1)
    expected = -distances / (2 * sigma.view(3, 1, 1).square()) + F.log_softmax(adapter.token_head.bias, 0)
    found = adapter.evidence(noisy, alpha, sigma)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=1e-3, atol=1e-5)
    mean = expected.softmax(-1) @ embeddings
    torch.testing.assert_close(adapter.expected(found), mean, rtol=1e-4, atol=1e-5)


def test_the_loss_of_a_new_model_is_what_single_tokens_tell():
    model, ids = make(), torch.randint(VOCABULARY, (4, 5))
    x0, t, noise = model.adapter().encode({"input_ids": ids}).tokens, torch.full((4,), 0.5), torch.randn(4, 5, 12)
    evidence = model.adapter().evidence(0.5 * x0 + 0.5 * noise, torch.full((4,), 0.5), torch.full((4,), 0.5))
    expected = F.cross_entropy(evidence.transpose(1, 2), ids, reduction="none").mean(1)
    torch.testing.assert_close(model({"input_ids": ids}, t=t, noise=noise), expected, rtol=1e-5, atol=1e-6)
    certain = model({"input_ids": ids}, t=torch.full((4,), 1e-3), noise=noise)
    assert certain.max() < 1e-4
    hopeless = model({"input_ids": ids}, t=torch.ones(4), noise=noise)
    torch.testing.assert_close(hopeless, torch.full((4,), float(VOCABULARY)).log(), rtol=1e-4, atol=1e-4)


def test_it_learns_context_and_samples_it():
    """Each text is one token over and over: what a position is, the others tell."""
    model = make(backbone=dict(hidden_size=64, intermediate_size=128))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        ids = torch.randint(VOCABULARY, (64, 1), generator=generator).repeat(1, 5)
        t, noise = torch.rand(64, generator=generator), torch.randn(64, 5, 12, generator=generator)
        loss = model({"input_ids": ids}, t=t, noise=noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.adapter().token_head.weight.grad.abs().max() > 0 and model.adapter().embedding.weight.grad is None
    ids = model.sample(count=40, num_inference_steps=20)["input_ids"]
    assert (ids[:, 1:] == ids[:, :-1]).float().mean() > 0.4  # seen: 0.61; 0.09 by chance
    assert len(ids[:, 0].unique()) > 5


def test_it_may_begin_with_the_frequencies_of_tokens():
    model = make()
    model.adapter().set_token_prior(torch.tensor([0, 9, *[0] * 9]))
    nothing = model.adapter().evidence(torch.zeros(1, 1, 12), torch.zeros(1), torch.ones(1))
    expected = torch.tensor([1, 10, *[1] * 9]) / 20
    torch.testing.assert_close(nothing.softmax(-1)[0, 0], expected)


def test_given_tokens_are_certain_and_not_asked_for():
    model, ids = make(context_share=1.0), torch.randint(VOCABULARY, (64, 5))
    adapter = model.adapter().train()
    evidence, asked = adapter.tell(torch.zeros(64, 5, VOCABULARY), {"input_ids": ids})
    assert 0.3 < asked.float().mean() < 0.7  # shares are even from 0 to 1
    assert torch.equal(evidence.argmax(-1)[~asked], ids[~asked]) and torch.count_nonzero(evidence[asked]) == 0
    assert (evidence.softmax(-1).amax(-1)[~asked] > 0.999).all()
    untouched, everything = adapter.eval().tell(torch.zeros(64, 5, VOCABULARY), {"input_ids": ids})
    assert everything is None and torch.count_nonzero(untouched) == 0
    # in pure noise a new model knows nothing of what it is asked for; where all is given there is nothing to lose
    loss = model.train()({"input_ids": ids}, t=torch.ones(64), noise=torch.randn(64, 5, 12))
    uniform = torch.tensor(float(VOCABULARY)).log()
    assert ((loss - uniform).abs().lt(1e-3) | loss.eq(0)).all() and (loss > 0).float().mean() > 0.7


@pytest.mark.parametrize("config", [{}, {"noise_levels": "linear"}, {"time_scale": 7.0}])
def test_levels_are_the_inverse_of_model_time(config):
    diffusion = Diffusion(DiffusionConfig(**{"prediction_type": "sample", "noise_levels": "uniform", **config}))
    t = diffusion.sample_times(50)
    torch.testing.assert_close(diffusion.level(diffusion.model_time(t)), t)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="prediction_type 'flow'; text.token_posterior needs 'sample'"):
        make(prediction_type="flow")
    with pytest.raises(ValueError, match="context_share: got 2; expected 0 to 1"):
        make(context_share=2)
    with pytest.raises(ValueError, match="expected no backbone_name, and decoder 'nearest'"):
        make(decoder="head")
