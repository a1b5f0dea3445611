"""What is chosen between: by whichever is faster, and never another result beyond rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdiff import _C, tuning
from fastdiff.device import autocast_dtype
from fastdiff.nn.attention import SelfAttention, self_attention_path
from fastdiff.nn.attention_path import products_win
from fastdiff.ops import adaln, gated_residual_adaln, masked_linear_cross_entropy
from fastdiff.ops._sizes import measure_sizes
from fastdiff.tuning import measuring, using

KEY = "attention {}, 16 channels, {}"
PACKED = "self-attention {}, 16 channels, {} tokens, {}"


def query(length, dtype=torch.float32, grad=False):
    return torch.zeros(2, 2, length, 16, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize(("crossing", "expected"), [(100, "16-64"), (10, "none"), (5000, "16-1024"), (300, "16-256")])
def test_attention_is_by_what_is_faster_at_each_length(clock, monkeypatch, crossing, expected):
    """Products cost L², fused attention `crossing` · L: it pays from there on."""
    seen = []

    def products(query, key, value):
        seen.append((query.dtype, query.requires_grad, *query.shape[1::2]))
        clock.work(query.shape[-2] ** 2)
        return query

    def fused(query, key, value):
        clock.work(crossing * query.shape[-2])
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    with measuring() as made:
        for length in (1, 16, 49, 64, 65, 100, 1024, 2000):
            wins = products_win(query(length, torch.bfloat16, grad=True), products)
            assert wins == (1 << (max(length, 16) - 1).bit_length() <= min(crossing, 1024))
        assert set(seen) == {(torch.bfloat16, True, 2, 16)}
        products_win(query(49), products)
    assert made == {KEY.format("bfloat16", "training"): expected, KEY.format("float32", "inference"): expected}


def test_short_sequences_may_be_left_to_fused_attention(clock, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: (clock.work(10 + q.shape[-2]), q)[1])
    with measuring():
        won = [products_win(query(n), lambda q, k, v: (clock.work(50), q)[1]) for n in (16, 32, 40, 64, 1024)]
    assert won == [False, False, True, True, True]


def test_attention_has_a_default_where_nothing_is_measured(clock):
    def never(query, key, value):
        raise AssertionError("measured")

    for dtype, longest in ((torch.float32, 128), (torch.bfloat16, 512), (torch.float16, 512)):
        assert products_win(query(longest, dtype), never) and not products_win(query(longest + 1, dtype), never)
    with using({KEY.format("float32", "inference"): "32-64"}):
        assert [products_win(query(n), never) for n in (16, 17, 64, 65)] == [False, True, True, False]
    with measuring():
        assert not products_win(query(8, torch.float64), never)


def test_a_compiler_sees_the_default(clock):
    torch.manual_seed(0)
    model, x = SelfAttention(32, 2), torch.randn(1, 20, 32)
    expected = SelfAttention(32, 2, backend="fused")
    expected.load_state_dict(model.state_dict())
    with measuring() as made, torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert not made and torch.equal(found, expected(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_choice_of_attention_changes_rounding_alone(dtype):
    torch.manual_seed(0)
    model, x = SelfAttention(32, 2), torch.randn(2, 24, 32)
    key, found = PACKED.format(str(dtype).removeprefix("torch."), 32, "training"), {}
    for chosen in ("fused", "matmul", "sdpa"):
        with using({key: chosen}), torch.autocast("cpu", dtype, dtype == torch.bfloat16):
            out = model(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), model.qkv.weight)
        found[chosen] = out.float(), gradient
    assert not torch.equal(found["fused"][1], found["matmul"][1])  # the choice was made
    # seen: 1.2e-7 and 3e-7 in float32, 0.003 and 0.005 in bfloat16
    bound = 1e-5 if dtype == torch.float32 else 0.03
    for chosen in ("matmul", "sdpa"):
        for one, other in zip(found[chosen], found["fused"], strict=True):
            assert (one - other).norm() < bound * other.norm()


@pytest.mark.parametrize("fastest", ["fused", "matmul", "sdpa"])
@pytest.mark.parametrize("grad", [True, False])
def test_self_attention_goes_the_fastest_way(clock, monkeypatch, fastest, grad):
    def way(name):
        return lambda qkv: (clock.work(1 if name == fastest else 2), qkv[:, :, 0])[1]

    monkeypatch.setattr("fastdiff.nn.attention.PACKED_WAYS", {name: way(name) for name in ("fused", "matmul", "sdpa")})
    qkv = torch.zeros(2, 49, 3, 2, 16, requires_grad=grad)
    with measuring() as made:
        assert self_attention_path(qkv) == fastest
        assert self_attention_path(qkv[:, :40]) == fastest
    assert made == {PACKED.format("float32", 64, "training" if grad else "inference"): fastest}
    assert self_attention_path(qkv) == "fused"  # outside of a run nothing is measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_loss_change_rounding_alone(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1100, 24), torch.randn(70, 24)
    targets, mask, found = torch.randint(70, (1100,)), torch.rand(1100) < 0.95, {}
    for rows in (256, 512, 1024):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        with using({f"masked loss {str(dtype).removeprefix('torch.')}, 32 features": rows}):
            loss, _ = masked_linear_cross_entropy(h, w, targets, mask)
        loss.backward()
        found[rows] = loss.detach(), h.grad.float(), w.grad.float()
    # the choice was made: float32 adds the same in the same order
    assert torch.equal(found[256][2], found[1024][2]) == (dtype == torch.float32)
    for rows in (256, 1024):
        for one, other in zip(found[rows], found[512], strict=True):
            # seen: 1e-7 in float32, 1.5e-3 in bfloat16, whose gradient is rounded at each of a few chunks
            assert (one - other).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * other.norm()


def test_chunks_of_the_loss_are_measured_where_several_are_wanted(clock):
    hidden, weight, targets = torch.randn(300, 8), torch.randn(20, 8), torch.zeros(300, dtype=torch.int64)
    clock.tick = 0.1
    with measuring() as made:
        masked_linear_cross_entropy(hidden, weight, targets, torch.arange(300) < 256)
        assert not made
        masked_linear_cross_entropy(hidden, weight, targets, torch.ones(300, dtype=torch.bool))
    assert made == {"masked loss float32, 8 features": 512}  # all as fast: the default


@pytest.fixture
def sizes():
    before = _C.tuning()
    yield
    for name, value in before.items():
        _C.set_tuning(name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_kernels_change_nothing_at_all(sizes, dtype):
    torch.manual_seed(0)
    x, branch = torch.randn(2, 2, 40, 96).to(dtype)
    gate, shift, scale = torch.randn(3, 2, 96)
    threads, found = torch.get_num_threads(), []
    try:
        for thread_grain, stream_bytes, count in ((16384, 1 << 40, 1), (1, 1, 2), (300, 1, 1), (300, 1 << 40, 2)):
            torch.set_num_threads(count)
            _C.set_tuning("thread_grain", thread_grain)
            _C.set_tuning("stream_bytes", stream_bytes)
            assert _C.tuning() == {"thread_grain": thread_grain, "stream_bytes": stream_bytes}
            operands = [each.clone().requires_grad_() for each in (x, branch, gate, shift, scale)]
            residual, out = gated_residual_adaln(*operands)
            out = adaln(out, operands[3], operands[4])
            grads = torch.autograd.grad((out.float() * residual.float()).sum(), operands)
            found.append((residual.detach(), out.detach(), *grads))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_sizes_of_kernels_are_checked(sizes):
    for name, value in (("thread_grain", -1), ("stream", 1)):
        with pytest.raises(ValueError, match=f"{name}: got {value}; expected thread_grain or stream_bytes"):
            _C.set_tuning(name, value)
    _C.set_tuning("thread_grain", 5)
    _C.set_tuning("thread_grain", 0)
    assert _C.tuning()["thread_grain"] == 16384


def test_sizes_are_measured_and_given_to_the_kernels(clock, sizes):
    clock.tick = 0.1  # all contenders are as fast
    measure_sizes()
    cache = tuning.last_cache_bytes()
    for name in ("thread_grain", "stream_bytes")[torch.get_num_threads() < 2 : 1 + (cache is not None)]:
        assert tuning.entries()[name]["chosen"] == _C.tuning()[name] > 0


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)


@pytest.mark.parametrize(("rounded", "expected"), [(2.0, None), (0.5, torch.bfloat16), (1.0, torch.bfloat16)])
def test_a_model_alone_computes_in_the_precision_of_its_products(clock, monkeypatch, rounded, expected):
    """On a CPU with bfloat16 instructions: those of an Intel, on which float32 is faster, and those of an AMD."""

    def linear(x, weight):
        clock.work(rounded if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr("fastdiff.device.computes_bf16", lambda device_type: True)
    monkeypatch.setattr(F, "linear", linear)
    model = Products()
    assert autocast_dtype("auto", "cpu", model) == torch.bfloat16  # outside of a run: the default
    with measuring():
        assert autocast_dtype("auto", "cpu", model) == expected
        assert autocast_dtype("bf16", "cpu", model) == torch.bfloat16 and autocast_dtype("no", "cpu", model) is None
        monkeypatch.setattr("fastdiff.device.computes_bf16", lambda device_type: False)
        assert autocast_dtype("auto", "cpu", model) is None
    for value, dtype in (("no", None), ("bf16", torch.bfloat16)):
        with using({"mixed_precision": value}):
            assert autocast_dtype("auto", "cpu", model) == dtype
