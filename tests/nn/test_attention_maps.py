"""Cross-attention maps: what is captured, entropy and its gradients, the remedies for the attention sink."""

import pytest
import torch
from torch import nn

from fastdiff.nn import (
    CrossAttention,
    EntropyTerm,
    QFormer,
    QFormerConfig,
    attention_entropy,
    attention_maps,
    drop_early_tokens,
    sink_share,
)
from fastdiff.nn.attention_maps import depends_on_time

DIM, HEADS = 16, 4
TOLERANCE = 1e-6  # observed: 1.2e-7


class Decoder(nn.Module):
    """Two layers of cross-attention, as a DiT has them: the first key is the time."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(CrossAttention(DIM, HEADS) for _ in range(2))
        for layer in self.layers:
            layer.leading_keys = 1

    def forward(self, x, context, mask=None):
        for layer in self.layers:
            x = x + layer(x, context, mask)
        return x


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    model = Decoder()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # sharp maps
    return model


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return torch.randn(2, 6, DIM), torch.randn(2, 5, DIM), mask


def weights_of(layer, x, context, mask):
    """The definition: softmax of q·k / √d over the keys that are there."""
    query, key = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (layer.wq(x), layer.wk(context)))
    scores = query @ key.mT / (DIM // HEADS) ** 0.5
    return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


def test_maps_are_the_weights_of_each_layer_and_outputs_stay(decoder, batch):
    x, context, mask = batch
    wanted = decoder(x, context, mask)
    with attention_maps(decoder) as maps:
        found = decoder(x, context, mask)
    assert (found - wanted).abs().max() < 10 * TOLERANCE
    assert maps[0].shape == (2, 2, HEADS, 6, 5) and not maps[0].requires_grad
    assert maps.layers == ("layers.0", "layers.1") and maps.leading_keys == 1
    first = weights_of(decoder.layers[0], x, context, mask)
    second = weights_of(decoder.layers[1], x + decoder.layers[0](x, context, mask), context, mask)
    assert (maps[0] - torch.stack([first, second], 1)).abs().max() < TOLERANCE
    assert all(layer.capture is None for layer in decoder.layers)


def test_steps_that_were_asked_for_and_no_others(decoder, batch):
    x, context, mask = batch
    explicit = []
    with attention_maps(decoder, [1, 3], rows=1) as maps:
        for step in range(4):
            explicit.append(decoder.layers[0].capture is not None)
            decoder(x + step, context, mask)
            maps.after_step(step)
    assert explicit == [False, True, False, True] and maps.steps == (1, 3)
    assert maps[3].shape[0] == 1
    assert (maps[1][:, 0] - weights_of(decoder.layers[0], x + 1, context, mask)[:1]).abs().max() < TOLERANCE
    with pytest.raises(KeyError, match=r"step 2: .* there are maps of \[1, 3\]"):
        maps[2]


def test_what_cannot_be_captured(decoder, batch):
    with pytest.raises(ValueError, match="model: got a Linear without cross-attention"):
        with attention_maps(nn.Linear(2, 2)):
            pass
    for steps in ([], [-1]):
        with pytest.raises(ValueError, match="steps: got .*; expected steps of sampling, from 0"):
            with attention_maps(decoder, steps):
                pass
    x, context, mask = batch
    with attention_maps(decoder) as maps:
        decoder(x, context, mask)
        decoder(x, context[:, :4], mask[:, :4])
    with pytest.raises(ValueError, match="expected one shape: run the model once"):
        maps[0]


def test_an_error_inside_leaves_the_model_as_it_was(decoder):
    with pytest.raises(RuntimeError, match="stop"):
        with attention_maps(decoder):
            raise RuntimeError("stop")
    assert all(layer.capture is None for layer in decoder.layers)


def test_a_q_former_reads_once_whatever_the_time(decoder):
    torch.manual_seed(0)
    reader = QFormer(DIM, 3, 8, QFormerConfig(hidden_size=DIM, num_queries=2, depth=2, num_heads=HEADS))
    assert depends_on_time(decoder) and not depends_on_time(nn.ModuleList([reader]))
    states, mask = torch.randn(2, 5, DIM), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    with attention_maps(reader) as maps:
        reader(states, mask)
    assert maps[0].shape == (2, 2, HEADS, 2, 5) and maps.leading_keys == 0
    assert (maps[0].sum(-1) - 1).abs().max() < TOLERANCE and not maps[0][1, ..., 2:].any()


def test_entropy_and_its_gradient():
    maps = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], dtype=torch.float64)
    wanted = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64).log()
    assert torch.allclose(attention_entropy(maps), wanted)
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, True, False, False])

    def entropy(scores):
        return attention_entropy((scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)) * mask)

    assert torch.autograd.gradcheck(entropy, (scores,))
    entropy(scores).sum().backward()
    assert torch.isfinite(scores.grad).all() and not scores.grad[:, 3:].any()


def test_share_of_the_first_token():
    maps = torch.tensor([[[0.1, 0.6, 0.3], [0.1, 0.2, 0.7]], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
    assert torch.allclose(sink_share(maps, first=1), torch.tensor([0.4, 0.5]))
    assert torch.allclose(sink_share(maps), torch.tensor([0.1, 0.0]))
    with pytest.raises(ValueError, match="first: got 3 of 3 keys"):
        sink_share(maps, first=3)


def test_the_entropy_term_spreads_attention(decoder, batch):
    x, context, mask = batch
    term = EntropyTerm(decoder, 0.5)
    decoder.train()
    decoder(x, context, mask)
    value = term()
    with attention_maps(decoder, detach=False) as maps:
        decoder(x, context, mask)
    assert torch.allclose(value, -0.5 * attention_entropy(maps[0]).mean())
    term()  # of the pass within the block, which goes on to be heard
    before = attention_entropy(maps[0]).mean().item()
    optimizer = torch.optim.Adam(decoder.parameters(), 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        decoder(x, context, mask)
        term().backward()
        optimizer.step()
    with attention_maps(decoder) as maps:
        decoder(x, context, mask)
    assert attention_entropy(maps[0]).mean() > before + 0.2  # observed: + 0.64


def test_the_entropy_term_hears_training_alone(decoder, batch):
    term = EntropyTerm(decoder, 0.5)
    decoder.eval()
    decoder(*batch)
    with pytest.raises(RuntimeError, match="got no forward pass in training mode"):
        term()
    term.remove()
    assert all(layer.capture is None for layer in decoder.layers)
    with pytest.raises(ValueError, match="weight: got 0"):
        EntropyTerm(decoder, 0)


def test_the_entropy_term_with_gradient_checkpointing(decoder, batch):
    from torch.utils.checkpoint import checkpoint

    x, context, mask = batch
    term, decoder = EntropyTerm(decoder, 0.5), decoder.train()
    gradients = []
    for run in (lambda: decoder(x, context, mask), lambda: checkpoint(decoder, x, context, mask, use_reentrant=False)):
        decoder.zero_grad()
        (run().square().mean() + term()).backward()
        gradients.append([parameter.grad.clone() for parameter in decoder.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_early_tokens_are_hidden_in_training(decoder, batch):
    x, context, mask = batch
    drop_early_tokens(decoder, 1.0, tokens=2)
    decoder.train()
    with attention_maps(decoder) as maps:
        decoder(x, context, mask)
    assert not maps[0][0, ..., 1:3].any() and maps[0][0, ..., 0].all()  # tokens 0 and 1; never the time
    assert sink_share(maps[0], first=1)[0] == 0
    assert maps[0][1, ..., 1].all()  # a prompt of these two tokens alone keeps them
    decoder.eval()
    with attention_maps(decoder) as maps:
        decoder(x, context, mask)
    assert maps[0][0, ..., 1:].all()
    drop_early_tokens(decoder, 0.25)
    decoder.train()
    with attention_maps(decoder) as maps:
        decoder(x[:1].expand(400, -1, -1), context[:1].expand(400, -1, -1))
    hidden = (sink_share(maps[0][:, :1], first=1) == 0).float().mean()
    assert 0.17 < hidden < 0.33  # 0.25 ± 4 deviations
    for options, name in (((1.5,), "probability"), ((0.5, 0), "tokens")):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            drop_early_tokens(decoder, *options)
