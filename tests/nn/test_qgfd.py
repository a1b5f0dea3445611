"""`fastdiff.nn.QGFDAttention` against torch's module and the definition, and the values that generation keeps."""

import warnings

import pytest
import torch
from torch import nn

from fastdiff.nn import DiffusedValues, QGFDAttention, QGFDSettings
from fastdiff.nn.qgfd import diffused_attention
from fastdiff.ops import qgfd_attention_dense, qgfd_values

DIM, HEADS, LENGTH = 24, 3, 7
TOLERANCE = 1e-5  # observed: 1.6e-6, fp32 on an AVX-512 machine; gradients, ratio of norms: 8.2e-7
SINK = {"transition": "key", "sink_isolation": True}


def module(**settings):
    torch.manual_seed(0)
    built = QGFDAttention(DIM, HEADS, **settings)
    for parameter in built.parameters():  # sharp attention, and a bias that is seen
        nn.init.normal_(parameter, std=0.5)
    return built


def states(length=LENGTH, batch=2, dim=DIM, **kind):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(length), **kind)


def loop(attention, x, allowed, settings):
    """The definition, an L x L matrix a head: allowed is bool [B, 1, L, L], True = attend."""
    batch, length, dim = x.shape
    wide = (batch, length, 3, attention.num_heads, attention.head_dim)
    projected = x @ attention.in_proj_weight.T + attention.in_proj_bias
    query, key, value = projected.view(wide).permute(2, 0, 3, 1, 4)

    def weights(scores):
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)

    a = weights(query @ key.mT / attention.head_dim**0.5)
    p = a
    if settings["transition"] == "key":
        unit = key / key.norm(dim=-1, keepdim=True)
        p = weights(unit @ unit.mT)
    power = a
    for _ in range(settings["steps"]):
        power = power @ p
        if settings["recurrence"] == "restart":
            power = settings["alpha"] * power + (1 - settings["alpha"]) * a
    if settings["recurrence"] == "power":
        power = settings["alpha"] * power + (1 - settings["alpha"]) * a
    mixed = (power @ value).transpose(1, 2).reshape(batch, length, dim)
    return mixed @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10, "vdim": 14}, {"batch_first": False}])
def test_zero_steps_is_the_module_of_torch(options):
    given = {"batch_first": True} | options
    theirs = nn.MultiheadAttention(DIM, HEADS, **given)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = QGFDAttention(DIM, HEADS, steps=0, **options)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    query, key = states(), states(5, dim=options.get("kdim", DIM))
    value = states(5, dim=options.get("vdim", DIM)) + 1
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    mask = torch.rand(LENGTH, 5) < 0.4
    mask[:, 0] = False
    three = mask.repeat(2 * HEADS, 1, 1)
    three[0, :, 1] = True
    floats = torch.zeros(2, 5).masked_fill(padding, -torch.inf)
    calls = [{}, {"key_padding_mask": padding}, {"attn_mask": mask}, {"attn_mask": three}, {"key_padding_mask": floats}]
    calls += [{"attn_mask": mask, "key_padding_mask": padding}]
    if not ours.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    for call in calls:
        wanted = theirs(query, key, value, need_weights=False, **call)[0]
        got, weights = ours(query, key, value, **call)
        assert weights is None
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    if "kdim" not in options:  # one tensor for all three
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for call in ({}, {"attn_mask": causal}, {"attn_mask": causal, "is_causal": True}):
            wanted = theirs(query, query, query, need_weights=False, **call)[0]
            torch.testing.assert_close(ours(query, query, query, **call)[0], wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("transition", ["attention", "key"])
@pytest.mark.parametrize("recurrence", ["power", "restart"])
@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_are_those_of_the_definition(transition, recurrence, causal):
    settings = {"steps": 2, "alpha": 0.3, "transition": transition, "recurrence": recurrence}
    attention = module(**settings)
    x = states().requires_grad_()
    ignored = torch.zeros(2, LENGTH, dtype=torch.bool)
    ignored[0, 5:] = True
    allowed = ~ignored[:, None, None].expand(-1, 1, LENGTH, -1)
    if causal:
        allowed = allowed.tril()
    out, _ = attention(x, x, x, key_padding_mask=ignored, is_causal=causal)
    wanted = loop(attention, x, allowed, settings)
    torch.testing.assert_close(out, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    weight = states(LENGTH + 1)[:, :LENGTH]
    parameters = [x, *attention.parameters()]
    ours, theirs = (torch.autograd.grad((t * weight).sum(), parameters) for t in (out, wanted))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= TOLERANCE * b.norm()


def test_true_in_key_padding_mask_is_ignored():
    attention, x = module(steps=2), states()
    ignored = torch.zeros(2, LENGTH, dtype=torch.bool)
    ignored[:, 4:] = True
    padded = attention(x, x, x, key_padding_mask=ignored)[0][:, :4]
    alone = attention(*[x[:, :4]] * 3)[0]
    torch.testing.assert_close(padded, alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_other_masks_run_on_the_dense_path():
    attention, x = module(), states()
    near = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that hops reach what the mask hides; tests/ops has it
        out, _ = attention(x, x, x, attn_mask=~near)
    settings = {"steps": 1, "alpha": 0.5, "transition": "attention", "recurrence": "power"}
    wanted = loop(attention, x, near.expand(2, 1, -1, -1), settings)
    torch.testing.assert_close(out, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_causal_attn_mask_wants_no_dense_path(monkeypatch):
    monkeypatch.setattr("fastdiff.nn.qgfd.qgfd_attention_dense", None)
    attention, x = QGFDAttention(16, 2), torch.randn(2, 7, 16)
    ignored = torch.ones(7, 7, dtype=torch.bool).triu(1)
    floats = torch.zeros(7, 7).masked_fill(ignored, -torch.inf)
    expected, _ = attention(x, x, x, is_causal=True)
    for mask in (ignored, floats):
        assert torch.equal(attention(x, x, x, attn_mask=mask)[0], expected)


def test_a_bias_of_the_scores_is_refused_under_compile_as_well():
    attention, x = QGFDAttention(16, 2), torch.randn(2, 7, 16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="attn_mask: got values other than 0 and -inf"):
        compiled(x, x, x, attn_mask=torch.randn(7, 7))


def test_cross_attention_is_plain_with_transition_attention():
    x, memory = states(), states(5)
    for transition, plain in (("attention", True), ("key", False)):
        diffused = module(transition=transition)(x, memory, memory)[0]
        undiffused = module(transition=transition, steps=0)(x, memory, memory)[0]
        assert torch.equal(diffused, undiffused) == plain


def test_encoder_layers_of_torch_do_not_go_around_it():
    layer = nn.TransformerEncoderLayer(DIM, HEADS - 1, 32, dropout=0.0, batch_first=True)  # an even number of heads
    layer.self_attn = QGFDAttention(DIM, HEADS - 1)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = states()
    ignored = torch.zeros(2, LENGTH, dtype=torch.bool)
    ignored[0, 5:] = True
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=ignored)
        torch.testing.assert_close(
            fast, encoder.train()(x, src_key_padding_mask=ignored), atol=TOLERANCE, rtol=TOLERANCE
        )
        for inner in encoder.layers:
            inner.self_attn.steps = 0
        assert (fast - encoder(x, src_key_padding_mask=ignored)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["mixed", "hop"])
def test_dropout_of_the_mixed_matrix_and_of_each_hop(kind):
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 16, 16)
    value = torch.eye(16).expand(1, 2, 16, 16)  # the output is the matrix
    settings, p = QGFDSettings(dropout_kind=kind), 0.25
    whole = diffused_attention(query, key, value, settings)
    dropped = diffused_attention(query, key, value, settings, dropout_p=p)
    as_mixed = torch.isclose(dropped, whole / (1 - p), rtol=1e-4) | (dropped == 0)
    if kind == "mixed":
        assert as_mixed.all() and 0.15 < (dropped == 0).float().mean() < 0.35
    else:
        assert not as_mixed.any(-1).all()
    mean = torch.stack([diffused_attention(query, key, value, settings, dropout_p=p) for _ in range(500)]).mean(0)
    assert (mean - whole).norm() < 0.1 * whole.norm()  # 0.026 seen


def test_dropout_only_in_training():
    attention, x = module(dropout=0.5), states()
    plain = module()(x, x, x)[0]
    assert not torch.equal(attention(x, x, x)[0], plain)
    assert torch.equal(attention.eval()(x, x, x)[0], plain)


def test_alpha_is_an_attribute():
    attention, x = module(alpha=0.02), states()
    before = attention(x, x, x)[0]
    attention.alpha = 0.1
    assert torch.equal(attention(x, x, x)[0], module(alpha=0.1)(x, x, x)[0])
    assert not torch.equal(attention(x, x, x)[0], before)
    attention.alpha = 1.5
    with pytest.raises(ValueError, match=r"alpha: got 1.5; expected a number in \[0, 1\]"):
        attention(x, x, x)


def test_compiles_without_a_break():
    attention, x = module(steps=2), states()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], attention(x, x, x)[0], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(half):
    attention, x = module(steps=2), states()
    wanted = attention(x, x, x)[0]
    with torch.autocast("cpu", half):
        cast = attention(x, x, x)[0]
    direct = attention.to(half)(*[x.to(half)] * 3)[0]
    for out in (cast, direct):
        assert out.dtype == half
        assert (out.float() - wanted).norm() < (
            2e-2 if half == torch.bfloat16 else 3e-3
        ) * wanted.norm()  # 6.5e-3, 7.8e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 5}, "num_heads: got 5 for embed_dim = 24; expected a divisor"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"steps": -1}, "steps: got -1; expected an int from 0"),
        ({"alpha": 2}, "alpha: got 2; expected"),
        ({"transition": "keys"}, "transition: got 'keys'; expected 'attention' or 'key'"),
        ({"sink_isolation": True}, "sink_isolation: got True with transition 'attention'"),
        ({"dropout_kind": "both"}, "dropout_kind: got 'both'; expected 'mixed' or 'hop'"),
        ({"dropout_kind": "hop", "transition": "key"}, "dropout_kind: got 'hop' with transition 'key'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        QGFDAttention(DIM, **({"num_heads": HEADS} | settings))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"need_weights": True}, "need_weights: got True; expected False"),
        ({"key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)}, r"key_padding_mask: got shape \[2, 3\]; expected"),
        ({"key_padding_mask": torch.full((2, LENGTH), 0.5)}, "key_padding_mask: got values other than 0 and -inf"),
        ({"key_padding_mask": torch.ones(2, LENGTH, dtype=torch.int64)}, "key_padding_mask: got torch.int64; expected"),
        ({"attn_mask": torch.zeros(3, 3)}, r"attn_mask: got shape \[3, 3\]; expected \[7, 7\] or \[6, 7, 7\]"),
    ],
)
def test_bad_calls(call, message):
    x = states()
    with pytest.raises(ValueError, match=message):
        module()(x, x, x, **call)


def test_an_unbatched_call_is_refused():
    x = states()[0]
    with pytest.raises(ValueError, match=r"query: got shape \[7, 24\]; expected three dimensions"):
        module()(x, x, x)


# ------------------------------------------------------------------------------------------ beside a cache

KEY_SETTINGS = [
    {"transition": "key", "steps": 1},
    {"transition": "key", "steps": 3, "alpha": 0.3, "temperature": 0.25},
    {"transition": "key", "steps": 2, "recurrence": "restart", "alpha": 0.7},
    {"steps": 2, "temperature": 0.5, **SINK},
]


def keys_and_values(length=11):
    torch.manual_seed(1)
    return torch.randn(2, 2, 3, length, 8).unbind(0)


def left_padding(length=11):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :4] = False
    return mask


@pytest.mark.parametrize("settings", KEY_SETTINGS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("parts", [(11,), (6, 1, 1, 3), (1,) * 11])
def test_growing_values_are_those_of_the_whole(settings, masked, parts):
    key, value = keys_and_values()
    mask = left_padding() if masked else None
    held, end = DiffusedValues(), 0
    for part in parts:
        end += part
        seen = None if mask is None else mask[:, :end]
        w = held.update(key[:, :, :end], value[:, :, :end], QGFDSettings(**settings), seen)
        assert held.length == end
    wanted = qgfd_values(key, value, key_mask=mask, is_causal=True, **QGFDSettings(**settings).of_values)
    torch.testing.assert_close(w, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    query = key.flip(0)
    out = diffused_attention(query, key, w, QGFDSettings(steps=0), key_mask=mask, is_causal=True)
    dense = qgfd_attention_dense(query, key, value, key_mask=mask, is_causal=True, **settings)
    torch.testing.assert_close(out, dense, atol=TOLERANCE, rtol=TOLERANCE)


def test_other_settings_and_fewer_rows_start_anew():
    key, value = keys_and_values()
    held = DiffusedValues()
    held.update(key, value, QGFDSettings(transition="key"))
    for settings, length in ((QGFDSettings(transition="key", alpha=0.1), 11), (QGFDSettings(transition="key"), 5)):
        w = held.update(key[:, :, :length], value[:, :, :length], settings)
        fresh = DiffusedValues().update(key[:, :, :length], value[:, :, :length], settings)
        assert torch.equal(w, fresh)


def test_other_sequences_want_a_reset():
    settings, held = QGFDSettings(transition="key"), DiffusedValues()
    key, value = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    held.update(key, value, settings)
    with pytest.raises(ValueError, match=r"key: got \[1, 2\] samples and heads where \[2, 2\] are held"):
        held.update(key[:1], value[:1], settings)
    held.reset()
    other = torch.randn(1, 2, 6, 8)
    torch.testing.assert_close(
        held.update(other, value[:1], settings), qgfd_values(other, value[:1], is_causal=True), rtol=1e-5, atol=1e-5
    )


def test_no_values_to_keep_with_transition_attention():
    with pytest.raises(ValueError, match="transition: got 'attention', whose values depend on the queries"):
        DiffusedValues().update(*keys_and_values(), QGFDSettings())
