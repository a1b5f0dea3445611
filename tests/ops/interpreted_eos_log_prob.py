"""The Triton launch functions of eos_log_prob against the fp64 reference, in Triton's interpreter.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_eos_log_prob.py
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import backends, ops
from fastdiff.kernels.eos_log_prob import reference
from fastdiff.kernels.eos_log_prob import triton_kernels as kernels
from ops.triton_interpreter import programs, shuffled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = 2e-7  # relative; seen: 9.3e-8


def randn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def check(logits: Tensor, end: Tensor, excluded: Tensor | None = None) -> Tensor:
    excluded = end if excluded is None else excluded
    result = kernels.eos_log_prob_from_logits(logits, end, excluded)
    truth = reference.eos_log_prob_from_logits(logits.double(), end, excluded)
    assert result.dtype == F32
    torch.testing.assert_close(result.double(), truth, rtol=TOLERANCE, atol=0, equal_nan=True)
    return result


@pytest.mark.parametrize(("vocab", "dtype"), [*((v, F32) for v in (1, 5, 1023, 1024, 2500)), (1025, BF16), (1025, F16)])
def test_vocabularies(vocab, dtype):
    logits = randn(2, 2, vocab).to(dtype)
    check(logits, ids(vocab - 1))
    if vocab > 5:
        check(logits, ids(0, vocab // 2, vocab - 2), ids(0, 1, vocab // 2, vocab - 2, vocab - 1))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "aligned"])
def test_strided_logits(layout):
    if layout == "transposed":
        logits = randn(3, 2, 1030).transpose(0, 1)
    elif layout == "sliced":
        logits = randn(2, 5, 1100)[:, 1:4, 7:1040]
    else:
        logits = randn(2, 5, 1104)[:, 1:4, :1040]
    check(logits, ids(5, 1029))


@pytest.mark.parametrize("gap", [-600.0, -40.0, 0.0, 20.0, 40.0, 80.0])
def test_certain_positions_keep_their_digits(gap):
    logits = torch.full((1, 1, 1200), 3.0)
    logits[..., 1] += gap
    odds = math.log(1199) - gap
    truth = -(max(odds, 0.0) + math.log1p(math.exp(-abs(odds))))
    result = kernels.eos_log_prob_from_logits(logits, ids(1), ids(1)).double()
    torch.testing.assert_close(result, torch.full_like(result, truth), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("place", [7, 1033], ids=["end", "other"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution(value, place):
    logits = randn(1, 4, 1500)
    logits[0, 1, place] = value
    logits[0, 2] = -math.inf
    logits[0, 2, place] = value  # a NaN among -inf
    result = kernels.eos_log_prob_from_logits(logits, ids(7), ids(7))
    assert result.isnan().tolist() == [[False, value != -math.inf, True, False]]
    suppressed = kernels.eos_log_prob_from_logits(logits, ids(8), ids(8, place).sort().values)
    assert suppressed[0, 1].isfinite(), "suppressed ids may hold anything"


def test_ends_that_have_no_mass_or_all_of_it():
    logits = randn(1, 3, 1500)
    logits[0, 0, 7] = -math.inf
    logits[0, 1] = -math.inf
    logits[0, 1, 7] = -50.0
    result = check(logits, ids(7))
    assert result[0, 0] == -math.inf and str(result[0, 1].item()) == "0.0"
    assert not check(logits, torch.arange(1500)).any()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("bias", [False, True])
def test_head_is_from_logits_of_its_product(dtype, bias, monkeypatch):
    """Products of integers leave no rounding: bit for bit."""
    monkeypatch.setattr(kernels, "HEAD_TILE", 1024)  # three tiles, the last not whole
    hidden, weight = randn(2, 1, 8, scale=1.0).round().to(dtype), randn(2500, 11, seed=1, scale=1.0).round().to(dtype)
    weight, bias = weight[:, 2:-1], randn(2500, seed=2).round().to(dtype) if bias else None
    end, excluded = ids(0, 2499), ids(0, 3, 1024, 2499)
    logits = functional.linear(hidden, weight, bias)
    result = kernels.eos_log_prob(hidden, weight, bias, end, excluded)
    assert torch.equal(result, check(logits, end, excluded))


def test_a_row_alone_and_in_any_order_of_programs():
    logits = randn(2, 3, 2100)
    whole = check(logits, ids(4, 2099))
    assert torch.equal(whole[1:, 2:], check(logits[1:, 2:], ids(4, 2099)))
    with programs(shuffled(seed=1)):
        assert torch.equal(whole, check(logits, ids(4, 2099)))


@pytest.mark.parametrize("shape", [(0, 3, 10), (2, 0, 10)])
def test_no_rows(shape):
    assert kernels.eos_log_prob_from_logits(torch.empty(shape), ids(1), ids(1)).shape == shape[:2]
    assert kernels.eos_log_prob(torch.empty(shape), torch.empty(9, 10), None, ids(1), ids(1)).shape == shape[:2]


def test_what_a_launch_cannot_count_is_an_error():
    with pytest.raises(ValueError, match="logits: 2097152 ids; the triton backend takes at most 1048576"):
        kernels.eos_log_prob_from_logits(torch.empty(1, 1, 2**21, device="meta"), ids(1), ids(1))
    with pytest.raises(ValueError, match="logits: 2147483648 rows"):
        kernels.eos_log_prob_from_logits(torch.empty(2, 2**30, 5, device="meta"), ids(1), ids(1))


def test_logits_beyond_2_to_31_elements(monkeypatch):
    """The last program alone, on logits of 4 GB of which nothing else is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, vocab = 2**21 + 8, 1024
    logits = torch.empty(1, rows, vocab, dtype=BF16)
    logits[0, -1] = randn(vocab)
    with programs(lambda grid: [(grid[0] - 1, 0, 0)]):
        result = kernels.eos_log_prob_from_logits(logits, ids(5), ids(5))
    truth = reference.eos_log_prob_from_logits(logits[0, -1].double(), ids(5), ids(5))
    torch.testing.assert_close(result[0, -1].double(), truth, rtol=TOLERANCE, atol=0)


def test_fullgraph_compile_equals_eager():
    def run(hidden, weight):
        return ops.eos_log_prob(hidden, weight, (1, 7)), ops.eos_log_prob_from_logits(hidden @ weight.T, 3)

    hidden, weight = randn(2, 3, 40), randn(70, 40, seed=1)
    with backends.use_backend("triton"):
        eager = run(hidden, weight)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
