"""eos_log_prob and eos_log_prob_from_logits beyond the harness: certainty, the samplers, invalid rows, bad input."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.ops import (
    _eos_log_prob_backends,
    eos_log_prob,
    eos_log_prob_from_logits,
    lm_head_sample,
    sample_tokens,
)
from ops.harness import BF16, F16, F32, NATIVE, ROWS, check_operators, check_schemas

native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
every = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
H, W, Z = torch.zeros(2, 3, 4), torch.zeros(10, 4), torch.zeros(2, 3, 10)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ values
@every
@pytest.mark.parametrize("vocab", [2, 1200])
@pytest.mark.parametrize("gap", [-600.0, -40.0, -20.0, -1.0, 0.0, 1.0, 20.0, 40.0, 80.0])
def test_certain_positions_keep_their_digits(row, gap, vocab):
    """Odds of exp(gap) against vocab - 1 equal others; in fp32, x - logsumexp is 0 for every p > 1 - 6e-8."""
    row.skip_unless_runnable("eos_log_prob_from_logits")
    logits = torch.full((1, vocab), 3.0)
    logits[0, 1] += gap
    with row.active():
        result = eos_log_prob_from_logits(logits, 1).double()
    odds = math.log(vocab - 1) - gap
    truth = -(max(odds, 0.0) + math.log1p(math.exp(-abs(odds))))
    truth = torch.tensor([truth], dtype=torch.float64)
    torch.testing.assert_close(result, truth, rtol=1.5e-7, atol=0)  # seen: 4.5e-8, the last bit


def test_a_probability_of_one_less_a_billionth():
    result = eos_log_prob_from_logits(torch.tensor([0.0, math.log(1e-9)]), 0)
    assert abs(result.item() + 1e-9) < 1e-15
    assert torch.tensor([0.0, math.log(1e-9)]).log_softmax(-1)[0] == 0, "what fp32 says otherwise"


@every
def test_limits(row):
    row.skip_unless_runnable("eos_log_prob_from_logits")
    logits = randn(4, 1500)
    logits[0, 7] = -math.inf  # no mass on the end
    logits[1] = -math.inf
    logits[1, 7] = -50.0  # nothing but the end
    logits[2, 7] = 1e30
    logits[3, 7] = -1e30
    with row.active():
        result = eos_log_prob_from_logits(logits, 7)
        everything = eos_log_prob_from_logits(logits[2:], range(1500))
    assert result[0] == -math.inf and result[3] < -9e29
    assert str(result[1].item()) == str(result[2].item()) == "0.0" and not everything.any()


@every
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_agrees_with_the_samplers(row, dtype):
    row.skip_unless_runnable("eos_log_prob")
    hidden, weight = randn(4, 6, 48, seed=1).to(dtype), (randn(4100, 48, seed=2) * 0.6).to(dtype)
    bias, end, options = randn(4100, seed=3).to(dtype), [7, 2047, 4099], {"suppress_tokens": [3, 2048]}
    with row.active():
        head = eos_log_prob(hidden, weight, end, bias, **options)
        sample = lm_head_sample(hidden, weight, bias, end_token_ids=end, **options).end_log_prob
        logits = functional.linear(hidden, weight, bias)
        plain = eos_log_prob_from_logits(logits, end, **options)
        drawn = sample_tokens(logits, end_token_ids=end, **options).end_log_prob
    torch.testing.assert_close(plain, drawn, rtol=2e-7, atol=0)  # seen: 7.7e-8
    torch.testing.assert_close(head, sample, rtol=2e-7, atol=0)
    # fp32 products differ in their order of sums (seen: 1.9e-6); a 16-bit logit may round another way (none seen)
    assert ((head - plain).abs() <= 1e-5).float().mean() >= 0.99


@native
def test_a_tile_is_what_its_logits_are(row):
    """Integers, of which a product leaves no rounding: bit for bit the same from hidden states and from logits."""
    row.skip_unless_runnable("eos_log_prob")
    hidden, weight = randn(300, 8).mul(2).round(), randn(2500, 8, seed=1).round()
    with row.active():
        plain = eos_log_prob_from_logits(hidden @ weight.T, [5, 2499])
        assert torch.equal(eos_log_prob(hidden, weight, [5, 2499]), plain)


# ------------------------------------------------------------------------------------------------ invalid rows
@every
@pytest.mark.parametrize("place", [7, 1033], ids=["end", "other"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution(row, value, place):
    row.skip_unless_runnable("eos_log_prob_from_logits")
    logits = randn(2, 3, 1500)
    logits[1, 1, place] = value
    if value == -math.inf:
        logits[1, 1] = value
    mixed = torch.full((2, 1500), -math.inf)
    mixed[0, place] = math.nan  # a NaN among -inf
    with row.active():
        result = eos_log_prob_from_logits(logits, 7)
        good = eos_log_prob_from_logits(logits[1], [8], suppress_tokens=[place])
        assert eos_log_prob_from_logits(mixed, [7]).isnan().all()
    where = torch.zeros(2, 3, dtype=torch.bool)
    where[1, 1] = True
    assert torch.equal(result.isnan(), where)
    assert value == -math.inf or good.isfinite().all(), "suppressed ids are not read"


# ------------------------------------------------------------------------------------------------ shapes
@native
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_any_leading_shape(row, lead):
    row.skip_unless_runnable("eos_log_prob")
    hidden, weight = randn(*lead, 8), randn(30, 8, seed=1)
    with row.active():
        result = eos_log_prob(hidden, weight, 3)
        logits = eos_log_prob_from_logits(hidden @ weight.T, 3)
        flat = eos_log_prob(hidden.reshape(-1, 8), weight, 3)
    assert result.shape == logits.shape == lead and torch.equal(result.flatten(), flat)
    torch.testing.assert_close(result, logits, rtol=1e-5, atol=1e-6)


@native
def test_layouts_of_the_operands(row):
    row.skip_unless_runnable("eos_log_prob")
    hidden, weight, bias = randn(2, 3, 8), randn(30, 8, seed=1), randn(30, seed=2)
    wide, logits = torch.stack([weight, weight], -1)[..., 0], randn(2, 3, 30)
    spread = torch.stack([logits, logits], -1)[..., 1]
    with row.active():
        whole = eos_log_prob(hidden, weight, 3, bias)
        assert torch.equal(whole, eos_log_prob(hidden.transpose(0, 1).contiguous().transpose(0, 1), wide, 3, bias))
        assert torch.equal(whole, eos_log_prob(hidden, torch.cat([weight, weight], 1)[:, :8], 3, bias[:, None][:, 0]))
        assert torch.equal(eos_log_prob_from_logits(spread, 3), eos_log_prob_from_logits(logits, 3))


def test_offsets_beyond_two_to_the_31_elements():
    """4 GiB of which three rows are touched."""
    vocab, stride = 2000, 2**30 + 7
    base = torch.from_numpy(np.zeros(2 * stride + vocab, np.uint16)).view(BF16)
    logits = base.as_strided((3, vocab), (stride, 1))
    values = randn(3, vocab).bfloat16()
    for i in range(3):
        logits[i] = values[i]
    assert torch.equal(eos_log_prob_from_logits(logits, 5), eos_log_prob_from_logits(values, 5))


# ------------------------------------------------------------------------------------------------ torch
def test_ids_in_every_form():
    logits = randn(3, 30)
    expected = eos_log_prob_from_logits(logits, [3, 9], suppress_tokens=(4,))
    for end in ((9, 3), range(3, 10, 6), np.array([9, 3]), torch.tensor([9, 3])):
        assert torch.equal(expected, eos_log_prob_from_logits(logits, end, suppress_tokens=torch.tensor([4, 4])))
    assert torch.equal(eos_log_prob_from_logits(logits, 3), eos_log_prob_from_logits(logits, [3], suppress_tokens=None))


def test_tensors_of_ids_under_compile():
    def run(hidden, weight, end, suppressed):
        return eos_log_prob(hidden, weight, end, suppress_tokens=suppressed)

    inputs = (randn(2, 3, 8), randn(30, 8, seed=1), torch.tensor([9, 3]), torch.tensor([4]))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), run(*inputs))
    assert torch.equal(compiled(*inputs[:3], (4,)), run(*inputs))


def test_under_autocast_it_is_linear_under_autocast():
    hidden, weight, bias = randn(3, 4, 32, seed=1), randn(500, 32, seed=2), randn(500, seed=3)
    with torch.autocast("cpu", BF16):
        head = eos_log_prob(hidden, weight, 3, bias)
        plain = eos_log_prob_from_logits(functional.linear(hidden, weight, bias), 3)
        after_a_layer = eos_log_prob(hidden.bfloat16(), weight, 3, bias)  # states as a layer leaves them
    assert head.dtype == F32 and torch.equal(head, plain) and torch.equal(after_a_layer, plain)


@native
def test_it_has_no_gradient(row):
    row.skip_unless_runnable("eos_log_prob")
    head, hidden = torch.nn.Linear(8, 20), randn(2, 3, 8).requires_grad_()
    with row.active():
        assert not eos_log_prob(hidden, head.weight, 3, head.bias).requires_grad
        assert not eos_log_prob_from_logits(head(hidden), 3).requires_grad
        with torch.autocast("cpu", BF16):
            assert not eos_log_prob(hidden, head.weight, 3, head.bias).requires_grad


def test_float64_runs_on_the_reference():
    hidden, weight = randn(2, 3, 8).double(), randn(30, 8, seed=1).double()
    truth = functional.linear(hidden, weight).log_softmax(-1)[..., 3]
    assert eos_log_prob(hidden, weight, 3).dtype == torch.float64
    torch.testing.assert_close(eos_log_prob(hidden, weight, 3), truth, rtol=1e-13, atol=1e-13)


def test_opcheck():
    end, excluded = torch.tensor([1, 7]), torch.tensor([0, 1, 7])
    calls = {
        "eos_log_prob": (randn(2, 3, 8), randn(50, 8), randn(50), end, excluded),
        "eos_log_prob_from_logits": (randn(2, 3, 40), end, excluded),
    }
    check_operators(_eos_log_prob_backends.SCHEMAS, calls)


def test_schemas_in_python_and_cpp_are_the_same():
    check_schemas(_eos_log_prob_backends.SCHEMAS)


# ------------------------------------------------------------------------------------------------ what does not fit
BAD = [
    ({"end_token_ids": []}, "end_token_ids: got none; expected at least one id"),
    ({"end_token_ids": torch.empty(0, dtype=torch.int64)}, "end_token_ids: got none"),
    ({"end_token_ids": None}, "end_token_ids: got None; expected a list of ints or an int64 tensor"),
    ({"end_token_ids": [3, 10]}, "end_token_ids: got 10; expected ids from 0 to 9"),
    ({"end_token_ids": -1}, "end_token_ids: got -1; expected ids from 0 to 9"),
    ({"end_token_ids": [3, 4, 3]}, "end_token_ids: got 3 twice; expected each id once"),
    ({"end_token_ids": [3, 4], "suppress_tokens": [5, 4]}, "end_token_ids: got 4, which suppress_tokens has too"),
    ({"end_token_ids": True}, "end_token_ids: got True; expected a list of ints"),
    ({"end_token_ids": [1.0]}, "end_token_ids: got an element of type float; expected ints"),
    ({"end_token_ids": "</s>"}, "end_token_ids: got '</s>'; expected a list of ints"),
    ({"end_token_ids": torch.zeros(1)}, "end_token_ids: got torch.float32; expected int64"),
    ({"end_token_ids": torch.zeros(1, 1, dtype=torch.int64)}, r"end_token_ids: got shape \[1, 1\]; expected one dim"),
    ({"end_token_ids": 3, "suppress_tokens": 4}, "suppress_tokens: got 4; expected a list of ints"),
    ({"end_token_ids": 3, "suppress_tokens": [11]}, "suppress_tokens: got 11; expected ids from 0 to 9"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda v: str(v)[:40] if isinstance(v, dict) else "")
@pytest.mark.parametrize("operator", ["eos_log_prob", "eos_log_prob_from_logits"])
def test_bad_ids(operator, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        eos_log_prob(H, W, **arguments) if operator == "eos_log_prob" else eos_log_prob_from_logits(Z, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eos_log_prob_from_logits(np.zeros((2, 3)), 1), "logits: got a ndarray; expected a torch.Tensor"),
        (lambda: eos_log_prob_from_logits(Z.long(), 1), "logits: got torch.int64; expected float32"),
        (lambda: eos_log_prob_from_logits(torch.zeros(()), 0), r"logits: got shape \[\]"),
        (lambda: eos_log_prob_from_logits(Z[..., :0], 0), r"logits: got shape \[2, 3, 0\]; expected at least one id"),
        (lambda: eos_log_prob(H, torch.zeros(10, 5), 1), r"weight: got shape \[10, 5\]; expected \[V, 4\]"),
        (lambda: eos_log_prob(H[..., :0], W[:, :0], 1), r"hidden: got shape \[2, 3, 0\]; expected at least one number"),
        (lambda: eos_log_prob(H, W, 1, torch.zeros(9)), r"bias: got shape \[9\]; expected \[10\]"),
        (lambda: eos_log_prob(H, W.bfloat16(), 1), "weight: got torch.bfloat16, with torch.float32 of hidden"),
    ],
)
def test_bad_tensors(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_direct_call_does_not_read_out_of_bounds():
    good = torch.tensor([3])
    for end, excluded in ((torch.tensor([10]), good), (good, torch.tensor([4, 3])), (good, torch.tensor([-1]))):
        with pytest.raises(RuntimeError, match="expected ascending ids below 10"):
            torch.ops.fastdiff.eos_log_prob_from_logits(Z, end, excluded)
        with pytest.raises(RuntimeError, match="expected ascending ids below 10"):
            torch.ops.fastdiff.eos_log_prob(H, W, None, end, excluded)
