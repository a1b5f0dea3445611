"""What the harness does not say of qk_norm_rotary: plain modules, schemas, refusals."""

import pytest
import torch

from fastdiff import BackendError, use_backend
from fastdiff.nn import SelfAttention
from fastdiff.nn.rotary import rotary_table
from fastdiff.ops import qk_norm_rotary as module
from fastdiff.ops.qk_norm_rotary import qk_norm_rotary
from ops.harness import check_operators, check_schemas

QKV, ONES, ANGLES = torch.zeros(2, 3, 3, 2, 8), torch.ones(2, 16), torch.zeros(3, 4)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_operators_and_their_schemas():
    qkv, parameters, angles = random(2, 3, 3, 2, 8), (random(2, 16), random(2, 16)), (random(3, 4), random(3, 4))
    calls = {
        "qk_norm_rotary": (qkv, *parameters, *angles, 1e-5),
        "qk_norm_rotary_saved": (qkv, *parameters, None, None, 1e-5),
        "qk_norm_rotary_backward": (qkv, qkv, random(6, 4).abs(), *parameters, *angles, True),
    }
    check_operators(module.SCHEMAS, calls)
    check_schemas(module.SCHEMAS)


@pytest.mark.parametrize("turns", [False, True])
def test_attention_gives_what_its_parts_give_when_they_are_called(turns):
    torch.manual_seed(0)
    attention, x = SelfAttention(32, 4, qkv_bias=False, qk_norm=True), torch.randn(2, 9, 32)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rotary = rotary_table(torch.arange(9)[None], 8, 10000.0) if turns else None
    results = []
    for how in ("fused", "reference", "hooked"):
        if how == "hooked":
            attention.q_norm.register_forward_hook(lambda *_: None)
        with use_backend("reference" if how == "reference" else "auto"):
            out = attention(x, rotary)
            grads = torch.autograd.grad(out.square().sum(), list(attention.parameters()))
        results.append((out, *grads))
    for other in results[1:]:
        for found, expected in zip(results[0], other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_backend_of_gpus_is_asked_for_the_norms():
    attention, x = SelfAttention(32, 4, qk_norm=True), torch.zeros(1, 3, 32)
    with use_backend("cuda"), pytest.raises(BackendError, match="fastdiff.adaln: backend 'cuda' was asked for"):
        attention(x)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_gradient_flows_to_angles(backend):
    qkv, weight = random(2, 3, 3, 2, 8).requires_grad_(), random(2, 16).requires_grad_()
    cosine, sine = (random(3, 4).requires_grad_() for _ in range(2))
    with use_backend(backend):
        out = qk_norm_rotary(qkv, weight, weight, cosine, sine)
        only_angles = qk_norm_rotary(qkv.detach(), weight.detach(), weight.detach(), cosine, sine)
    grads = torch.autograd.grad(out.square().sum(), (qkv, weight, cosine, sine), allow_unused=True)
    assert [grad is None for grad in grads] == [False, False, True, True] and not only_angles.requires_grad


def test_strided_operands_are_what_their_copies_are():
    qkv, angles = random(3, 2, 3, 2, 16).transpose(0, 1)[..., ::2], random(8, 3).t()
    operands = (qkv, random(16, 2).t(), random(2, 32)[:, ::2], angles[:, ::2], angles[:, 1::2])
    copies = [t.contiguous() for t in operands]
    results = []
    for leaves in (operands, copies):
        leaves = [t.detach().requires_grad_() for t in leaves[:3]] + list(leaves[3:])
        out = qk_norm_rotary(*leaves)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves[:3])))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("operands", "options", "message"),
    [
        (([1.0], ONES, ONES), {}, "qkv: got a list; expected a torch.Tensor"),
        ((QKV[0], ONES, ONES), {}, r"qkv: got shape \[3, 3, 2, 8\]; expected at least 5"),
        ((QKV[:, :, :2], ONES, ONES), {}, r"qkv: got shape \[2, 3, 2, 2, 8\]; expected \[B, N, 3, H, d\]"),
        ((QKV, ONES[:1], ONES), {}, r"weight: got shape \[1, 16\]; expected \[2, 16\]"),
        ((QKV, ONES, ONES[:, :8]), {}, r"bias: got shape \[2, 8\]; expected \[2, 16\]"),
        ((QKV, ONES, ONES, ANGLES), {}, "cosine, sine: got one of them; pass both or neither"),
        ((QKV, ONES, ONES, ANGLES, ANGLES[:2]), {}, r"sine: got shape \[2, 4\]; expected \[3, 4\]"),
        ((QKV[..., :7], ONES[:, :14], ONES[:, :14], ANGLES, ANGLES), {}, "got heads of 7 numbers with cosine and sine"),
        ((QKV, ONES, ONES), dict(eps=-1.0), "eps: got -1.0; expected a number >= 0"),
    ],
)
def test_what_does_not_fit_is_named(operands, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        qk_norm_rotary(*operands, **options)


def test_a_direct_call_that_does_not_fit_raises():
    raw, stats = torch.ops.fastdiff, torch.zeros(6, 4)
    for qkv in (QKV[:, :, :1], QKV.transpose(0, 1), QKV.double()):
        with pytest.raises(RuntimeError, match="does not fit|is float64"):
            raw.qk_norm_rotary(qkv, ONES, ONES, None, None, 1e-5)
    for weight, cosine, sine in ((ONES[:1], None, None), (ONES.half(), None, None), (ONES, ANGLES[:1], ANGLES)):
        with pytest.raises(RuntimeError, match="does not fit"):
            raw.qk_norm_rotary(QKV, weight, ONES, cosine, sine, 1e-5)
    with pytest.raises(RuntimeError, match="expected both or neither"):
        raw.qk_norm_rotary(QKV, ONES, ONES, ANGLES, None, 1e-5)
    for grad, some in ((QKV[:1], stats), (QKV, stats[:5])):
        with pytest.raises(RuntimeError, match="does not fit"):
            raw.qk_norm_rotary_backward(grad, QKV, some, ONES, ONES, None, None, True)
