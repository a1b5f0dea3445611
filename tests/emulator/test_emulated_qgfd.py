"""The CUDA kernels of QGFD attention, executed on the CPU, against dense matrices in float64.

Errors are ratios of norms. Cases run under three schedules of threads and blocks where they say so, which must agree to
the bit.
"""

import pytest
import torch
from build_emulator import sanitized_tests
from emulated_qgfd import Case, QgfdEmulator, exact
from torch import Tensor

from emulator import SCHEDULES

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of out, passes and the gradient of value, and of the gradients of query and key. Seen at most, on x86-64 with gcc 12:
# 3.5e-7 and 8.6e-7, 3.2e-3 and 6.7e-3, 2.7e-4 and 6.2e-4
VALUES = {F32: 6e-7, BF16: 5e-3, F16: 4.5e-4}
GRADS = {F32: 1.4e-6, BF16: 1e-2, F16: 1e-3}
LSE = 1e-6  # seen: 6.9e-7, absolute


@pytest.fixture
def qgfd(emulator) -> QgfdEmulator:
    return QgfdEmulator(emulator)


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def case(
    length: int, dim: int, dtype: torch.dtype = F32, *, batch=1, heads=1, kv_heads=None, keys=None, **options
) -> Case:
    kv_heads, keys = kv_heads or heads, length if keys is None else keys
    options = {"scale": dim**-0.5} | options
    query = randn(batch, heads, length, dim, dtype=dtype)
    key, value = (randn(batch, kv_heads, keys, dim, dtype=dtype, seed=s) for s in (1, 2))
    return Case(query, key, value, **options)


def bounds(*ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def causal(length: int) -> Tensor:
    return torch.arange(1, length + 1, dtype=torch.int32)[None]


def error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check(qgfd: QgfdEmulator, c: Case, paths: tuple[str, ...] = ("by_shape",)) -> list[tuple[Tensor, ...]]:
    """All results of forward and backward on each path, next to the truth."""
    dtype, grad_out = c.query.dtype, randn(*c.query.shape, dtype=c.query.dtype, seed=5)
    out, lse, passes, grads = exact(c, grad_out)
    results = []
    for path in paths:
        saved = qgfd.forward(c, path)
        assert error(saved[0].transpose(1, 2), out) <= VALUES[dtype]
        torch.testing.assert_close(saved[1].double(), lse, rtol=LSE, atol=LSE)
        assert error(saved[2], passes[: c.saved]) <= VALUES[dtype]
        made = qgfd.backward(c, grad_out, saved)
        for result, truth, tolerance in zip(made, grads, (GRADS[dtype], GRADS[dtype], VALUES[dtype]), strict=True):
            assert error(result.transpose(1, 2), truth) <= tolerance
        results.append((*saved, *made))
    return results


@pytest.mark.parametrize(
    "dim, dtype",
    [*((d, t) for d in (8, 32, 40, 64, 96, 128) for t in (F32, BF16)), *((d, F16) for d in (8, 64, 128))],
)
def test_head_sizes(qgfd, dim, dtype):
    check(qgfd, case(70, dim, dtype, hops=2, mixed=range(2, 3)), ("passes",))
    check(qgfd, case(33, dim, dtype, hops=3, mixed=range(1, 4)), ("fused",))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_largest_head_size(qgfd, dtype):
    check(qgfd, case(20, 256, dtype, hops=2, mixed=range(2, 3)), ("passes", "fused"))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("length", [2, 15, 16, 17, 63, 64, 65, 129])
def test_lengths(qgfd, length, dtype):
    c = case(length, 8, dtype, hops=2, heads=2)
    check(qgfd, c, ("passes", "fused") if qgfd.fuses(c) else ("passes",))


@pytest.mark.parametrize("path", ["passes", "fused"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_position_attends_to_itself(qgfd, dtype, path):
    c = case(1, 24, dtype, batch=2, heads=2, hops=3, mixed=range(1, 4))
    grad_out = randn(*c.query.shape, dtype=dtype, seed=5)
    saved = qgfd.forward(c, path)
    assert error(saved[0].transpose(1, 2), c.value.double()) <= VALUES[dtype]
    grad_query, grad_key, grad_value = qgfd.backward(c, grad_out, saved)
    assert error(grad_value.transpose(1, 2), grad_out.double()) <= VALUES[dtype]
    for grad in (grad_query, grad_key):  # M is 1, whatever they are; seen: 1.3e-7
        assert grad.double().norm() <= 1e-6 * grad_out.double().norm()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "hops, mixed",
    [(1, range(1, 2)), (2, range(0)), (2, range(1, 2)), (3, range(3, 4)), (4, range(1, 4)), (4, range(2, 4)),
     (4, range(1, 5)), (4, range(3, 5))],
)  # fmt: skip
def test_recurrences(qgfd, hops, mixed, dtype):
    c = case(37, 16, dtype, hops=hops, mixed=mixed, alpha=0.8)
    check(qgfd, c, ("passes", "fused") if hops > 1 else ("passes",))


@pytest.mark.parametrize("dim, hops, dtype", [(128, 6, BF16), (64, 4, F32)])
def test_more_hops_than_left_operands_stay_in_shared_memory(qgfd, dim, hops, dtype):
    check(qgfd, case(20, dim, dtype, hops=hops, mixed=range(1, hops + 1)), ("passes",))


def masks(length: int) -> dict[str, dict]:
    """Of two samples; the first has rows without keys in some."""
    i = torch.arange(length, dtype=torch.int32)
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[0, length // 3 :] = False
    padding[1, ::5] = False
    starts = (i // 50 * 50)[None]
    window = torch.stack([torch.full_like(i, length - 3), i // 2])
    none = torch.stack([i % 2 * length, i + 1])
    return {
        "causal": {"row_end": causal(length)},
        "padding": {"key_mask": padding},
        "causal_padding": {"row_end": causal(length), "key_mask": padding.flip(1)},
        "varlen": {"row_begin": starts, "row_end": (starts + 50).clamp(max=length).contiguous()},
        "prefix": {"row_end": causal(length).maximum(bounds([70], [5]))},
        "begins": {"row_begin": window},
        "ends_and_rows_without_keys": {"row_end": none},
        "no_keys_at_all": {"key_mask": torch.zeros(2, length, dtype=torch.bool)},
        "beyond": {"row_begin": window - length, "row_end": window + 2 * length},
    }


@pytest.mark.parametrize("length, dtype", [(140, F32), (140, BF16), (40, F32)])
@pytest.mark.parametrize("mask", list(masks(8)))
def test_masks(qgfd, mask, length, dtype):
    c = case(length, 8, dtype, batch=2, hops=2, mixed=range(2, 3), **masks(length)[mask])
    check(qgfd, c, ("passes", "fused") if length == 40 else ("passes",))


@pytest.mark.parametrize("path", ["passes", "fused"])
def test_rows_without_keys_are_zero_and_have_no_gradient(qgfd, path):
    c = case(70, 16, BF16, hops=2, row_end=(causal(70) - 3).contiguous())
    grad_out = randn(*c.query.shape, dtype=BF16)
    saved = qgfd.forward(c, path)
    assert not saved[0][:, :3].any() and not saved[1][..., :3].any() and not saved[2][..., :3, :].any()
    grad_query, grad_key, grad_value = qgfd.backward(c, grad_out, saved)
    assert not grad_query[:, :3].any() and not grad_key[:, -3:].any() and not grad_value[:, -3:].any()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("queries, keys", [(1, 70), (70, 2), (5, 130), (130, 33), (64, 128)])
def test_queries_and_keys_of_different_numbers(qgfd, queries, keys, dtype):
    ends = (causal(queries) + keys - queries).clamp(min=0)
    check(qgfd, case(queries, 16, dtype, keys=keys, heads=2, row_end=ends))


def test_grouped_heads(qgfd):
    mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(3)) < 0.7
    options = {"batch": 2, "heads": 4, "kv_heads": 2, "hops": 2, "mixed": range(1, 3), "key_mask": mask}
    check(qgfd, case(70, 8, BF16, **options), ("passes", "fused"))


def test_sizes_of_zero(qgfd):
    for shape in ({"batch": 0}, {"heads": 0, "kv_heads": 1}):
        c = case(5, 8, **shape)
        c.value = c.key
        results = (*qgfd.forward(c), *qgfd.backward(c, c.query, qgfd.forward(c)))
        assert all(t.numel() == 0 for t in results)
    no_keys, no_queries = case(70, 8, keys=0), case(0, 8, keys=70)
    saved = qgfd.forward(no_keys)
    assert not saved[0].any() and not saved[1].any()
    assert not qgfd.backward(no_keys, no_keys.query, saved)[0].any()
    grads = qgfd.backward(no_queries, no_queries.query, qgfd.forward(no_queries))
    assert not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize("path", ["passes", "fused"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides_and_alignment_change_no_bit(qgfd, dtype, path):
    plain = case(34, 24, dtype, batch=2, heads=2, hops=2, mixed=range(1, 3))
    grad_out = randn(*plain.query.shape, dtype=dtype, seed=5)
    expected = qgfd.forward(plain, path)
    expected_grads = qgfd.backward(plain, grad_out, expected)
    for offset, gap in ((0, 0), (1, 0), (0, 3)):  # aligned; every row off by one element; rows at any alignment
        row = 4 * 48 + gap
        packed = torch.full((2 * 34 * row + 8,), float("nan"), dtype=dtype)[offset : offset + 2 * 34 * row]
        parts = packed.view(2, 34, row)[..., : 4 * 48].view(2, 34, 4, 2, 24).unbind(2)
        given = (plain.query, plain.key, plain.value, grad_out)
        views = [part.transpose(1, 2).copy_(t) for part, t in zip(parts, given, strict=True)]
        c = Case(*views[:3], scale=plain.scale, hops=2, mixed=plain.mixed)
        saved = qgfd.forward(c, path)
        assert same(saved, expected)
        assert same(qgfd.backward(c, views[3], saved), expected_grads)


def test_offsets_beyond_31_bits(qgfd):
    c = case(9, 8, BF16, hops=2)
    memory = torch.empty(2**31 + 64, dtype=BF16)  # pages are only made where something is written
    far = memory.as_strided((1, 1, 9, 8), (0, 0, 2**28, 1))
    expected = qgfd.forward(c, "passes")
    for name in ("query", "key", "value"):
        views = {n: getattr(c, n) for n in ("query", "key", "value")}
        views[name] = far.copy_(views[name])
        assert same(qgfd.forward(Case(**views, scale=c.scale, hops=2), "passes"), expected)


@pytest.mark.parametrize("path", ["passes", "fused"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_results_depend_neither_on_schedule_nor_grid_nor_batch(qgfd, dtype, path):
    mask = torch.rand(2, 75, generator=torch.Generator().manual_seed(3)) < 0.7
    options = {"hops": 2, "mixed": range(1, 3), "row_end": causal(75)}
    c = case(75, 8, dtype, batch=2, key_mask=mask, **options)
    grad_out = randn(*c.query.shape, dtype=dtype, seed=5)

    def run(c: Case, grad_out: Tensor) -> tuple[Tensor, ...]:
        saved = qgfd.forward(c, path)
        return (*saved, *qgfd.backward(c, grad_out, saved))

    expected = run(c, grad_out)
    for schedule in SCHEDULES[1:]:
        qgfd.configure(schedule)
        assert same(run(c, grad_out), expected)
    qgfd.configure(max_grid=3)
    assert same(run(c, grad_out), expected)
    qgfd.configure()
    alone = Case(*(t[1:] for t in (c.query, c.key, c.value)), key_mask=mask[1:], scale=c.scale, **options)
    out, lse, passes, *grads = run(alone, grad_out[1:])
    assert same((out, lse, passes[:, 0]), (expected[0][1:], expected[1][1:], expected[2][:, 1]))
    assert same(grads, [t[1:] for t in expected[3:]])


@pytest.mark.parametrize("path", ["passes", "fused"])
def test_nothing_saved_is_the_same_output(qgfd, path):
    for hops, mixed in ((2, range(0)), (4, range(2, 4)), (4, range(1, 5))):
        c = case(70, 8, BF16, hops=hops, mixed=mixed)
        assert torch.equal(qgfd.forward(c, path)[0], qgfd.forward(c, path, saved=False)[0])


def test_large_scores(qgfd):
    c = case(70, 16, F32, hops=2, mixed=range(2, 3), scale=12.0)  # where exp alone would overflow
    for path in ("passes", "fused"):
        out, lse, _ = qgfd.forward(c, path)
        truth, true_lse, *_ = exact(c)
        assert true_lse.max() > 90
        assert error(out.transpose(1, 2), truth) <= 1.5e-5  # seen: 3.9e-6, of scores up to 200 rounded to fp32
        torch.testing.assert_close(lse.double(), true_lse, rtol=LSE, atol=LSE)


def test_what_fuses(qgfd):
    """By the shared memory that M and two u take, 99 KiB, and by the rows of a block."""
    assert qgfd.fuses(case(128, 64, BF16, hops=2)) and not qgfd.fuses(case(129, 64, BF16, hops=2))
    assert qgfd.fuses(case(112, 128, BF16, hops=2)) and not qgfd.fuses(case(113, 128, BF16, hops=2))
    assert qgfd.fuses(case(96, 64, F32, hops=2)) and not qgfd.fuses(case(97, 64, F32, hops=2))
    assert not qgfd.fuses(case(16, 64, BF16, hops=1))


def test_refused(qgfd):
    good = {"hops": 2, "mixed": range(2, 3)}
    wrong = [
        case(9, 12), case(9, 264), case(9, 8, dtype=torch.float64, **good), case(9, 8, heads=3, kv_heads=2),
        case(9, 8, scale=-1.0), case(9, 8, scale=float("nan")), case(9, 8, hops=0, mixed=range(0, 1)),
        case(9, 8, keys=10, hops=2), case(9, 8, keys=10, mixed=range(1, 2)), case(9, 8, mixed=range(1, 3)),
    ]  # fmt: skip
    for c in wrong:
        with pytest.raises(ValueError, match="cudaError 1"):
            qgfd.forward(c, "passes")
        with pytest.raises(ValueError, match="cudaError 1"):
            qgfd.backward(c, c.query, (c.query.transpose(1, 2), torch.zeros(9), c.query))
    with pytest.raises(ValueError, match="cudaError 1"):
        qgfd.forward(case(200, 64, **good), "fused")


def test_under_address_and_undefined_behaviour_sanitizers(libraries):
    """A selection of these tests, in a process of its own with the sanitized library."""
    chosen = ["head_sizes and (40- or 96-)", "lengths and 17-", "masks and varlen and 40", "zero", "strides", "grouped"]
    done = sanitized_tests(__file__, chosen, libraries("asan"))
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
