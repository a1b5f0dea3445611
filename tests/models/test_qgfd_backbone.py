"""QGFDBackbone: against a plain dense computation, masks, conditions, positions, checkpoints, bad input."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from qgfd_models import make_model, qgfd_config, randomised

from fastdiff.models import QGFDBackbone, QGFDConfig, QGFDEncoderBlock
from fastdiff.nn import sincos_2d, sincos_positions
from fastdiff.nn.rotary import axial_rotary_table


def make_backbone(**options) -> QGFDBackbone:
    torch.manual_seed(0)
    return randomised(QGFDBackbone(qgfd_config(**options))).eval()


def inputs(batch=3, length=7, tokens=4, cond_dim=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, 12, generator=generator)
    return x, torch.tensor([3.0, 500.0, 999.0])[:batch], torch.randn(batch, tokens, cond_dim, generator=generator)


def heads(x, count=2):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def plain_attention(attention, x, context, mask, steps, alpha):
    """TorchDire's matrices: A = softmax, W = alpha * A * P^k + (1 - alpha) * A with P = A."""
    query, key, value = heads(attention.q_proj(x)), heads(attention.k_proj(context)), heads(attention.v_proj(context))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    diffused = weights
    for _ in range(steps):
        diffused = diffused @ weights
    mixed = (alpha * diffused + (1 - alpha) * weights) @ value
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


def plain_backbone(model, x, t, cond, mask, cond_mask, steps, alpha):
    config, half = model.config, model.config.hidden_size // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
    angles = t[:, None] * frequencies
    time = model.time_embedding.mlp(torch.cat([angles.sin(), angles.cos()], -1))
    places = torch.arange(x.shape[1])[:, None] * 10000.0 ** -(torch.arange(half) / half)
    x = model.x_proj(x) + torch.cat([places.sin(), places.cos()], -1)
    adaptive = config.time_conditioning == "adaln"
    if not adaptive:
        x = x + time[:, None]

    def norm(layer, x, shift, scale):
        if adaptive:
            return F.layer_norm(x, (config.hidden_size,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return F.layer_norm(x, (config.hidden_size,), layer.weight, layer.bias, eps=1e-6)

    context = model.cond_proj(cond)
    for block in model.blocks:
        m = block.adaLN_modulation(time).chunk(6, -1) if adaptive else [None] * 6
        normed = norm(block.norms["self_attn"], x, m[0], m[1])
        x = x + plain_attention(block.self_attn, normed, normed, mask, steps, alpha)
        normed = norm(block.norms["cross_attn"], x, m[2], m[3])
        x = x + plain_attention(block.cross_attn, normed, context, cond_mask, 0, 0)
        mlp = block.mlp
        x = x + mlp.fc2(F.gelu(mlp.fc1(norm(block.norms["mlp"], x, m[4], m[5]))))
    shift, scale = model.final_modulation(time).chunk(2, -1) if adaptive else (None, None)
    return model.final_proj(norm(model.final_norm, x, shift, scale))


@pytest.mark.parametrize("time_conditioning", ["add", "adaln"])
@pytest.mark.parametrize("steps, alpha", [(0, 0.5), (1, 0.5), (1, 0.0), (2, 0.3)])
def test_it_is_the_dense_computation(time_conditioning, steps, alpha):
    model = make_backbone(time_conditioning=time_conditioning, steps=steps, alpha=alpha)
    x, t, cond = inputs()
    mask, cond_mask = (
        torch.arange(7) < torch.tensor([7, 4, 1])[:, None],
        torch.arange(4) < torch.tensor([[4], [1], [3]]),
    )
    with torch.no_grad():
        found = model(x, t, cond, cond_mask, mask=mask)
        expected = plain_backbone(model, x, t, cond, mask, cond_mask, steps, alpha)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)  # seen: 2e-6
    assert torch.count_nonzero(found[~mask]) == 0


@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=1), dict(steps=2, transition="key")])
def test_rotary_positions_are_relative(options):
    """Attention with them sees how far tokens are apart along each axis, not where they are."""
    model = make_backbone(rope_theta=100.0, hidden_size=24, num_heads=2, **options)  # heads of 12: 6, 4 + 2, 2 + 2 + 2
    attention, x = model.blocks[0].self_attn, torch.randn(2, 7, 24)
    for axes in (1, 2, 3):
        ids = torch.randint(9, (7, axes))
        there, moved, together = (
            attention(x, None, axial_rotary_table(p, 12, 100.0))
            for p in (ids, ids + torch.arange(5, 5 + axes), 0 * ids)
        )
        torch.testing.assert_close(moved, there, rtol=0, atol=1e-5)
        assert (together - there).abs().max() > 1e-4
    plain = make_backbone(hidden_size=24, num_heads=2, **options)  # the same weights
    assert (model(*inputs(cond_dim=24)) - plain(*inputs(cond_dim=24))).abs().max() > 1e-4
    with pytest.raises(ValueError, match="position_ids: got 7 axes for rotary heads of 12 numbers; expected 6 at most"):
        model(torch.zeros(1, 7, 12), torch.zeros(1), position_ids=torch.zeros(7, 7, dtype=torch.int64))


def test_hops_change_the_output():
    outputs = []
    for steps in (0, 1, 2):
        model = make_backbone(steps=steps)
        outputs.append(model(*inputs()).detach())
    assert min((a - b).abs().max() for a, b in zip(outputs, outputs[1:], strict=False)) > 1e-4


def test_a_new_model_predicts_zero():
    for time_conditioning in ("add", "adaln"):
        model = QGFDBackbone(qgfd_config(time_conditioning=time_conditioning))
        assert torch.count_nonzero(model(*inputs())) == 0


def test_no_condition_is_one_zero_token():
    model, (x, t, cond) = make_backbone(), inputs()
    expected = model(x, t, torch.zeros(3, 1, 16))
    torch.testing.assert_close(model(x, t), expected, rtol=0, atol=0)
    assert (model(x, t, cond) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{}, dict(transition="key", sink_isolation=True, steps=2), dict(steps=0), dict(rope_theta=100.0)]
)
def test_padding_changes_nothing(options):
    model, (x, t, cond) = make_backbone(**options), inputs()
    short = model(x[:, :5], t, cond[:, :2])
    mask, cond_mask = (torch.arange(7) < 5).expand(3, 7), (torch.arange(4) < 2).expand(3, 4)
    padded = model(1e3 * (~mask)[..., None] + x, t, cond + 1e3 * (~cond_mask)[..., None], cond_mask, mask=mask)
    torch.testing.assert_close(padded[:, :5], short, rtol=0, atol=1e-5)  # seen: 0


def test_positions_along_several_axes():
    grid = torch.tensor([(column, row) for row in range(3) for column in range(5)])
    torch.testing.assert_close(sincos_positions(grid, 16), sincos_2d(3, 5, 16), rtol=0, atol=0)
    three = sincos_positions(torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 2]]), 16)  # 4 + 4 + 4, and 4 left over
    assert three.shape == (3, 16) and torch.count_nonzero(three[:, 12:]) == 0
    differ = (three[1:] != three[0]).unflatten(1, (4, 4)).any(-1).tolist()
    assert differ == [[True, False, False, False], [False, False, True, False]]
    with pytest.raises(ValueError, match="position_ids: got 9 axes for a width of 16; expected 1 to 8"):
        sincos_positions(torch.zeros(1, 9, dtype=torch.int64), 16)


def test_tokens_are_a_set_but_for_their_positions():
    model, (x, t, cond) = make_backbone(), inputs()
    ids, order = torch.arange(7)[:, None] * torch.tensor([1, 3]), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    moved = model(x[:, order], t, cond, position_ids=ids[order])
    torch.testing.assert_close(moved, model(x, t, cond, position_ids=ids)[:, order], rtol=0, atol=1e-5)  # seen: 3e-7
    assert (model(x[:, order], t, cond, position_ids=ids) - moved).abs().max() > 1e-3


@pytest.mark.parametrize("time_conditioning", ["add", "adaln"])
def test_a_condition_of_one_token_takes_the_same_values_by_a_shorter_way(time_conditioning):
    model = make_backbone(time_conditioning=time_conditioning).train()
    x, t, cond = inputs(tokens=1)
    results = []
    for mask in (None, torch.ones(3, 1, dtype=torch.bool)):  # with a mask it attends
        model.zero_grad()
        out = model(x, t, cond, mask)
        out.square().sum().backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters()}))
    (short, gradients), (long, expected) = results
    torch.testing.assert_close(short, long, rtol=0, atol=1e-5)
    for name, gradient in expected.items():
        given = torch.zeros_like(gradient) if gradients[name] is None else gradients[name]
        torch.testing.assert_close(given, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, dict(time_conditioning="adaln", cond_dim=5), dict(attention_dropout=0.1)])
def test_gradients_reach_every_parameter(options):
    model = make_backbone(**options).train()
    x, t, cond = inputs(cond_dim=model.config.cond_width)
    model(x, t, cond).square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent, silent


def test_dropout_acts_in_training_alone():
    for options in (dict(dropout=0.5), dict(attention_dropout=0.5)):
        model, plain = make_backbone(**options), make_backbone()
        args = inputs()
        torch.testing.assert_close(model(*args), plain(*args), rtol=0, atol=0)
        model.train()
        assert (model(*args) - plain(*args)).abs().max() > 1e-3


def test_encoder_block_leaves_out_masked_tokens():
    torch.manual_seed(0)
    block, x = QGFDEncoderBlock(qgfd_config()), torch.randn(2, 6, 16)
    mask = (torch.arange(6) < 4).expand(2, 6)
    torch.testing.assert_close(block(x, mask)[:, :4], block(x[:, :4]), rtol=0, atol=1e-5)  # seen: 0


def test_half_precision():
    model, args = make_backbone(), inputs()
    expected = model(*args)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(*args).float()
    assert 0 < (rounded - expected).norm() / expected.norm() < 0.03  # seen: 0.006
    half = model.to(torch.bfloat16)(args[0].bfloat16(), args[1], args[2].bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - expected).norm() / expected.norm() < 0.05  # seen: 0.012


def test_checkpoints(tmp_path):
    model, args = make_backbone(time_conditioning="adaln", cond_dim=5, alpha=0.3), inputs(cond_dim=5)
    model.save_pretrained(tmp_path / "a")
    again = QGFDBackbone.from_pretrained(tmp_path / "a")
    assert again.config == model.config and not again.training
    torch.testing.assert_close(again(*args), model(*args), rtol=0, atol=0)
    assert QGFDBackbone.from_pretrained(tmp_path / "a", dtype=torch.bfloat16).x_proj.weight.dtype == torch.bfloat16
    whole = make_model("tabular").eval()
    whole.save_pretrained(tmp_path / "b")
    part = QGFDBackbone.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(part(*inputs()), whole.backbone(*inputs()), rtol=0, atol=0)


def test_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        QGFDBackbone.from_pretrained(tmp_path)
    make_backbone().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, match in (
        (dict(_class_name="DiT"), "_class_name: got 'DiT'; expected 'QGFDBackbone' or 'QGFDModel'"),
        (dict(hidden=3), "not the configuration of a QGFD model.*hidden"),
        (dict(num_heads=3), "not the configuration of a QGFD model.*num_heads"),
        (dict(num_layers=1), r"blocks\.1\..*is unknown"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=match) as caught:
            QGFDBackbone.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="model.safetensors: cut short"):
        QGFDBackbone.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        dict(latent_dim=0), dict(num_heads=3), dict(hidden_size=7, num_heads=7), dict(dropout=1.0), dict(steps=-1),
        dict(steps=1.5),
        dict(alpha=1.5), dict(temperature=0.0), dict(time_conditioning="mul"), dict(transition="query"),
        dict(recurrence="walk"), dict(sink_isolation=True), dict(cond_dim=0), dict(attention_dropout=-0.1),
        dict(rope_theta=1.0), dict(rope_theta=100.0, hidden_size=18, num_heads=6),
    ],
)  # fmt: skip
def test_bad_configurations_are_one_line(options):
    with pytest.raises(ValueError, match=rf"QGFDConfig\.{next(iter(options))}: got .*; expected") as caught:
        QGFDConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, error, match",
    [
        (dict(x_t=torch.zeros(3, 7, 11)), ValueError, r"x_t: got shape \[3, 7, 11\]; expected \[B, L, 12\]"),
        (dict(x_t=torch.zeros(3, 7, 12).double()), TypeError, "x_t: got torch.float64 for a model in torch.float32"),
        (dict(t=torch.zeros(2)), ValueError, r"t: got shape \[2\]; expected \[3\]"),
        (dict(cond_tokens=torch.zeros(3, 4, 15)), ValueError, r"cond_tokens: .* expected \[3, M, 16\]"),
        (
            dict(cond_tokens=None, cond_mask=torch.ones(3, 1, dtype=torch.bool)),
            ValueError,
            "cond_mask: got one without",
        ),
        (dict(cond_mask=torch.ones(3, 4)), TypeError, "cond_mask: got dtype torch.float32; expected torch.bool"),
        (dict(mask=torch.ones(3, 6, dtype=torch.bool)), ValueError, r"mask: got shape \[3, 6\]; expected \[3, 7\]"),
        (dict(position_ids=torch.zeros(6, 1)), ValueError, r"position_ids: got shape \[6, 1\]; expected \[7, axes\]"),
    ],
)
def test_bad_inputs_are_one_line(change, error, match):
    x, t, cond = inputs()
    with pytest.raises(error, match=match):
        make_backbone()(**{**dict(x_t=x, t=t, cond_tokens=cond), **change})
