"""Mlp and FeedForward: one pass for bias and activation where the layers are plain, the modules where they are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastdiff import use_backend
from fastdiff.nn import Mlp
from fastdiff.nn.mlp import linear_activation
from fastdiff.nn.transformer import FeedForward

ACT = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def mlp(activation: str = "gelu") -> Mlp:
    torch.manual_seed(0)
    return Mlp(24, 40, activation=activation)


def public(m: Mlp, x: Tensor) -> Tensor:
    """As everybody writes it."""
    return m.fc2(ACT[m.activation](m.fc1(x)))


def gradients(function, module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]


@pytest.mark.parametrize("activation", ACT)
def test_mlp_equals_the_public_form(activation):
    m, x = mlp(activation), torch.randn(3, 7, 24)
    for ours, theirs in zip(gradients(m, m, x), gradients(lambda x: public(m, x), m, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert set(m.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("activation", ACT)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_equals_the_public_form(activation, gated, bias):
    torch.manual_seed(0)
    m, x = FeedForward(24, 40, activation=activation, gated=gated, bias=bias), torch.randn(3, 7, 24)

    def public(x: Tensor) -> Tensor:
        gate = ACT[activation](m.gate_proj(x) if gated else m.up_proj(x))
        return m.down_proj(gate * m.up_proj(x) if gated else gate)

    for ours, theirs in zip(gradients(m, m, x), gradients(public, m, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast_it_is_as_exact_as_the_public_form():
    m, x = mlp("gelu_tanh"), torch.randn(30, 24)
    exact = public(copy.deepcopy(m).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = m(x), public(m, x)
    assert ours.dtype == torch.bfloat16
    error, public_error = ((t.double() - exact).norm() / exact.norm() for t in (ours, theirs))
    assert error <= 1.2 * public_error


class Doubled(nn.Linear):
    """A layer that is more than its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, out: out + 1)
    return linear


def with_pre_hook(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return linear


def with_forward_of_its_own(linear: nn.Linear) -> nn.Linear:  # as accelerate's offloading
    inner = linear.forward
    linear.forward = lambda x: 3 * inner(x)
    return linear


def subclassed(linear: nn.Linear) -> nn.Linear:
    other = Doubled(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


def quantised(linear: nn.Linear) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


WRAPS = {
    "hook": with_hook, "pre-hook": with_pre_hook, "forward": with_forward_of_its_own, "subclass": subclassed,
    "weight-norm": parametrizations.weight_norm, "spectral-norm": parametrizations.spectral_norm,
    "quantised": quantised, "sequence": lambda linear: nn.Sequential(linear, nn.Tanh()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_layers_do_what_they_do(wrap):
    m, x = mlp(), torch.randn(5, 24)
    m.fc1 = WRAPS[wrap](m.fc1)
    m.eval()  # spectral norm would change with each call
    torch.testing.assert_close(m(x), public(m, x))
    up = WRAPS[wrap](nn.Linear(24, 40)).eval()
    for gate, value in ((m.fc1, up), (nn.Linear(24, 40), up), (m.fc1, nn.Linear(24, 40))):
        torch.testing.assert_close(linear_activation(gate, x, "silu", value), F.silu(gate(x)) * value(x))


def test_lora_around_the_first_layer():
    peft = pytest.importorskip("peft", reason="NOT TESTED: LoRA around an Mlp: peft is not installed")
    m, x = mlp(), torch.randn(5, 24)
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1"], init_lora_weights=False), m)
    for ours, theirs in zip(
        gradients(wrapped, wrapped, x), gradients(lambda x: public(wrapped, x), wrapped, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert m.fc1.lora_A["default"].weight.requires_grad


def test_it_compiles_as_a_whole_and_runs_anywhere():
    m, x = mlp("gelu_tanh"), torch.randn(5, 24)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, m, x), gradients(m, m, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    with use_backend("reference"):
        assert torch.equal(m(x), public(m, x))
    assert copy.deepcopy(m).to("meta")(x.to("meta")).shape == (5, 24)
    assert torch.func.vmap(m)(x).shape == (5, 24)
