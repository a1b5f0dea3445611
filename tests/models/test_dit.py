"""The DiT and its modules: conditioning, positions, attention backends, checkpointing, compilation, bad input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastdiff
from fastdiff import use_backend
from fastdiff.models import PRESETS, DiT, DiTConfig
from fastdiff.nn import (
    AdaLayerNorm,
    GatedResidualAdaLayerNorm,
    LabelEmbedding,
    Mlp,
    PatchEmbed,
    SelfAttention,
    TimestepEmbedding,
)
from fastdiff.nn.attention import prefers_matmul, self_attention_path


def small_dit(**overrides) -> DiT:
    """A DiT for 8 x 12 images with all weights random, so that no branch is gated away."""
    options = dict(
        input_size=(8, 12), patch_size=4, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5,
        mlp_activation="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**options, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(batch=4, size=(8, 12)):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 3, *size, generator=generator)
    return image, 1000 * torch.rand(batch, generator=generator), torch.arange(batch) % 5


def test_presets_have_the_published_sizes():
    published = {"DiT-S": (384, 12, 6), "DiT-B": (768, 12, 12), "DiT-L": (1024, 24, 16), "DiT-XL": (1152, 28, 16)}
    assert set(PRESETS) == {f"{name}/{patch}" for name in published for patch in (2, 4, 8)} | {
        "DiT-tiny", "llm2dit", "fmnist_t2i",
    }  # fmt: skip
    for name, sizes in published.items():
        with torch.device("meta"):
            config = DiT.from_preset(f"{name}/4").config
        assert (config.hidden_size, config.depth, config.num_heads) == sizes and config.patch_size == 4
    with torch.device("meta"):
        published_model = DiT.from_preset("DiT-XL/2", learn_sigma=True)
    # 675 M with the fixed positions, which are not parameters here
    assert sum(p.numel() for p in published_model.parameters()) == 675_129_632 - 256 * 1152
    tiny = DiT.from_preset("DiT-tiny", num_classes=3)
    assert tiny.config.num_classes == 3 and tiny(torch.zeros(1, 1, 28, 28), torch.zeros(1)).shape == (1, 1, 28, 28)


def test_a_new_model_predicts_zero():
    model = DiT.from_preset("DiT-tiny", depth=2)
    assert torch.count_nonzero(model(torch.randn(2, 1, 28, 28), torch.zeros(2))) == 0


@pytest.mark.parametrize("learn_sigma, channels", [(False, 3), (True, 6)])
def test_output_shape_and_other_grids(learn_sigma, channels):
    model = small_dit(learn_sigma=learn_sigma).eval()
    for size in ((8, 12), (4, 4), (16, 8)):
        image, time, labels = inputs(2, size)
        assert model(image, time, labels).shape == (2, channels, *size)
    trained = small_dit(input_size=(16, 8)).eval()
    trained.load_state_dict(small_dit().state_dict())
    image, time, labels = inputs(2, (16, 8))
    torch.testing.assert_close(small_dit().eval()(image, time, labels), trained(image, time, labels), rtol=0, atol=0)


def test_no_labels_are_null_labels_and_a_scalar_time_is_everyones():
    model = small_dit().eval()
    image, time, _ = inputs()
    null = torch.full((4,), 5)
    assert torch.equal(model(image, time), model(image, time, null))
    assert torch.equal(model(image, torch.tensor(3.0), null), model(image, torch.full((4,), 3.0), null))


@given(st.integers(0, 2), st.booleans())
@settings(max_examples=6, deadline=None)
def test_conditioning_by_layer_reaches_its_layer_alone(layer, embedders_per_block):
    model = small_dit(embedders_per_block=embedders_per_block).eval()
    image, time, labels = inputs(2)
    seen = {}
    for index, part in enumerate((*model.blocks, model.final_layer)):
        part.adaLN_modulation.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    model(image, time, labels)
    plain = dict(seen)
    extra = torch.zeros(2, 3, 32)
    extra[:, layer] = torch.randn(2, 32)
    model(image, time, labels, layer_conditioning=extra)
    for index in range(4):
        changed = index == layer or (index == 3 and layer == 2)  # the final layer reuses the last row
        expected = plain[index] + extra[:, layer] if changed else plain[index]
        torch.testing.assert_close(seen[index], expected, rtol=0, atol=0)


def test_constant_conditioning_by_token_equals_conditioning_by_sample():
    model = small_dit().eval()
    image, time, labels = inputs()
    extra = torch.randn(4, 32)
    by_layer = model(image, time, labels, layer_conditioning=extra[:, None].expand(4, 3, 32))
    by_token = model(image, time, labels, token_conditioning=extra[:, None].expand(4, 6, 32))
    torch.testing.assert_close(by_token, by_layer, rtol=0, atol=2e-5)  # seen: 1.2e-6
    varied = model(image, time, labels, token_conditioning=torch.randn(4, 6, 32))
    assert (varied - by_layer).abs().max() > 1e-3


def gradients(model, *args, **kwargs):
    model.zero_grad()
    model(*args, **kwargs).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("token_conditioning", [False, True])
def test_gradients_equal_those_of_the_reference_operators(token_conditioning):
    model = small_dit()
    image, time, labels = inputs()
    extra = dict(token_conditioning=torch.randn(4, 6, 32)) if token_conditioning else {}
    model.y_embedder.dropout_prob = 0.0
    ours = gradients(model, image, time, labels, **extra)
    with fastdiff.use_backend("reference"):
        expected = gradients(model, image, time, labels, **extra)
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm() / (gradient.norm() + 1e-12)
        assert error < 1e-4, (name, float(error))  # seen: 1e-6


def test_gradient_checkpointing_gives_equal_gradients():
    model = small_dit()
    again = copy.deepcopy(model)
    again.config.gradient_checkpointing = True
    results = []
    for candidate in (model, again):
        torch.manual_seed(3)  # label dropout
        results.append(gradients(candidate, *inputs()))
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_autocast_keeps_the_residual_stream_in_float32(norm):
    model = small_dit(norm=norm, norm_elementwise_affine=True).eval()
    streams = []
    model.blocks[1].register_forward_hook(lambda _, args, out: streams.append((args[0].dtype, out[1].dtype)))
    exact = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(*inputs())
    assert streams == [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03  # seen: 0.007


def test_half_precision_weights_give_half_precision_output():
    model = small_dit().to(torch.bfloat16).eval()
    image, time, labels = inputs()
    assert model(image.bfloat16(), time, labels).dtype == torch.bfloat16


def test_label_dropout_follows_the_given_generator():
    embedding = LabelEmbedding(5, 8, dropout_prob=0.3).train()
    labels = torch.zeros(2000, dtype=torch.int64)
    first = embedding.drop(labels, torch.Generator().manual_seed(7))
    assert torch.equal(first, embedding.drop(labels, torch.Generator().manual_seed(7)))
    assert set(first.unique().tolist()) == {0, 5} and 0.25 < (first == 5).float().mean() < 0.35
    torch.manual_seed(7)
    assert torch.equal(first, embedding.drop(labels))
    assert torch.equal(embedding.eval().drop(labels), labels)
    assert torch.equal(LabelEmbedding(5, 8, dropout_prob=1.0).train().drop(labels), torch.full_like(labels, 5))

    model = small_dit(class_dropout_prob=0.5).train()
    image, time, labels = inputs()
    runs = [model(image, time, labels, label_generator=torch.Generator().manual_seed(s)) for s in (0, 0, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@given(
    batch=st.integers(1, 3), tokens=st.sampled_from([1, 5, 16, 49]), heads=st.sampled_from([1, 3]),
    bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_attention_backends_agree(batch, tokens, heads, bias):
    torch.manual_seed(tokens)
    matmul = SelfAttention(24, heads, qkv_bias=bias, backend="matmul")
    sdpa = SelfAttention(24, heads, qkv_bias=bias, backend="sdpa")
    fused = SelfAttention(24, heads, qkv_bias=bias, backend="fused")
    for other in (sdpa, fused):
        other.load_state_dict(matmul.state_dict())
    x = torch.randn(batch, tokens, 24)
    torch.testing.assert_close(matmul(x), sdpa(x), rtol=0, atol=1e-5)  # seen: 4e-7
    torch.testing.assert_close(fused(x), sdpa(x), rtol=0, atol=1e-5)


def test_the_rule_for_attention_looks_at_device_dtype_and_length():
    assert prefers_matmul(torch.empty(1, 2, 49, 64, dtype=torch.bfloat16))
    assert prefers_matmul(torch.empty(1, 2, 49, 64))
    assert not prefers_matmul(torch.empty(1, 2, 1024, 64))
    assert not prefers_matmul(torch.empty(1, 2, 49, 64, device="meta"))

    qkv = torch.empty(1, 49, 3, 2, 64)
    assert self_attention_path(qkv) == "fused"
    assert self_attention_path(qkv.double()) == self_attention_path(qkv.to("meta")) == "sdpa"
    with use_backend("reference"):
        assert self_attention_path(qkv) == "matmul"
        assert self_attention_path(torch.empty(1, 1024, 3, 2, 64)) == "sdpa"


def test_norm_modules_and_a_first_site_without_a_branch():
    x, branch = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    shift, scale, gate = torch.randn(3, 2, 16)
    plain, gated = AdaLayerNorm(16), GatedResidualAdaLayerNorm(16)
    expected = nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(plain(x, shift, scale), expected, rtol=0, atol=1e-5)
    first = gated(x, None, None, shift, scale)
    assert first[0] is x and torch.equal(first[1], plain(x, shift, scale))
    stream, normed = gated(x, branch, gate, shift, scale)
    torch.testing.assert_close(stream, x + gate[:, None] * branch, rtol=0, atol=1e-6)
    torch.testing.assert_close(normed, plain(stream, shift, scale), rtol=0, atol=1e-5)
    assert {n for n, _ in AdaLayerNorm(16, norm="rms", elementwise_affine=True).named_parameters()} == {"weight"}


def test_patches_are_those_of_a_strided_convolution():
    embed = PatchEmbed(3, 16, 4)
    image = torch.randn(2, 3, 8, 12)
    expected = nn.functional.conv2d(image, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(image), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_as_one_graph_for_training_at_any_batch_size(checkpointing):
    torch._dynamo.reset()
    model = small_dit(depth=2, class_dropout_prob=0.0, gradient_checkpointing=checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for batch in (2, 3, 5):
        arguments = inputs(batch)
        torch.testing.assert_close(compiled(*arguments), model(*arguments), rtol=0, atol=1e-5)
        compiled(*arguments).sum().backward()
        graphs.append(counter["unique_graphs"])
    assert graphs[-1] == graphs[1], graphs  # nothing is compiled again for a new batch size
    torch._dynamo.reset()


def bad(match, error=ValueError, **changes):
    image, time, labels = inputs()
    arguments = dict(sample=image, timestep=time, class_labels=labels)
    return pytest.param({**arguments, **changes}, error, match, id=match.split()[0])


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        bad("sample: .*multiples of patch_size = 4", sample=torch.zeros(4, 3, 8, 10)),
        bad(r"sample: .*expected \[batch, 3, height, width\]", sample=torch.zeros(4, 1, 8, 12)),
        bad(r"sample: .*expected \[batch, 3", sample=torch.zeros(3, 8, 12)),
        bad("class_labels: got values 0..6; expected 0..5", class_labels=torch.tensor([0, 1, 6, 2])),
        bad("class_labels: got values -1", class_labels=torch.tensor([0, 1, -1, 2])),
        bad(r"class_labels: got shape \[3\]; expected \[4\]", class_labels=torch.tensor([0, 1, 2])),
        bad("class_labels: got dtype", TypeError, class_labels=torch.zeros(4)),
        bad(r"timestep: got shape \[3\]; expected \[4\]", timestep=torch.zeros(3)),
        bad(r"layer_conditioning: .*expected \[4, 3, 32\]", layer_conditioning=torch.zeros(4, 2, 32)),
        bad(r"token_conditioning: .*expected \[4, 6, 32\]", token_conditioning=torch.zeros(4, 5, 32)),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, error, match):
    model = small_dit()
    model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(error, match=match) as caught:
        model(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "build, match",
    [
        (lambda: DiTConfig(num_heads=5), "num_heads: got 5.*divisor of hidden_size = 384"),
        (lambda: DiTConfig(input_size=(32, 31)), "input_size.*patch_size = 2"),
        (lambda: DiTConfig(depth=0), "depth: got 0"),
        (lambda: DiTConfig(hidden_size=6, num_heads=1), "hidden_size: got 6; expected a multiple of 4"),
        (lambda: DiT(DiTConfig(norm="batch", depth=1)), "norm: got 'batch'; expected one of layer, rms"),
        (lambda: DiT(DiTConfig(attention="fast", depth=1)), "backend: got 'fast'"),
        (lambda: DiT.from_preset("DiT-M/2"), "name: got 'DiT-M/2'; expected one of DiT-S/2"),
        (lambda: Mlp(4, 8, activation="relu"), "activation: got 'relu'"),
        (lambda: TimestepEmbedding(8, frequency_dim=3), "frequency_dim: got 3"),
        (lambda: LabelEmbedding(5, 8, dropout_prob=1.5), "dropout_prob: got 1.5"),
        (lambda: SelfAttention(10, 3), "num_heads: got 3"),
    ],
)
def test_bad_configurations_are_one_line(build, match):
    with pytest.raises(ValueError, match=match) as caught:
        build()
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="DiTConfig: got width; expected its fields"):
        DiT.from_preset("DiT-S/2", width=3)
