"""The row kernel of the masked loss on the CPU, apart from the products: certainty, any row, rows that are wrong."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.kernels.masked_linear_cross_entropy import reference
from fastdiff.ops import _masked_linear_cross_entropy_backends as backends
from ops.harness import BF16, F16, F32, NATIVE, across_threads
from ops.properties import given, settings, st


def randn(*shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_kernel(
    logits, targets, row_weight=None, suppress=None, smoothing=0.0, want_grad=True
) -> tuple[Tensor, Tensor]:
    grad = logits.clone()
    loss = torch.ops.fastdiff.cross_entropy_rows_(grad, targets, row_weight, suppress, smoothing, want_grad)
    return loss, grad


native_cpu = pytest.mark.parametrize("row", [r for r in NATIVE if r.backend == "cpu"], ids=lambda r: r.name)


@native_cpu
@pytest.mark.parametrize("vocab", [2, 17, 1500, 262144])
def test_near_certainty_is_accurate(row, vocab):
    at = torch.tensor([0, vocab // 3, vocab // 2, vocab - 1])
    logits = randn(4, vocab).scatter_(1, at[:, None], torch.tensor([[20.0], [25.0], [40.0], [60.0]]))
    with row.active():
        loss, grad = rows_kernel(logits, at)
    others = logits.double().scatter(1, at[:, None], -torch.inf)
    truth = torch.log1p((others - logits.double().amax(1, keepdim=True)).exp().sum(1))
    # seen: 1.5e-7, and 6.1e-7 of two ids alone: z − maximum = -38.6 is rounded to fp32, by up to 2e-6
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.gather(1, at[:, None])[:, 0].double(), torch.expm1(-truth), rtol=2e-6, atol=0)


@native_cpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_row_is_the_same_alone_and_among_others(row, dtype):
    logits, targets = 3 * randn(7, 1031, dtype=dtype), torch.arange(7)
    suppress, weight = torch.tensor([9, 500]), torch.rand(7)
    with row.active():
        loss, grad = rows_kernel(logits, targets, weight, suppress, 0.1)
        for i in range(7):
            alone = rows_kernel(logits[i : i + 1], targets[i : i + 1], weight[i : i + 1], suppress, 0.1)
            assert torch.equal(alone[0], loss[i : i + 1]) and torch.equal(alone[1], grad[i : i + 1])


@native_cpu
@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(2, 2200),
    suppressed=st.sets(st.integers(0, 2199), max_size=6),
    smoothing=st.sampled_from([0.0, 0.3]),
    spread=st.floats(0.1, 30),
    offset=st.floats(-300, 300),
    seed=st.integers(0, 99),
)
def test_any_row_equals_the_reference(row, vocab, suppressed, smoothing, spread, offset, seed):
    logits = spread * randn(3, vocab, seed=seed) + offset
    ids = sorted(i for i in suppressed if i < vocab)[: vocab - 1]
    allowed = torch.tensor([i for i in range(vocab) if i not in ids])
    targets = allowed[torch.randint(len(allowed), (3,), generator=torch.Generator().manual_seed(seed))]
    suppress = torch.tensor(ids) if ids else None
    weight = torch.tensor([1.0, 0.5, 3.0])
    with row.active():
        loss, grad = rows_kernel(logits, targets, weight, suppress, smoothing)
    z = logits.double().requires_grad_()
    truth = reference.row_losses(z, targets, suppress, smoothing)
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=2e-6, atol=1e-6)
    exact = torch.autograd.grad((truth * weight).sum(), z)[0]
    torch.testing.assert_close(grad.double(), exact, rtol=3e-6, atol=1e-7)


@native_cpu
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_give_nan(row, value):
    logits = randn(3, 1100)
    logits[1] = value
    for smoothing in (0.0, 0.1):
        with row.active():
            loss, grad = rows_kernel(logits, torch.tensor([1, 2, 3]), None, None, smoothing)
        assert loss[1].isnan() and grad[1].isnan().all() and loss[[0, 2]].isfinite().all()
        assert grad[[0, 2]].isfinite().all()


@native_cpu
@pytest.mark.parametrize("target", [-100, 1100, 2**40, 7])
def test_a_target_that_is_no_allowed_id_gives_nan_in_the_kernel(row, target):
    logits = randn(3, 1100)
    with row.active():
        loss, grad = rows_kernel(logits, torch.tensor([1, target, 3]), None, torch.tensor([7]))
    assert loss.isnan().tolist() == [False, True, False] and grad[1].isnan().sum() == 1099
    assert grad[[0, 2]].isfinite().all()


@native_cpu
def test_rows_beyond_two_to_the_31_elements(row):
    """8 GiB of which two rows are filled: untouched pages cost nothing."""
    memory = torch.from_numpy(np.zeros(2**32 + 70, np.uint16)).view(BF16)
    logits = memory.as_strided((3, 67), (2**31, 1))
    logits.copy_(randn(3, 67))
    targets = torch.tensor([1, 2, 3])
    with row.active():
        loss, grad = rows_kernel(logits.contiguous(), targets)
        far = torch.ops.fastdiff.cross_entropy_rows_(logits, targets, None, None, 0.0, True)
    assert torch.equal(loss, far) and torch.equal(grad, logits)


def test_schemas_in_python_and_cpp_are_the_same():
    written = str(torch.ops.fastdiff.cross_entropy_rows_.default._schema).removeprefix("fastdiff::")
    assert written == str(torch._C.parse_schema("cross_entropy_rows_" + backends.ROWS_SCHEMA))


def test_direct_calls_of_the_operator_are_checked():
    logits, targets = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    operator = torch.ops.fastdiff.cross_entropy_rows_
    for bad, match in (
        ((logits.t(), targets, None, None, 0.0, True), "logits does not fit"),
        ((logits.double(), targets, None, None, 0.0, True), "float64"),
        ((logits, targets[:1], None, None, 0.0, True), "targets does not fit"),
        ((logits, targets, torch.ones(3), None, 0.0, True), "row_weight does not fit"),
        ((logits, targets, None, torch.tensor([3, 1]), 0.0, True), "suppress_tokens does not fit"),
        ((logits, targets, None, torch.tensor([5]), 0.0, True), "suppress_tokens does not fit"),
        ((logits, targets, None, torch.arange(5), 0.0, True), "suppress_tokens does not fit"),
        ((logits, targets, None, None, 1.0, True), "label_smoothing is 1"),
    ):
        with pytest.raises(RuntimeError, match=match):
            operator(*bad)


# ------------------------------------------------------------------------------------------------ products by tiles
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
def test_products_by_tiles(dtype, tile):
    product = torch.ops.fastdiff.tiled_addmm_
    a, b, plus = randn(9, 12, dtype=dtype), randn(12, 65, dtype=dtype, seed=1), randn(65, dtype=dtype, seed=2)
    exact = a.double() @ b.double()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    out = torch.full((9, 65), torch.nan, dtype=dtype)
    product(out, None, a, b, 0.0, 1.0, tile)
    torch.testing.assert_close(out.double(), exact, **tolerance)
    product(out, None, a, b, 1.0, -0.5, tile)
    torch.testing.assert_close(out.double(), 0.5 * exact, **tolerance)
    product(out, plus, a, b, 1.0, 1.0, tile)
    torch.testing.assert_close(out.double(), exact + plus.double(), **tolerance)
    turned = torch.full((65, 9), torch.nan, dtype=dtype)
    product(turned.t(), None, a, b, 0.0, 1.0, tile)  # as the weight's gradient is made
    torch.testing.assert_close(turned.t().double(), exact, **tolerance)


def test_products_by_tiles_do_not_depend_on_threads():
    a, b, out = randn(360, 263), randn(263, 1200, seed=1), torch.empty(360, 1200)

    def product(tile: int) -> Tensor:
        torch.ops.fastdiff.tiled_addmm_(out, None, a, b, 0.0, 1.0, tile)
        return out.clone()

    for tile in (24, 1200):  # tiles that MKL itself splits over three threads; the second is the only one
        first, *others = across_threads(lambda tile=tile: product(tile))
        assert all(torch.equal(first, other) for other in others)


def test_products_by_tiles_are_checked():
    out, a, b = torch.zeros(4, 6), torch.zeros(4, 5), torch.zeros(5, 6)
    operator = torch.ops.fastdiff.tiled_addmm_
    torch.library.opcheck(operator.default, (out, None, a, b, 1.0, 1.0, 4))
    torch.library.opcheck(operator.default, (out, torch.ones(6), a, b, 1.0, 1.0, 4))
    for bad, match in (
        ((out, None, b, a, 0.0, 1.0, 4), "operands do not fit"),
        ((out, None, a, b, 0.0, 1.0, 0), "tile > 0"),
        ((out, None, a.double(), b, 0.0, 1.0, 4), "one dtype"),
        ((out, torch.ones(5), a, b, 1.0, 1.0, 4), "input does not fit"),
    ):
        with pytest.raises(RuntimeError, match=match):
            operator(*bad)
