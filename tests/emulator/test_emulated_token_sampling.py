"""The CUDA kernels of token sampling, executed on the CPU, against the reference in float64.

Every case runs under three schedules of threads and blocks, which must agree to the bit. Errors are relative to each
number; the bounds are two to four times what was seen on x86-64 with gcc 12 (in the comments).
"""

import math

import pytest
import torch
from build_emulator import sanitized_tests
from emulated_token_sampling import Sample, SamplingEmulator
from torch import Tensor

from emulator import SCHEDULES
from fastdiff.kernels.common import philox
from fastdiff.kernels.token_sampling import reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
FLOATS = ("log_prob", "entropy", "margin", "end_log_prob")
ERROR = 6e-7  # of every float output; seen 1.9e-7
BOUNDARY = 1e-6  # how near a uniform must lie to where two ids meet for a draw to differ; no draw did here


@pytest.fixture
def sampling(emulator) -> SamplingEmulator:
    return SamplingEmulator(emulator)


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def randn(*shape: int, dtype: torch.dtype = F32, scale: float = 3.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=g) * scale).to(dtype)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def under_schedules(sampling: SamplingEmulator, run) -> Sample:
    results = []
    for schedule in SCHEDULES:
        sampling.emulator.configure(schedule)
        results.append(run())
    for other in results[1:]:
        for name, a, b in zip(Sample._fields, results[0], other, strict=True):
            assert same_bits(a, b), f"{name} depends on the order in which threads and blocks run"
    return results[0]


def as_scalar(value: int | Tensor) -> Tensor:
    return value.view(()) if isinstance(value, Tensor) else torch.tensor(value)


def expected(logits: Tensor, **settings) -> dict[str, Tensor]:
    """The reference's outputs for logits [R, V] or [B, L, V], and what a draw is judged by."""
    flat = logits.reshape(-1, logits.shape[-1]).double()
    length = logits.shape[-2]
    row = torch.arange(flat.shape[0])
    sequences, positions = settings.get("sequence_ids"), settings.get("positions")
    sequences = row // length if sequences is None else sequences
    positions = row % length if positions is None else positions
    temperature = settings.get("temperature", 1.0)
    temperature = torch.as_tensor(temperature, dtype=torch.float64)
    top_k, top_p = settings.get("top_k", 0), settings.get("top_p", 1.0)
    seed, step = as_scalar(settings.get("seed", 0)), as_scalar(settings.get("step", 0))
    tokens, *floats = reference.sample_tokens(
        flat, temperature, top_k, top_p, settings.get("suppress"), settings.get("end"), seed, step, sequences, positions
    )
    if settings.get("suppress") is not None:
        flat = flat.index_fill(1, settings["suppress"], -INF)
    temperature = temperature.expand(flat.shape[0])[:, None]
    scaled = ((flat - flat.amax(1, keepdim=True)) / temperature.where(temperature > 0, 1.0)).exp()
    threshold = reference.keep_threshold(flat, scaled, top_k, top_p)
    u = philox.uniform53(philox.philox(seed, sequences, positions, step, philox.DRAW_TOKEN))
    weights = torch.where(flat >= threshold, scaled, 0.0)
    return dict(zip(FLOATS, floats, strict=True)) | {
        "token": tokens, "u": u, "weights": weights, "threshold": threshold[:, 0]
    }  # fmt: skip


def assert_draws(tokens: Tensor, e: dict[str, Tensor]) -> Tensor:
    """Rows where the tokens agree; where they don't, u must lie where the two ids meet."""
    same = tokens == e["token"]
    for row in (~same).nonzero()[:, 0]:
        cumulative = e["weights"][row].cumsum(0) / e["weights"][row].sum()
        low, high = sorted((int(tokens[row]), int(e["token"][row])))
        assert abs(cumulative[low] - e["u"][row]) < BOUNDARY and abs(cumulative[high - 1] - e["u"][row]) < BOUNDARY
    return same


def assert_close(a: Tensor, b: Tensor, bound: float, name: str) -> None:
    subnormal = b.abs() < 1e-38  # in fp32
    equal = (a.double() == b.double()) | (a.isnan() & b.isnan()) | (subnormal & ((a - b).abs() < 3e-45))
    error = (a.double() - b.double()).abs() / b.double().abs()
    assert error[~equal].nan_to_num(nan=INF).lt(bound).all(), f"{name}: {error[~equal].max():.1e}"


def check(sampling: SamplingEmulator, logits: Tensor, **settings) -> Sample:
    s = under_schedules(sampling, lambda: sampling.sample_tokens(logits, **settings))
    e = expected(logits, **settings)
    same = assert_draws(s.token, e)
    assert same.float().mean() >= 0.99
    for name in FLOATS:
        if getattr(s, name) is not None:
            assert_close(getattr(s, name)[same], e[name][same], ERROR, name)
    if s.threshold is not None:
        drawing = torch.as_tensor(settings.get("temperature", 1.0)).expand(s.token.shape) > 0
        assert torch.equal(s.threshold[drawing].double(), e["threshold"][drawing])
    return s


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [1, 5, 127, 1023, 1024, 1025, 5000])
def test_vocabularies(sampling, vocab, dtype):
    """Temperatures 1 and, a row each, 0, small, large, near the limits of fp32; end tokens at both ends."""
    end = ids(0, vocab - 1) if vocab > 1 else ids(0)
    logits = randn(2, 7, vocab, dtype=dtype)
    check(sampling, logits, end=end, seed=-5, step=3)
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.5, 100.0, 1e-3, 1e-40] * 2)
    s = check(sampling, logits, temperature=temperature, seed=2**40)
    assert torch.equal(s.token[0::7], logits[:, 0].float().argmax(-1))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_one_temperature_for_all(sampling, temperature, dtype):
    check(sampling, randn(6, 2100, dtype=dtype), temperature=temperature, end=ids(5, 1024, 2099), suppress=ids(7))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("top_k, top_p", [(1, 1), (50, 1), (1500, 1), (10**6, 1), (0, 0.9), (0, 1e-9), (20, 0.6)])
def test_top_k_and_top_p(sampling, top_k, top_p, dtype):
    """Thresholds are those of a sort, in every dtype; rows at temperature 0 are not touched by them."""
    temperature = torch.tensor([1.0, 0.6, 2.0, 0.0])
    logits = randn(4, 1600, dtype=dtype)
    s = check(sampling, logits, top_k=top_k, top_p=top_p, temperature=temperature, suppress=ids(3, 1100, 1599))
    if top_k == 1 or top_p == 1e-9:
        assert torch.equal(s.threshold[:3], logits.float().index_fill(1, ids(3, 1100, 1599), -INF).amax(1)[:3])


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_ties(sampling, dtype):
    """Ties with the last kept id are all kept, at negative, zero and subnormal logits; argmax takes the lowest id."""
    pattern = torch.tensor([-2.0, -0.0, 1.0, 0.0, -INF, 6e-8, 1.0, -2.0])
    logits = pattern.repeat(2, 300).to(dtype)
    for top_k, top_p in ((1, 1.0), (601, 1.0), (1300, 1.0), (2300, 1.0), (0, 0.3), (0, 0.9999), (700, 0.99)):
        s = check(sampling, logits, top_k=top_k, top_p=top_p)
        assert logits[0, s.token[0]] >= s.threshold[0]
    s = check(sampling, logits, temperature=0.0)
    assert s.token.tolist() == [2, 2] and s.margin.tolist() == [0.0, 0.0]
    s = check(sampling, logits, temperature=0.0, suppress=torch.arange(0, 1100))
    assert s.token.tolist() == [1102, 1102]


def test_all_equal_logits(sampling):
    s = check(sampling, torch.full((8, 1030), -7.5), top_p=0.5, top_k=3)
    assert s.threshold.tolist() == [-7.5] * 8 and s.margin.tolist() == [0.0] * 8 and len(set(s.token.tolist())) > 4
    assert_close(s.log_prob, torch.full((8,), -math.log(1030)), 2e-7, "log_prob")


@pytest.mark.parametrize("temperature", [1e300, torch.full((64,), 3e38)], ids=["one", "rows"])
def test_at_any_high_temperature_all_allowed_ids_are_alike(sampling, temperature):
    logits, suppress = randn(64, 10), ids(1, 9)
    head = sampling.lm_head_sample(logits, torch.eye(10), temperature=temperature, suppress=suppress)
    for tokens in (sampling.sample_tokens(logits, temperature=temperature, suppress=suppress).token, head.token):
        assert set(tokens.flatten().tolist()) == {0, 2, 3, 4, 5, 6, 7, 8}  # 64 draws of 8 ids; a fixed seed


def test_suppressed_ids(sampling):
    """Whole blocks, single ids, ids that hold NaN or infinities; a suppressed end token has no mass."""
    logits = randn(3, 3100)
    suppress = torch.cat([ids(0, 77), torch.arange(1024, 2048), ids(3099)])
    logits[:, [0, 1030]] = NAN
    logits[:, 3099] = INF
    s = check(sampling, logits, suppress=suppress, end=ids(77, 1500, 2050), temperature=torch.tensor([1.0, 0.0, 0.3]))
    only = check(sampling, logits, suppress=suppress, end=ids(2050))
    assert same_bits(s.end_log_prob, only.end_log_prob)
    s = check(sampling, logits, suppress=suppress, end=ids(0, 1500))
    assert s.end_log_prob.tolist() == [-INF] * 3
    left = torch.cat([torch.arange(5), torch.arange(6, 3100)])
    s = check(sampling, logits, suppress=left, end=ids(5))  # one id is left
    assert s.token.tolist() == [5] * 3 and s.log_prob.tolist() == [0.0] * 3 and s.margin.tolist() == [1.0] * 3
    assert s.end_log_prob.tolist() == [0.0] * 3 and s.entropy.tolist() == [0.0] * 3


def test_lists_of_ids_that_are_not_in_order(sampling):
    """What they do is not said, but nothing outside the operands is touched (AddressSanitizer looks)."""
    s = sampling.sample_tokens(randn(2, 2100), suppress=ids(2000, 5, 7000, -3), end=ids(900, -5, 5000), top_p=0.9)
    assert (s.token >= 0).all() and (s.token < 2100).all()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.5}])
def test_rows_without_a_distribution(sampling, settings):
    logits = randn(7, 1100)
    logits[0] = -INF
    logits[1, 3] = NAN
    logits[2, 1099] = INF
    logits[3, 1060] = NAN
    logits[4, 4] = NAN  # suppressed
    logits[5, :1050] = -INF
    logits[6] = -INF
    logits[6, 4] = 1.0  # suppressed as well: nothing is left
    s = under_schedules(sampling, lambda: sampling.sample_tokens(logits, suppress=ids(4), end=ids(5, 1050), **settings))
    bad = torch.tensor([True, True, True, True, False, False, True])
    assert torch.equal(s.token == -1, bad)
    for name in FLOATS:
        assert torch.equal(getattr(s, name).isnan(), bad), name
    good = check(sampling, logits[4:6], suppress=ids(4), end=ids(5, 1050), positions=ids(4, 5), **settings)
    assert all(same_bits(getattr(s, name)[4:6], getattr(good, name)) for name in ("token", *FLOATS))


def test_near_certain_tokens_rank_as_in_float64(sampling):
    logits = 20 * randn(200, 1300, scale=1.0)
    s = check(sampling, logits, temperature=0.0)
    exact = expected(logits, temperature=0.0)["log_prob"]
    assert (logits.log_softmax(-1).amax(-1) == 0).sum() > 5  # where plain fp32 has ties
    assert (s.log_prob < 0).all()
    order = exact.argsort()
    distinct = exact[order].diff() > 4e-7 * exact[order][1:].abs()
    assert distinct.sum() > 190 and (s.log_prob[order].diff() > 0)[distinct].all()


def test_end_tokens_far_below_the_maximum(sampling):
    """Their mass may be less than the smallest fp32 number."""
    logits = randn(2, 1200)
    logits[:, 600] = 300.0
    s = check(sampling, logits, temperature=0.0, end=ids(3, 1100))
    assert (s.end_log_prob < -250).all() and s.end_log_prob.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strides_and_alignment(sampling, dtype):
    """Rows that overlap, rows of odd length, a start one element after a boundary: bits do not change."""
    base = randn(3, 4, 1031, dtype=dtype)
    settings = {"end": ids(1030), "top_p": 0.8}
    plain = check(sampling, base, **settings)
    wide = torch.full((3, 6, 1045), NAN, dtype=dtype)
    wide[:, 1:5, 3:1034] = base
    shifted = torch.empty(base.numel() + 1, dtype=dtype)[1:].view(base.shape).copy_(base)
    assert shifted.data_ptr() % 8
    for view in (wide[:, 1:5, 3:1034], shifted):
        other = sampling.sample_tokens(view, **settings)
        assert all(same_bits(a, b) for a, b in zip(plain, other, strict=True))
    sliding = base.flatten()[:1032].as_strided((1, 3, 1024), (0, 4, 1))
    check(sampling, sliding)
    check(sampling, sliding.as_strided((2, 3, 1024), (0, 0, 1)))  # one row for all


def test_offsets_beyond_2_to_31(sampling):
    """Rows 2^31 elements apart, in memory that is never touched in between."""
    near = randn(2, 1, 64, dtype=BF16)
    stride = 2**31 + 8
    far = torch.empty(stride + 64, dtype=BF16).as_strided((2, 1, 64), (stride, stride, 1))
    far.copy_(near)
    for settings in ({}, {"top_k": 5}):
        a, b = (sampling.sample_tokens(t, **settings) for t in (near, far))
        assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_seed_step_and_ids(sampling):
    """Numbers read on the device are the numbers passed; sequence ids and positions name the draw."""
    logits = torch.zeros(2, 40, 900)
    sequences, positions = torch.arange(80) // 7 + 2**33, torch.arange(80) * 3 - 5
    plain = check(sampling, logits, seed=77, step=5)
    device = check(sampling, logits, seed=ids(77), step=ids(5))
    assert same_bits(plain.token, device.token)
    named = check(sampling, logits, seed=77, step=5, sequence_ids=sequences, positions=positions)
    for other in (named, check(sampling, logits, seed=78, step=5), check(sampling, logits, seed=77, step=6)):
        assert (plain.token == other.token).float().mean() < 0.05
    alone = check(sampling, logits[0, 9:10], seed=77, step=5, sequence_ids=sequences[49:50], positions=positions[49:50])
    assert alone.token[0] == named.token[49]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 40, "top_p": 0.9}])
def test_a_row_alone_is_the_row_in_a_batch(sampling, settings):
    logits = randn(9, 2051, dtype=BF16)  # odd: every row has another alignment
    rows = torch.arange(9)
    whole = sampling.sample_tokens(logits, sequence_ids=rows, positions=rows, end=ids(4), **settings)
    sampling.emulator.configure(max_grid=2)  # and with more rows than the grid has blocks
    looped = sampling.sample_tokens(logits, sequence_ids=rows, positions=rows, end=ids(4), **settings)
    assert all(same_bits(a, b) for a, b in zip(whole, looped, strict=True))
    for r in range(9):
        row = rows[r : r + 1]
        alone = sampling.sample_tokens(logits[r : r + 1], sequence_ids=row, positions=row, end=ids(4), **settings)
        for name, t in zip(Sample._fields, alone, strict=True):
            assert t is None or same_bits(t, getattr(whole, name)[r : r + 1]), name


@pytest.mark.parametrize("count", [1, 2, 8, 31, 32, 33, 128, 200])
def test_choose_at_the_ends(sampling, count):
    """u = 0, u just below 1 and beyond what rounding may give land on an id whose weight is above zero."""
    g = torch.Generator().manual_seed(count)
    weights = torch.rand(count, generator=g, dtype=torch.float64) + 1e-3
    zeros = torch.rand(count, generator=g) < 0.4
    zeros[count // 2] = False
    weights[zeros] = 0.0
    positive = weights.nonzero()[:, 0]
    cumulative = weights.cumsum(0)
    last = 1 - 2.0**-53
    for u, index in ((0.0, positive[0]), (last, positive[-1]), (1.0, positive[-1])):
        assert sampling.choose(weights, u)[0] == index
    for u in torch.linspace(0, last, 37, dtype=torch.float64).tolist():
        index, before, weight = sampling.choose(weights, u)
        assert index == reference.choose(weights[None], torch.tensor([u], dtype=torch.float64))[0]
        assert weight == weights[index] and abs(before - (cumulative[index] - weight)) < 1e-13 * cumulative[-1]


def test_choose_weights_of_any_size(sampling):
    for weights in ([0.0, 5e-324, 0.0], [1e308, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1e-300, 0.0], [1e-300, 1.0, 1e-300]):
        t = torch.tensor(weights, dtype=torch.float64)
        for u in (0.0, 0.5, 1 - 2.0**-53, 1.0):
            assert t[sampling.choose(t, u)[0]] > 0
    assert sampling.choose(torch.zeros(40, dtype=torch.float64), 0.5)[0] == -1


def test_draws_at_the_ends(sampling):
    """The smallest and the largest u of 200 000 positions, on rows that begin and end with ids of no weight."""
    positions = torch.arange(200_000)
    zero = torch.tensor(0)
    u = philox.uniform53(philox.philox(zero, zero.expand_as(positions), positions, zero, 0))
    chosen = torch.cat([u.topk(6).indices, u.topk(6, largest=False).indices])
    logits = randn(1, 2300, scale=0.1).expand(12, -1).clone()
    logits[:, :1030] = -INF
    logits[:, 2200:] = -INF
    s = check(sampling, logits, positions=chosen, sequence_ids=torch.zeros_like(chosen))
    assert s.token.tolist() == [2199] * 6 + [1030] * 6
    logits[:, 1030:1040] = -200.0  # a weight that fp32 rounds to 0
    s = check(sampling, logits, positions=chosen, sequence_ids=torch.zeros_like(chosen))
    assert s.token.tolist() == [2199] * 6 + [1040] * 6


def test_chi_square(sampling):
    """The drawn ids have the distribution that was asked for: 4 000 draws, cells of at least 20 expected ones."""
    logits = randn(1, 1300, scale=1.5).expand(4000, -1)
    tokens = sampling.sample_tokens(logits, temperature=0.8, seed=11).token
    p = (logits[0].double() / 0.8).softmax(-1)
    order = p.argsort(descending=True)
    wanted, seen = 4000 * p[order], torch.bincount(tokens, minlength=1300)[order].double()
    cell = (wanted.cumsum(0) / 20).long()
    cells = int(cell[-1]) + 1
    wanted, seen = (torch.zeros(cells, dtype=torch.float64).index_add(0, cell, t) for t in (wanted, seen))
    keep = wanted > 5
    statistic = ((seen - wanted) ** 2 / wanted)[keep].sum()
    tail = torch.special.gammaincc(torch.tensor((int(keep.sum()) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert keep.sum() > 100 and 1e-3 < tail < 1 - 1e-3  # seen 0.74, 140 cells


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab, dim, tile", [(1, 8, 1024), (900, 16, 1024), (2500, 13, 1024), (3100, 32, 2048)])
def test_lm_head_sample(sampling, vocab, dim, tile, dtype):
    """As sample_tokens of the rounded logits, with bias, suppressed ids, end tokens and all kinds of temperature."""
    hidden, weight = randn(10, dim, dtype=dtype, scale=1.0), randn(vocab, dim + 3, dtype=dtype, scale=1.0)[:, 2:-1]
    bias = randn(vocab, dtype=dtype, scale=0.5)
    settings = {"temperature": torch.tensor([0.0, 1.0, 1.0, 0.4, 1.7] * 2), "seed": 3, "end": ids(0)}
    if vocab > 1:
        settings |= {"suppress": ids(1, vocab - 2), "end": ids(0, vocab - 1)}
    logits = (hidden.double() @ weight.double().T + bias.double()).to(dtype)
    s = under_schedules(sampling, lambda: sampling.lm_head_sample(hidden, weight, bias, tile_size=tile, **settings))
    plain = sampling.sample_tokens(logits, **settings)
    for name in FLOATS[1:]:
        assert same_bits(getattr(s, name), getattr(plain, name)), name
    e = expected(logits, **settings)
    same = assert_draws(s.token, e)
    assert same.all()
    assert_close(s.log_prob, e["log_prob"], ERROR, "log_prob")


def test_lm_head_alignment(sampling):
    """Operands that start or step off a 16-byte boundary are read element by element; tokens stay."""
    hidden, weight = randn(8, 24, dtype=BF16), randn(1500, 24, dtype=BF16)
    aligned = sampling.lm_head_sample(hidden, weight)
    moved = torch.empty(weight.numel() + 1, dtype=BF16)[1:].view(weight.shape).copy_(weight)
    stepped = torch.empty(1500, 25, dtype=BF16)[:, :24].copy_(weight)
    for other in (moved, stepped):
        s = sampling.lm_head_sample(hidden, other)
        assert torch.equal(s.token, aligned.token) and same_bits(s.entropy, aligned.entropy)


def test_lm_head_rows_without_a_distribution(sampling):
    hidden, weight = randn(3, 8), randn(1100, 8)
    hidden[1, 2] = NAN
    s = under_schedules(sampling, lambda: sampling.lm_head_sample(hidden, weight, end=ids(3)))
    assert s.token[1] == -1 and (s.token[[0, 2]] >= 0).all()
    assert all(getattr(s, name).isnan().tolist() == [False, True, False] for name in FLOATS)


def test_no_rows(sampling):
    assert sampling.sample_tokens(torch.empty(0, 50)).token.shape == (0,)
    assert sampling.sample_tokens(torch.empty(3, 0, 50), top_k=3).token.shape == (0,)
    assert sampling.lm_head_sample(torch.empty(0, 8), randn(50, 8)).token.shape == (0,)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": NAN}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": NAN}, {"top_k": -1}],
)
def test_refused_settings(sampling, settings):
    with pytest.raises(ValueError, match="cudaError 1"):
        sampling.sample_tokens(randn(2, 9), **settings)


def test_refused_operands(sampling):
    with pytest.raises(ValueError, match="cudaError 1"):
        sampling.sample_tokens(randn(2, 9).double())
    for settings in ({"top_k": 3}, {"top_p": 0.5}, {"tile_size": 1000}, {"tile_size": 0}):
        with pytest.raises(ValueError, match="cudaError 1"):
            sampling.lm_head_sample(randn(2, 8), randn(9, 8), **settings)


def test_under_address_and_undefined_behaviour_sanitizers(libraries):
    """A selection of these tests, in a process of its own with the sanitized library."""
    chosen = ["vocabularies and 1025-", "top_k_and and 20-", "without", "strides", "not_in_order", "head_sample and 13"]
    done = sanitized_tests(__file__, chosen, libraries("asan"))
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
