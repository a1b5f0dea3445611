"""The Triton launch functions of QGFD attention against fp64, in Triton's interpreter.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_qgfd.py
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastdiff import backends, ops
from fastdiff.kernels.qgfd import triton_kernels as kernels
from ops.triton_interpreter import programs, shuffled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Ratios of norms, of results and of gradients. The largest seen: 2.0e-7, 9.9e-07 (fp32); 2.7e-3, 4.6e-3 (bf16);
# 3.4e-4, 1.8e-3 (fp16; at head size 1, whose gradients are differences of near terms, else 7.3e-4).
TOLERANCE = {F32: (4e-7, 1.5e-6), BF16: (5e-3, 9e-3), F16: (7e-4, 3e-3)}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows, so that short sequences have several."""
    for table in (kernels.HOP_TILES, kernels.GRADIENT_TILES):
        for dtype in table:
            monkeypatch.setitem(table, dtype, dict.fromkeys((64, 128, 256), kernels.Tile(16, 16, 4, 1, 256)))


@dataclass
class Problem:
    """The operator's arguments, and a gradient of its result."""

    heads: list[Tensor]  # query, key, value
    grad_out: Tensor
    masks: list[Tensor | None]  # key_mask, row_begin, row_end
    hops: int = 2
    mixed: tuple[int, int] = (1, 0)
    scale: float = 0.3
    alpha: float = 0.6

    @property
    def numbers(self) -> tuple:
        return self.scale, self.hops, *self.mixed, self.alpha


def randn(*shape: int, seed: int = 0, dtype=F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(shape, dtype=F32, kv_heads=None, keys=None, key_mask=False, bounds="", layout="plain", **numbers) -> Problem:
    """bounds: "begin", "end", both, with "each" one row per sample; some intervals are empty, some beyond the keys."""
    batch, heads, queries, dim = shape
    kv_heads, keys = kv_heads or heads, queries if keys is None else keys

    def tensor(heads: int, rows: int, seed: int) -> Tensor:
        if layout == "turned":
            return randn(batch, rows, heads, dim, seed=seed, dtype=dtype).transpose(1, 2)
        if layout == "sliced":
            return randn(batch, heads + 1, rows + 1, dim + 5, seed=seed, dtype=dtype)[:, 1:, 1:, 3:-2]
        return randn(batch, heads, rows, dim, seed=seed, dtype=dtype)

    generator = torch.Generator().manual_seed(9)
    own = batch if "each" in bounds else 1
    begin = torch.randint(-2, max(keys // 2, 1), (own, queries), generator=generator, dtype=torch.int32)
    end = torch.randint(keys // 3, keys + 3, (own, queries), generator=generator, dtype=torch.int32)
    mask = torch.rand(batch, keys, generator=generator) < 0.7
    tensors = [tensor(heads, queries, 1), tensor(kv_heads, keys, 2), tensor(kv_heads, keys, 3)]
    masks = [mask if key_mask else None, begin if "begin" in bounds else None, end if "end" in bounds else None]
    return Problem(tensors, tensor(heads, queries, 4), masks, **numbers)


def exact(p: Problem) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out [B, L, H, d], lse, gradients of query, and of key and value a query head) by the definition, in fp64."""
    query, key, value = (t.double() for t in p.heads)
    groups = query.shape[1] // key.shape[1]
    leaves = [t.requires_grad_() for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value)))]
    query, key, value = leaves
    seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    key_mask, begin, end = p.masks
    j = torch.arange(key.shape[2])
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    if begin is not None:
        seen = seen & (j >= begin[:, None, :, None])
    if end is not None:
        seen = seen & (j < end[:, None, :, None])
    some = seen.any(-1, keepdim=True)
    scores = (query @ key.mT * p.scale).masked_fill(~seen & some, -torch.inf)
    m, u = scores.softmax(-1) * some, value
    for hop in range(1, p.hops + 1):
        u = m @ u
        if p.mixed[0] <= hop <= p.mixed[1]:
            u = p.alpha * u + (1 - p.alpha) * value
    lse = scores.logsumexp(-1) * some[..., 0]
    grads = torch.autograd.grad(u, leaves, p.grad_out.double())
    return u.detach().transpose(1, 2), lse.detach(), [g.transpose(1, 2) for g in grads]


def error(result: Tensor, truth: Tensor) -> float:
    """As a ratio of norms; where the truth is 0 (softmax over one key has no gradient), against terms near 1."""
    assert result.shape == truth.shape and result.isfinite().all()
    return ((result.double() - truth).norm() / (truth.norm() if truth.any() else truth.numel() ** 0.5)).item()


SEEN = {}


def run(p: Problem) -> tuple[Tensor, ...]:
    """(out, lse, passes, gradients of query, key, value) of the launch functions."""
    out, lse, passes = kernels.qgfd_forward_saved(*p.heads, *p.masks, *p.numbers)
    grads = kernels.qgfd_backward(p.grad_out, *p.heads, out, lse, passes, *p.masks, *p.numbers)
    return out, lse, passes, *grads


def check(p: Problem) -> tuple[Tensor, ...]:
    """Everything that the launch functions give, compared with the definition."""
    out, lse, passes, *grads = run(p)
    truth, log_sums, grad_truth = exact(p)
    forward, backward = TOLERANCE[out.dtype]
    assert out.is_contiguous() and all(g.is_contiguous() and g.dtype == out.dtype for g in grads)
    torch.testing.assert_close(lse.double(), log_sums, rtol=1e-5, atol=1e-5)
    assert error(out, truth) <= forward
    for name, grad, exact_grad in zip(("query", "key", "value"), grads, grad_truth, strict=True):
        assert error(grad, exact_grad) <= backward, name
    return out, lse, passes, *grads


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [1, 33, 40, 64, 256])
def test_head_sizes(dim, dtype):
    check(make((1, 2, 9, dim), dtype, scale=dim**-0.5, mixed=(1, 1)))


MIXED = {"none": (1, 0), "the-first": (1, 1), "the-last": (3, 3), "all": (1, 3), "all-but-the-last": (1, 2)}


@pytest.mark.parametrize("mixed", MIXED)
def test_recurrences(small_tiles, mixed):
    p = make((1, 1, 17, 8), BF16 if mixed == "all" else F32, hops=3, mixed=MIXED[mixed])
    out = check(p)[0]
    assert torch.equal(kernels.qgfd_forward(*p.heads, *p.masks, *p.numbers), out)


@pytest.mark.parametrize("bounds", ["", "begin", "end", "begin end", "begin end each"])
@pytest.mark.parametrize("key_mask", [False, True], ids=["", "key-mask"])
def test_masks(small_tiles, key_mask, bounds):
    check(make((2, 1, 34, 8), key_mask=key_mask, bounds=bounds, mixed=(1, 1)))


def test_whole_tiles_within_intervals(small_tiles):
    """Causal, causal with a prefix, and sequences: tiles that are skipped, seen in part, seen whole."""
    p = make((1, 1, 55, 8), hops=1)
    i = torch.arange(55, dtype=torch.int32)[None]
    starts = torch.tensor([0, 20, 37])[torch.searchsorted(torch.tensor([20, 37]), i, right=True)].int()
    for begin, end in ((None, i + 1), (None, (i + 1).clamp_min(33)), (starts, None), (starts, i + 1), (i, i + 1)):
        p.masks[1:] = begin, end
        check(p)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads):
    p = make((2, 6, 9, 8), kv_heads=kv_heads, mixed=(1, 2), layout="turned")
    check(p)


@pytest.mark.parametrize("layout", ["turned", "sliced"])
@pytest.mark.parametrize("dim", [32, 33])
def test_heads_in_place(layout, dim):
    p, plain = (make((2, 2, 10, dim), layout=name, key_mask=True, bounds="end") for name in (layout, "plain"))
    for a, b in zip(p.heads, plain.heads, strict=True):
        b.copy_(a)
    plain.grad_out.copy_(p.grad_out)
    assert not p.heads[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(check(p), run(plain), strict=True))


def test_a_gradient_that_is_one_number():
    p = make((1, 2, 9, 8))
    p.grad_out = torch.ones(()).expand(1, 2, 9, 8)
    check(p)


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (40, 1), (17, 33)])
def test_as_many_keys_as_there_are(small_tiles, queries, keys):
    check(make((1, 2, queries, 8), keys=keys, hops=1, key_mask=keys > 1, bounds="end" if keys > 1 else ""))


@pytest.mark.parametrize("kind", ["key_mask", "interval"])
def test_rows_without_a_key(small_tiles, kind):
    p = make((2, 1, 21, 8), mixed=(1, 1))
    if kind == "key_mask":
        p.masks[0] = torch.ones(2, 21, dtype=torch.bool)
        p.masks[0][1] = False
    else:
        p.masks[2] = torch.full((2, 21), 21, dtype=torch.int32)
        p.masks[2][1] = 0
    out, lse, _, *grads = check(p)
    assert not out[1].any() and not lse[1].any() and not grads[0][1].any() and not grads[1][1].any()


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # of hidden weights
def test_hidden_keys_whose_weights_would_overflow(small_tiles):
    p = make((1, 1, 19, 8), key_mask=True, dtype=F16)
    p.heads[1][:, :, ~p.masks[0][0]] *= 1000
    p.scale = 1.0
    check(p)


def test_sizes_without_elements():
    for shape, keys in (((0, 2, 5, 8), 5), ((2, 0, 5, 8), 5), ((2, 2, 0, 8), 5), ((2, 2, 5, 8), 0)):
        query, key = randn(*shape), randn(*shape[:2], keys, 8)
        arguments = (query, key, key, None, None, None, 0.3, 1, 1, 0, 1.0)
        out, lse, passes = kernels.qgfd_forward_saved(*arguments)
        assert out.shape == (shape[0], shape[2], shape[1], 8) and not out.any() and not lse.any()
        grads = kernels.qgfd_backward(query, query, key, key, out, lse, passes, *arguments[3:])
        assert [g.shape[1] for g in grads] == [shape[2], keys, keys] and not any(g.any() for g in grads)


def test_a_sample_alone_and_in_any_order_of_programs(small_tiles):
    p = make((2, 1, 34, 8), BF16, key_mask=True, bounds="begin end each", mixed=(1, 2))
    whole = run(p)
    one = Problem([t[1:2] for t in p.heads], p.grad_out[1:2], [m[1:2] for m in p.masks], 2, (1, 2))
    out, lse, passes, *grads = run(one)
    for a, b in zip((out, lse, *grads), (whole[0], whole[1], *whole[3:]), strict=True):
        assert torch.equal(a, b[1:2])
    assert torch.equal(passes, whole[2][:, 1:2])
    with programs(shuffled(seed=1)):
        assert all(torch.equal(a, b) for a, b in zip(run(p), whole, strict=True))


def test_heads_beyond_2_to_31_elements(monkeypatch):
    """Rows 2^27 elements apart, in 5 GB of which nothing else is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    p = make((1, 1, 18, 16), BF16, mixed=(1, 1), bounds="end")
    far = []
    for t in (*p.heads, p.grad_out):
        memory = torch.empty(17 * 2**27 + 16, dtype=BF16)
        far.append(memory.as_strided((1, 1, 18, 16), (0, 0, 2**27, 1)))
        far[-1].copy_(t)
    near = check(p)
    p.heads, p.grad_out = far[:3], far[3]
    with programs(lambda grid: list(itertools.product(*map(range, grid)))):
        assert all(torch.equal(a, b) for a, b in zip(run(p), near, strict=True))


def test_more_tiles_than_a_grid_has_are_an_error():
    query = torch.empty(2**16, 2**16, 8, 16, device="meta")
    with pytest.raises(ValueError, match="4294967296 tiles; the triton backend takes at most 2147483647: split"):
        kernels.qgfd_forward(query, query, query, None, None, None, 1.0, 1, 1, 0, 1.0)


def test_fullgraph_compile_equals_eager():
    q, k, v = (randn(1, 2, 9, 8, seed=s).requires_grad_() for s in range(3))

    def run(q, k, v):
        return ops.qgfd_attention(q, k, v, is_causal=True) + ops.qgfd_attention(q, k, v, transition="key")

    with backends.use_backend("triton"):
        eager = run(q, k, v)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
        assert torch.equal(eager, compiled)
        for a, b in zip(*(torch.autograd.grad(out.sum(), (q, k, v)) for out in (eager, compiled)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 1, "transition": "key"}], ids=str)
def test_what_hidden_keys_and_values_hold_does_not_matter(options):
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 6:] = False
    hidden, results = ~mask[:, None, :, None], []
    for what in (0.0, torch.nan, torch.inf):
        generator = torch.Generator().manual_seed(0)
        query, *others = (torch.randn(1, 1, 9, 16, generator=generator) for _ in range(3))
        operands = [t.requires_grad_() for t in (query, *(t.masked_fill(hidden, what) for t in others))]
        with backends.use_backend("triton"):
            out = ops.qgfd_attention(*operands, key_mask=mask, **options)
            results.append([out, *torch.autograd.grad(out.square().sum(), operands)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
