"""What the harness does not say of conv_activation: torch's own convolution, schemas, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff import BackendError, use_backend
from fastdiff.nn import ConvMlp
from fastdiff.ops import conv_activation as module
from fastdiff.ops.conv_activation import conv_activation
from ops.harness import check_operators, check_schemas

X, WEIGHT, BIAS = torch.zeros(2, 3, 4, 8), torch.zeros(8, 1, 3, 3), torch.zeros(8)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_operators_and_their_schemas():
    x, taps, bias = random(2, 3, 4, 8), random(9, 8), random(8)
    calls = {
        "conv_activation": (x, taps, bias, None, 0),
        "conv_activation_backward": (x, x, taps, bias, bias, 2, True),
    }
    check_operators(module.SCHEMAS, calls)
    check_schemas(module.SCHEMAS)


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (8, 8), (9, 5)])
def test_torchs_convolution_and_its_gradients(grid):
    leaves = [random(3, *grid, 20), random(20, 1, 3, 3), random(20), random(20) * 3]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, weight, bias, x_bias = leaves
    plain = F.gelu(F.conv2d((x + x_bias).permute(0, 3, 1, 2), weight, bias, padding=1, groups=20)).permute(0, 2, 3, 1)
    ours, grad = conv_activation(x, weight, bias, x_bias=x_bias), random(3, *grid, 20)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for found, expected in zip(*(torch.autograd.grad(out, leaves, grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_mlp_with_a_convolution_is_one_operator_unless_somebody_wrapped_it():
    torch.manual_seed(0)
    mlp, x = ConvMlp(16, 40, activation="gelu"), torch.randn(2, 12, 16)
    with torch.profiler.profile() as profile:
        fused = mlp(x, (3, 4))
    assert any(event.name == "fastdiff::conv_activation" for event in profile.events())
    for backend in ("reference", "triton"):  # Triton has no such operator
        with use_backend(backend):
            torch.testing.assert_close(mlp(x, (3, 4)), fused, rtol=0, atol=1e-5)
    seen = []
    mlp.conv.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    torch.testing.assert_close(mlp(x, (3, 4)), fused, rtol=0, atol=1e-5)
    assert seen == [(2, 40, 3, 4)]
    mlp.fc1 = nn.Sequential(mlp.fc1)
    torch.testing.assert_close(mlp(x, (3, 4)), fused, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        ConvMlp(4, 4, activation="relu")


def test_strided_operands_are_what_their_copies_are():
    x, weight, bias = random(2, 6, 10, 24).transpose(1, 2)[..., ::2], random(9, 12).t().view(12, 1, 3, 3), random(24)
    operands = (x, weight, bias[::2])
    copies = [t.contiguous() for t in operands]
    results = []
    for leaves in (operands, copies):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = conv_activation(*leaves, x_bias=leaves[2])  # one tensor twice: its gradient is the sum of both
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_a_grid_too_large_for_the_kernel_goes_through_the_reference(monkeypatch):
    monkeypatch.setattr(module, "_MOST_TOKENS", 11)
    x, weight = random(1, 3, 4, 8), random(8, 1, 3, 3)
    with torch.profiler.profile() as profile:
        large, small = conv_activation(x, weight), conv_activation(x[:, :2], weight)
    assert sum(event.name == "fastdiff::conv_activation" for event in profile.events()) == 1
    assert large.shape == x.shape and small.shape == x[:, :2].shape
    with use_backend("cpu"), pytest.raises(BackendError, match="it takes grids of at most 11 tokens"):
        conv_activation(x, weight)


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        (([1.0], WEIGHT), "x: got a list; expected a torch.Tensor"),
        ((X[0], WEIGHT), r"x: got shape \[3, 4, 8\]; expected at least 4"),
        ((X.long(), WEIGHT), "x: got torch.int64; expected float32"),
        ((X, WEIGHT[:7]), r"weight: got shape \[7, 1, 3, 3\]; expected \[8, 1, 3, 3\]"),
        ((X, WEIGHT, BIAS[:3]), r"bias: got shape \[3\]; expected \[8\]"),
        ((X, WEIGHT, BIAS, "relu"), "activation: got 'relu'; expected one of gelu, gelu_tanh, silu"),
    ],
)
def test_what_does_not_fit_is_named(operands, message):
    with pytest.raises((TypeError, ValueError), match=message):
        conv_activation(*operands)


def test_a_direct_call_that_does_not_fit_raises():
    raw, taps = torch.ops.fastdiff, torch.zeros(9, 8)
    for x in (X[0], X.transpose(0, 1), X.double()):
        with pytest.raises(RuntimeError, match="does not fit|is float64"):
            raw.conv_activation(x, taps, None, None, 0)
    for operands in ((X, taps[:8], None, None, 0), (X, taps.half(), None, None, 0), (X, taps, BIAS[:2], None, 0)):
        with pytest.raises(RuntimeError, match="does not fit"):
            raw.conv_activation(*operands)
    with pytest.raises(RuntimeError, match="activation is 3"):
        raw.conv_activation(X, taps, None, None, 3)
    with pytest.raises(RuntimeError, match="grad_out does not fit"):
        raw.conv_activation_backward(X[:1], X, taps, None, None, 0, True)
