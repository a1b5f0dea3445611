"""The Triton launch functions of token sampling against the fp64 reference, in Triton's interpreter.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_token_sampling.py
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import backends, ops
from fastdiff.kernels.common import philox
from fastdiff.kernels.token_sampling import reference
from fastdiff.kernels.token_sampling import triton_kernels as kernels
from ops.triton_interpreter import programs, shuffled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = ("log_prob", "entropy", "margin", "end_log_prob")
TOLERANCE = 1.2e-7  # |error| / max(1, |value|); the largest seen: 5.9e-8, the last bit
BOUNDARY = 1e-6  # of the mass: how close to u a boundary lies where two draws differ; none differed
SEED, STEP = -1234567890123456789, 2**33 + 7


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(logits, temperature=1.0, top_k=0, top_p=1.0, suppress=None, end=None, sequence_ids=None, positions=None):
    """The launch function; a temperature that is a tensor has one value per row."""
    heat = (temperature, 0.0) if isinstance(temperature, Tensor) else (None, temperature)
    return kernels.sample_tokens(
        logits, *heat, top_k, top_p, suppress, end, None, SEED, None, STEP, sequence_ids, positions
    )


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, suppress=None, end=None, sequence_ids=None, positions=None):
    """The same by the reference in fp64, each [B, L]."""
    batch, length, vocab = logits.shape
    if sequence_ids is None:
        sequence_ids = torch.arange(batch).repeat_interleave(length)
    positions = torch.arange(length).repeat(batch) if positions is None else positions
    found = reference.sample_tokens(
        logits.double().reshape(-1, vocab), torch.as_tensor(temperature), top_k, top_p, suppress, end,
        torch.tensor(SEED), torch.tensor(STEP), sequence_ids, positions,
    )  # fmt: skip
    return [t.view(batch, length) for t in found]


def differences_lie_at_boundaries(found: Tensor, truth: Tensor, logits: Tensor, temperature) -> None:
    """Where two draws without top-k and top-p differ, u is next to all the mass between their ids."""
    batch, length, vocab = logits.shape
    for b, i in (found != truth).nonzero().tolist():
        heat = temperature if isinstance(temperature, float) else temperature.view(batch, length)[b, i].item()
        z = logits[b, i].double()
        cumulative = ((z - z.max()) / heat).exp().cumsum(0)
        row = torch.tensor([b]), torch.tensor([i])
        u = philox.uniform53(philox.philox(torch.tensor(SEED), *row, torch.tensor(STEP), 0)).item()
        first, last = sorted((found[b, i].item(), truth[b, i].item()))
        for edge in (cumulative[first], cumulative[last - 1]):
            assert abs(edge / cumulative[-1] - u) <= BOUNDARY, f"row {b}, {i}: {found[b, i]} for {truth[b, i]}"


def check(logits: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
    found, truth = call(logits, *args, **kwargs), exact(logits, *args, **kwargs)
    assert torch.equal(found[0], truth[0])
    for name, value, right in zip(NAMES, found[1:], truth[1:], strict=True):
        if name == "end_log_prob" and kwargs.get("end") is None:
            assert value.shape == (0,)
            continue
        assert value.shape == logits.shape[:2] and value.dtype == F32
        assert torch.equal(value.isnan(), right.isnan()) and torch.equal(value.isinf(), right.isinf()), name
        error = ((value - right).abs() / right.abs().clamp_min(1)).nan_to_num(0).max()
        assert error <= TOLERANCE, f"{name}: {error:.3g}"
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("vocab", [1, 5, 1023, 1024, 1025, 2500])
def test_vocabularies(vocab, temperature):
    check(3 * randn(2, 3, vocab), temperature)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dtypes(dtype):
    check(3 * randn(1, 2, 1025).to(dtype), 0.7, top_k=30, end=torch.tensor([3, 1024]))


@pytest.mark.parametrize("layout", ["sliced", "transposed", "aligned"])
def test_strided_logits(layout):
    if layout == "transposed":
        logits = randn(3, 2, 1030).transpose(0, 1)
    elif layout == "sliced":
        logits = randn(2, 5, 1100)[:, 1:4, 7:1040]
    else:
        logits = randn(2, 5, 1104)[:, 1:4, :1040]
    check(logits, 0.7, suppress=torch.tensor([5]))


def test_temperature_a_row():
    temperature = torch.tensor([0.0, 1.0, 0.7, 100.0, 1e-40, 1e-3])
    token, log_prob, *_ = check(3 * randn(2, 3, 1500), temperature)
    greedy, greedy_log_prob, *_ = check(3 * randn(2, 3, 1500), 0.0)
    for row in (0, 4):
        assert token.flatten()[row] == greedy.flatten()[row]
        assert log_prob.flatten()[row] == greedy_log_prob.flatten()[row]


def test_greedy_takes_the_lowest_id_of_a_tie():
    logits = torch.zeros(1, 4, 2100)
    logits[0, 0, [700, 1023, 1024]] = 1
    logits[0, 1, [1024, 1025, 2099]] = 1
    logits[0, 2] = -0.0
    logits[0, 2, 9] = 0.0
    token, _, _, margin, _ = check(logits, 0.0)
    assert token.tolist() == [[700, 1024, 0, 0]] and not margin.any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_suppressed_ids_and_end_tokens(dtype):
    logits = 2 * randn(2, 4, 2100).to(dtype)
    suppress, end = torch.tensor([0, 5, 1023, 1500]), torch.tensor([1, 5, 1024, 2099])
    logits[:, :, 1500] = float("nan")  # suppressed ids may hold anything
    logits[:, :, 5] = 40
    logits[0, 1, 1024] = 30  # the argmax is an end token, 13 nats above all else together
    logits[0, 2, end[[0, 2, 3]]] = float("-inf")
    found = check(logits, 0.7, suppress=suppress, end=end)
    assert not torch.isin(found[0], suppress).any() and found[4][0, 2] == float("-inf")
    whole = torch.arange(1020, 2050)  # a block without an allowed id
    assert not torch.isin(check(logits, 1.0, suppress=whole)[0], whole).any()
    assert (check(logits[:1, :1], 1.0, suppress=torch.arange(1, 2100))[0] == 0).all()


@pytest.mark.parametrize("top", [(1, 1.0), (7, 1.0), (2000, 1.0), (0, 0.5), (0, 1e-9), (0, 0.999), (40, 0.8)], ids=str)
def test_top_k_and_top_p_keep_ties(top, monkeypatch):
    monkeypatch.setattr(
        kernels, "SPAN", 1 if top[0] and top[1] < 1 else 4
    )  # 1: a loop over blocks, of which some are skipped
    logits = (2 * randn(1, 2, 1500)).mul(2).round() / 2  # so coarse that both cut through ties
    check(logits, 0.7, *top)


def test_top_k_of_ties_and_signed_zeros():
    logits = torch.full((1, 3, 1030), -1.0)
    logits[..., [3, 500, 1026]] = torch.tensor([0.0, -0.0, 0.0])
    token = check(logits, 1.0, top_k=2)[0]
    drawn = set(token.flatten().tolist())
    assert drawn <= {3, 500, 1026} and len(drawn) > 1, "ties with the second largest are all kept"
    assert set(check(logits, 1.0, top_p=0.001)[0].flatten().tolist()) <= {3, 500, 1026}
    logits[..., 500] = float("-inf")
    assert torch.equal(check(logits, 1.0, top_k=1029)[0], check(logits)[0]), "no fewer ids than k: off"


def test_thresholds_are_off_at_temperature_0():
    temperature = torch.tensor([0.0, 1.0])
    check(2 * randn(1, 2, 1500), temperature, top_k=5, top_p=0.5, suppress=torch.tensor([1]))


def test_seeds_in_device_memory():
    logits, numbers = randn(2, 3, 200), torch.tensor([SEED, STEP])
    sequence_ids, positions = torch.tensor([9, 9, 9, -4, 2**40, 1]), torch.tensor([5, 4, 3, 2**31, 2**32 + 1, 0])
    found = kernels.sample_tokens(
        logits, None, 1.0, 0, 1.0, None, None, numbers[0], 0, numbers[1], 0, sequence_ids, positions
    )
    truth = check(logits, sequence_ids=sequence_ids, positions=positions)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_rows_without_a_distribution():
    logits = randn(2, 4, 1100)
    logits[0, 1] = float("-inf")
    logits[0, 2, 1050] = float("nan")
    logits[1, 0, 3] = float("inf")
    logits[1, 1, 1:] = float("-inf")  # one id is enough
    logits[1, 2, :1090] = float("-inf")
    invalid = torch.zeros(2, 4, dtype=torch.bool)
    invalid[0, 1:3] = invalid[1, 0] = True
    for arguments in ({}, {"top_k": 5}, {"temperature": 0.0}):
        found = check(logits, end=torch.tensor([2]), **arguments)
        assert torch.equal(found[0] == -1, invalid) and all(torch.equal(t.isnan(), invalid) for t in found[1:])
    assert check(logits, suppress=torch.tensor([0]))[0][1, 1] == -1
    assert check(logits, suppress=torch.tensor([3, 1050]))[0][0, 2] >= 0


def test_near_certain_rows_rank_as_in_fp64():
    gaps = torch.tensor([14.0, 17.5, 17.6, 25.0, 40.0, 80.0])
    logits = 0.1 * randn(1, 6, 1100)
    logits[0, :, 1060] = gaps
    found, truth = call(logits, 0.0, end=torch.tensor([1060])), exact(logits, 0.0, end=torch.tensor([1060]))
    for index in (1, 2, 4):
        value, right = found[index][0], truth[index][0]
        assert (value < 0).all() or index == 2
        assert torch.equal(value.argsort(), right.argsort())
        # seen: 6e-8, the last bit
        assert ((value - right).abs() / right.abs()).max() <= 1.2e-7


def test_draws_follow_the_distribution():
    """100 draws of one distribution, as the reference draws them, and chi-square against its probabilities."""
    weights = torch.tensor([0.08, 0.3, 0.1, 0.2, 0.06, 0.26])
    logits = weights.log().expand(1, 100, 6)
    token = call(logits)[0]
    differences_lie_at_boundaries(token, exact(logits)[0], logits, 1.0)
    expected = 100 * weights.double()
    statistic = ((torch.bincount(token[0], minlength=6) - expected) ** 2 / expected).sum()
    assert statistic < 20.5, "chi-square of 5 degrees of freedom exceeds 20.5 once in 1000; seen: 4.0"


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_draws_agree_with_fp64_but_at_boundaries(temperature):
    logits = 2 * randn(3, 6, 2060)
    found, truth = call(logits, temperature)[0], exact(logits, temperature)[0]
    differences_lie_at_boundaries(found, truth, logits, temperature)
    assert (found != truth).float().mean() <= 0.01  # none seen


def test_a_row_alone_is_the_row_in_a_batch():
    logits = 3 * randn(2, 3, 1300)
    together = call(logits, 0.7, top_p=0.9)
    alone = call(logits[1:2, 2:3], 0.7, top_p=0.9, sequence_ids=torch.tensor([1]), positions=torch.tensor([2]))
    assert all(a[0, 0] == b[1, 2] for a, b in zip(alone[:4], together[:4], strict=True))


def test_results_do_not_depend_on_the_order_of_programs():
    logits = 3 * randn(2, 1, 2100)
    first = call(logits, 0.7, 50, 0.9)
    with programs(shuffled(seed=1)):
        other = call(logits, 0.7, 50, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 10), (2, 0, 10)])
def test_no_rows(shape):
    found = call(torch.empty(shape), end=torch.tensor([1]))
    assert all(t.shape == shape[:2] for t in found)
    found = kernels.lm_head_sample(
        torch.empty(*shape[:2], 4), torch.empty(9, 4), None, None, 1.0, None, None, None, 0, None, 0, None, None
    )
    assert all(t.shape == shape[:2] for t in found[:4])


def test_what_a_launch_cannot_count_is_an_error():
    with pytest.raises(ValueError, match="logits: 2097152 ids; the triton backend takes at most 1048576"):
        call(torch.empty(1, 1, 2**21, device="meta"))
    with pytest.raises(ValueError, match="logits: 2147483648 rows"):
        call(torch.empty(2, 2**30, 5, device="meta"))


def test_logits_beyond_2_to_31_elements(monkeypatch):
    """The last program alone, on logits of 4 GB of which nothing else is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, vocab = 2**21 + 8, 1024
    logits = torch.empty(1, rows, vocab, dtype=BF16)
    logits[0, -1] = 3 * randn(vocab)
    with programs(lambda grid: [(grid[0] - 1, 0, 0)]):
        token, log_prob, *_ = call(logits, 0.7)
    where = {"sequence_ids": torch.tensor([0]), "positions": torch.tensor([rows - 1])}
    truth = exact(logits[:, -1:], 0.7, **where)
    assert token[0, -1] == truth[0] and abs(log_prob[0, -1] - truth[1]) <= TOLERANCE * truth[1].abs()


# ------------------------------------------------------------------------------------------------- lm_head_sample


def head(hidden, weight, bias, temperature, suppress=None, end=None, sequence_ids=None, positions=None):
    heat = (temperature, 0.0) if isinstance(temperature, Tensor) else (None, temperature)
    return kernels.lm_head_sample(
        hidden, weight, bias, *heat, suppress, end, None, SEED, None, STEP, sequence_ids, positions
    )


def check_head(dtype, dim, vocab, temperature, bias=False, options=True, weight_columns=None):
    """Equal to sample_tokens of torch's logits, but log_prob where the cell's logits were rounded another way."""
    hidden = randn(2, 3, dim).to(dtype)
    weight = (2 * dim**-0.5 * randn(vocab, weight_columns or dim, seed=1)).to(dtype)[:, :dim]
    bias = randn(vocab, seed=2).to(dtype) if bias else None
    kwargs = {"suppress": torch.tensor([1, 3]), "end": torch.tensor([0, vocab - 1])} if options else {}
    found = head(hidden, weight, bias, temperature, **kwargs)
    truth = call(functional.linear(hidden, weight, bias), temperature, **kwargs)
    assert torch.equal(found[0], truth[0])
    # fp32: the products differ in their order. bf16, fp16: an ulp where that changes the rounding; none seen
    tolerance = {F32: 4e-6, BF16: 1e-5, F16: 1e-5}[dtype]
    for name, value, right in zip(NAMES, found[1:], truth[1:], strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_head_is_sample_tokens_of_its_logits(dtype, temperature, monkeypatch):
    monkeypatch.setattr(kernels, "HEAD_TILE", 1024)  # three tiles, the last not whole
    check_head(dtype, 96, 2500, temperature, bias=temperature == 0.7, options=dtype != F32)


@pytest.mark.parametrize("vocab", [4, 129])
@pytest.mark.parametrize("dim", [1, 7, 80])
def test_head_sizes(dim, vocab):
    check_head(F32, dim, vocab, torch.tensor([0.0, 1.0, 0.5, 2.0, 1.0, 1.0]), weight_columns=dim + 3)


def test_head_rows_without_a_distribution():
    hidden = randn(1, 3, 8)
    hidden[0, 1, 2] = float("nan")
    weight = randn(1100, 8, seed=1)
    found = head(hidden, weight, None, 1.0, end=torch.tensor([4]))
    assert (found[0] == -1).tolist() == [[False, True, False]]
    assert all(t.isnan().tolist() == [[False, True, False]] for t in found[1:])


def test_a_head_row_alone_is_the_row_in_a_batch():
    hidden, weight = randn(2, 3, 64), randn(1300, 64, seed=1) / 4
    together = head(hidden, weight, None, 1.0)
    alone = head(hidden[1:, 2:], weight, None, 1.0, sequence_ids=torch.tensor([1]), positions=torch.tensor([2]))
    assert alone[0][0, 0] == together[0][1, 2]
    for a, b in zip(alone[1:4], together[1:4], strict=True):
        torch.testing.assert_close(a[0, 0], b[1, 2], rtol=0, atol=4e-6)  # torch's product depends on the batch


# --------------------------------------------------------------------------------------------------- under torch


@pytest.mark.parametrize("operator", ["sample_tokens", "lm_head_sample"])
def test_fullgraph_compile_equals_eager(operator):
    options = {"temperature": 0.7, "seed": 3, "invalid": "flag", "end_token_ids": (1,)}

    def run(x, weight):
        if operator == "sample_tokens":
            return ops.sample_tokens(x, **options)
        return ops.lm_head_sample(x, weight, **options)

    x, weight = randn(2, 3, 40), randn(70, 40, seed=1)
    with backends.use_backend("triton"):
        eager = run(x, weight)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, weight)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("temperature", [1e300, torch.full((64,), 3e38)], ids=["one", "rows"])
def test_at_any_high_temperature_all_allowed_ids_are_alike(temperature):
    tokens = call(randn(1, 64, 10), temperature=temperature, suppress=torch.tensor([1, 9]))[0]
    assert set(tokens.flatten().tolist()) == {0, 2, 3, 4, 5, 6, 7, 8}  # 64 draws of 8 ids; a fixed seed
