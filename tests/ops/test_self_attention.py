"""What the harness does not say of self_attention: torch's own attention, schemas, refusals, NaN."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops import self_attention as module
from fastdiff.ops.self_attention import self_attention
from ops.harness import check_operators, check_schemas

QKV = torch.zeros(2, 3, 3, 2, 8)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_operators_and_their_schemas():
    qkv, out, lse = random(2, 5, 3, 2, 8), random(2, 5, 2, 8), random(2, 2, 5)
    calls = {"self_attention": (qkv, 0.5), "self_attention_saved": (qkv, 0.5)}
    check_operators(module.SCHEMAS, calls | {"self_attention_backward": (out, qkv, out, lse, 0.5)})
    check_schemas(module.SCHEMAS)


@pytest.mark.parametrize("tokens", [1, 49, 130])
def test_torchs_attention_and_its_gradient(tokens):
    qkv = random(2, tokens, 3, 3, 24).requires_grad_()
    plain = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)
    ours, grad = self_attention(qkv), random(2, tokens, 3, 24)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)
    both = [torch.autograd.grad(out, qkv, grad)[0] for out in (ours, plain)]
    torch.testing.assert_close(*both, rtol=0, atol=5e-6)


def test_a_nan_spoils_its_head_alone():
    qkv = random(1, 20, 3, 2, 8)
    clean = self_attention(qkv)
    qkv[0, 3, 1, 0, 0] = torch.nan  # a key of the first head: every row of it
    spoilt = self_attention(qkv)
    assert spoilt[:, :, 0].isnan().all() and torch.equal(spoilt[:, :, 1], clean[:, :, 1])


@pytest.mark.parametrize(
    ("qkv", "scale", "message"),
    [
        ([1.0], None, "qkv: got a list; expected a torch.Tensor"),
        (QKV[0], None, r"qkv: got shape \[3, 3, 2, 8\]; expected at least 5"),
        (QKV[:, :, :2], None, r"qkv: got shape \[2, 3, 2, 2, 8\]; expected \[B, N, 3, H, d\]"),
        (QKV[..., :0], None, r"expected \[B, N, 3, H, d\] with d > 0"),
        (QKV.long(), None, "qkv: got torch.int64; expected float32"),
        (QKV, 0.0, "scale: got 0.0; expected a finite number above 0"),
        (QKV, float("nan"), "scale: got nan; expected a finite number above 0"),
    ],
)
def test_what_does_not_fit_is_named(qkv, scale, message):
    with pytest.raises((TypeError, ValueError), match=message):
        self_attention(qkv, scale=scale)


def test_a_direct_call_that_does_not_fit_raises():
    raw, out, lse = torch.ops.fastdiff, random(2, 3, 2, 8), random(2, 2, 3)
    for qkv in (QKV[:, :, :1], QKV.transpose(0, 1), QKV.double(), QKV[..., :0]):
        with pytest.raises(RuntimeError, match="does not fit|is float64"):
            raw.self_attention(qkv, 1.0)
    with pytest.raises(RuntimeError, match="scale is 0"):
        raw.self_attention(QKV, 0.0)
    for operands in ((out[:1], QKV, out, lse), (out, QKV, out.half(), lse), (out, QKV, out, lse[:1])):
        with pytest.raises(RuntimeError, match="does not fit"):
            raw.self_attention_backward(*operands, 1.0)
