"""sample_tokens and lm_head_sample beyond the harness: distributions, draws, certainty, invalid rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import use_backend
from fastdiff.kernels.common import philox
from fastdiff.kernels.token_sampling import reference
from fastdiff.ops import _token_sampling_backends, lm_head_sample, sample_tokens
from ops.harness import BF16, F16, F32, NATIVE, ROWS, check_operators, check_schemas
from ops.token_sampling_cases import explain

native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
every = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
BEST = NATIVE[-1]
DIFFERENT = 5e-4  # of the draws may fall on the other side of a boundary: the contract


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


# ------------------------------------------------------------------------------------------------ distribution
def chi_square(counts: np.ndarray, probabilities: np.ndarray, cells: int = 200) -> float:
    """The p-value of counts, ids pooled into cells of about equal probability."""
    order = np.argsort(-probabilities)
    cell = np.minimum((np.cumsum(probabilities[order]) * cells).astype(int), cells - 1)
    expected = np.bincount(cell, probabilities[order], cells) * counts.sum()
    observed = np.bincount(cell, counts[order], cells)
    expected, observed = expected[expected > 0], observed[expected > 0]
    expected = expected * observed.sum() / expected.sum()
    statistic, freedom = np.sum((observed - expected) ** 2 / expected), len(expected) - 1
    return torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()).item()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5000}], ids=str)
@pytest.mark.parametrize("vocab", [50257, 126464])
def test_draws_follow_the_distribution(vocab, settings):
    draws = 20000 if settings else 40000
    settings = {"temperature": 1.0} | settings
    logits = randn(vocab, seed=vocab) * 2
    rows = logits.expand(draws, vocab)  # one row in memory
    with BEST.active():
        token = sample_tokens(rows, seed=5, **settings).token
    z = logits.double()[None]
    weights = (z / settings["temperature"]).softmax(-1)
    threshold = reference.keep_threshold(z, weights, settings.get("top_k", 0), settings.get("top_p", 1.0))
    kept = torch.where(z >= threshold, weights, 0.0)[0]
    counts = token.bincount(minlength=vocab)
    assert counts[kept == 0].sum() == 0
    # Fixed seeds: a p-value below 1e-3 is a wrong distribution. Seen: 0.11 to 0.98.
    assert chi_square(counts.numpy(), (kept / kept.sum()).numpy()) > 1e-3


def test_a_wrong_distribution_is_found_out():
    """The test above would notice a temperature that is 5 % too low, the like of what truncated Gumbel noise does."""
    logits = randn(50257, seed=50257) * 2
    with BEST.active():
        token = sample_tokens(logits.expand(60000, -1), temperature=0.95, seed=5).token
    assert chi_square(token.bincount(minlength=50257).numpy(), logits.double().softmax(-1).numpy()) < 1e-6


@native
@pytest.mark.parametrize("kind", ["normal", "sorted", "equal", "two-levels", "spikes", "hidden-from-the-sample"])
@pytest.mark.parametrize("filters", [{"top_k": 7}, {"top_k": 2500}, {"top_p": 0.05}, {"top_p": 0.6}, {"top_p": 0.999}])
def test_filters_are_exact_whatever_the_row(kind, filters, row):
    """Vocabularies large enough for a sample of the row to guide the cut, and rows that mislead the sample."""
    row.skip_unless_runnable("sample_tokens")
    vocab = 20011
    z = randn(2, vocab, seed=3)
    if kind == "sorted":
        z = z.sort(dim=-1, descending=True).values
    if kind == "equal":
        z = torch.zeros(2, vocab)
    if kind == "two-levels":
        z = (z > 1).float() * 3
    if kind == "spikes":
        z[:, ::4999] += 25
    if kind == "hidden-from-the-sample":  # the CPU kernel looks at 256 lines of 16: make those the smallest
        for line in range(256):
            start = (vocab - 16) * line // 255
            z[:, start : start + 16] -= 8
    exact = z.double()
    weights = (exact - exact.amax(-1, keepdim=True)).exp()
    threshold = reference.keep_threshold(exact, weights, filters.get("top_k", 0), filters.get("top_p", 1.0))
    with row.active():
        tokens = sample_tokens(z[:, None].expand(2, 400, vocab), temperature=1.0, seed=1, **filters).token
    drawn = exact.gather(-1, tokens)
    assert (drawn >= threshold - 1e-6).all()  # ids right at the cut may differ by the last bits of its mass
    few = (exact >= threshold).sum(-1)
    if few.max() <= 8 and kind in ("normal", "sorted"):
        assert all(len(t.unique()) == n for t, n in zip(tokens, few.tolist(), strict=True)), "each kept id is drawn"


# ------------------------------------------------------------------------------------------------ draws
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.9}], ids=str)
def test_instruction_sets_draw_the_same_tokens(settings):
    vocab, rows = 126464, 1500
    logits = randn(vocab, seed=1).repeat(2)  # a row each: shifted views of one random row
    logits = logits.as_strided((rows, vocab), (37, 1))
    draws = []
    for row in NATIVE:
        with row.active():
            draws.append(sample_tokens(logits, seed=3, **settings).token)
    for row, token in zip(NATIVE, draws, strict=True):
        different = (token != draws[-1]).nonzero()[:, 0].tolist()
        assert len(different) <= max(1, DIFFERENT * rows), f"{row.name}: {len(different)} draws differ"
        for r in different:
            explain(_rows(logits, r, 3, settings), 0, int(token[r]), 2e-6)


def _rows(logits: Tensor, r: int, seed: int, settings: dict) -> dict:
    return {
        "logits": logits[r : r + 1],
        "temperature": torch.tensor([settings["temperature"]]).double(),
        "top_k": settings.get("top_k", 0),
        "top_p": settings.get("top_p", 1.0),
        "suppress_tokens": None,
        "seed": torch.tensor(seed),
        "step": torch.tensor(0),
        "sequence_ids": torch.tensor([r]),
        "positions": torch.tensor([0]),
    }


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 900}], ids=str)
def test_draws_agree_with_float64(settings):
    logits = randn(300, 50257, seed=2) * 2
    with BEST.active():
        token = sample_tokens(logits, seed=9, **settings).token
    with use_backend("reference"):
        exact = torch.cat(
            [
                sample_tokens(part, seed=9, sequence_ids=torch.arange(300)[i * 50 : i * 50 + 50], **settings).token
                for i, part in enumerate(logits.split(50))
            ]
        )
    different = (token != exact).nonzero()[:, 0].tolist()
    assert len(different) <= 1
    for r in different:
        explain(_rows(logits, r, 9, settings), 0, int(token[r]), 2e-6)


@native
def test_a_row_alone_is_the_row_in_any_batch_and_order(row):
    row.skip_unless_runnable("sample_tokens")
    logits, settings = randn(2, 7, 3000) * 2, {"temperature": 0.9, "seed": 4, "step": 6, "top_k": 200}
    with row.active():
        whole = sample_tokens(logits, **settings)
        order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
        flat = sample_tokens(
            logits.view(14, -1)[order], sequence_ids=order // 7, positions=order % 7, **settings
        )  # [R, V], shuffled
        assert all(torch.equal(a.flatten()[order], b) for a, b in zip(whole[:4], flat[:4], strict=True))
        for b, i in ((0, 0), (1, 6)):
            alone = sample_tokens(logits[b, i], sequence_ids=torch.tensor(b), positions=torch.tensor(i), **settings)
            assert all(torch.equal(a[b, i], one) for a, one in zip(whole[:4], alone[:4], strict=True))
        again = sample_tokens(logits, **settings | {"step": 7})
    assert not torch.equal(whole.token, again.token), "another step draws other tokens"


@pytest.fixture(scope="module")
def ends() -> Tensor:
    """The positions, of a million, whose uniform is the smallest and the largest, at seed 1, sequence 0, step 0."""
    positions, zero = torch.arange(1_000_000), torch.tensor(0)
    u = philox.uniform53(philox.philox(torch.tensor(1), zero, positions, zero, philox.DRAW_TOKEN))
    assert u.min() < 4e-6 and u.max() > 1 - 4e-6
    return torch.stack([u.argmin(), u.argmax()])


@every
def test_the_ends_of_the_uniform_land_on_allowed_ids(row, ends):
    row.skip_unless_runnable("sample_tokens")
    logits = torch.full((2, 2500), -math.inf)
    logits[:, 1100:1105] = 0.0
    logits[:, 1500] = -103.0  # a weight that float32 can hardly hold
    with row.active():
        for suppress in (None, [1100, 1104]):
            token = sample_tokens(
                logits, temperature=1.0, seed=1, sequence_ids=torch.zeros(2, dtype=torch.int64), positions=ends,
                suppress_tokens=suppress,
            ).token  # fmt: skip
            assert token.tolist() == ([1100, 1104] if suppress is None else [1101, 1103])


@native
def test_numbers_in_tensors_are_the_numbers(row):
    row.skip_unless_runnable("sample_tokens")
    logits = randn(3, 5, 900) * 2
    with row.active():
        plain = sample_tokens(logits, temperature=0.7, seed=2**40 + 3, step=12)
        tensors = sample_tokens(
            logits, temperature=torch.tensor(0.7), seed=torch.tensor(2**40 + 3), step=torch.tensor([12]),
            sequence_ids=torch.arange(3), positions=torch.arange(5),
        )  # fmt: skip
        assert same(plain, tensors)
        torch.manual_seed(0)
        first, second = (sample_tokens(logits, temperature=1.0).token for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(first, sample_tokens(logits, temperature=1.0).token) and not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------ certainty
@every
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_peaked_rows_rank_as_in_float64(dtype, row):
    row.skip_unless_runnable("sample_tokens")
    logits = (randn(400, 2000, seed=6) * 20).to(dtype)
    with row.active():
        sample = sample_tokens(logits)
    z = logits.double()
    top = z.amax(-1, keepdim=True)
    others = (z - top).exp().scatter(-1, z.argmax(-1, keepdim=True), 0.0).sum(-1)
    exact = -torch.log1p(others)
    assert (exact > -6e-8).sum() >= 10, "there are rows that x - logsumexp(x) cannot tell apart in float32"
    torch.testing.assert_close(sample.log_prob.double(), exact, rtol=1e-6, atol=0)
    ranks, exact_ranks = sample.log_prob.argsort(stable=True), exact.argsort(stable=True)
    swapped = ranks != exact_ranks  # only rows whose float64 values are one float32 apart may swap
    torch.testing.assert_close(exact[ranks][swapped], exact[exact_ranks][swapped], rtol=1e-6, atol=0)
    p = (z - top).exp() / (1 + others)[:, None]
    entropy = others.log1p() - (p * (z - top).clamp_min(-1e3)).sum(-1)
    torch.testing.assert_close(sample.entropy.double(), entropy, rtol=2e-6, atol=0)


@native
def test_draws_have_no_gradient(row):
    row.skip_unless_runnable("sample_tokens")
    head = torch.nn.Linear(8, 20)
    hidden = randn(2, 3, 8).requires_grad_()
    with row.active():
        for sample in (sample_tokens(head(hidden)), lm_head_sample(hidden, head.weight, head.bias)):
            assert not any(t.requires_grad for t in sample[:4])
        with torch.autocast("cpu", torch.bfloat16):
            assert not lm_head_sample(hidden, head.weight, head.bias).log_prob.requires_grad


@every
def test_the_margin_of_a_tie_is_zero(row):
    row.skip_unless_runnable("sample_tokens")
    with row.active():
        assert str(sample_tokens(torch.zeros(1, 4)).margin.item()) == "0.0"


# ------------------------------------------------------------------------------------------------ invalid rows
@every
@pytest.mark.parametrize("temperature", [1e37, 1e39, 1e46, 1e300, "rows"])
def test_at_any_high_temperature_all_allowed_ids_are_alike(row, temperature):
    """1/T in float32 must not be 0, which would make NaNs of suppressed ids: -inf · 0."""
    logits, options = randn(1, 512, 10).to(row.device), {"suppress_tokens": [1, 9], "seed": 1}
    temperature = torch.full((1, 512), 3e38, device=row.device) if temperature == "rows" else temperature
    with row.active():
        samples = [sample_tokens(logits, temperature=temperature, top_p=p, **options) for p in (1.0, 0.999)]
        samples.append(lm_head_sample(logits, torch.eye(10, device=row.device), temperature=temperature, **options))
    for sample in samples:
        counts = torch.bincount(sample.token.flatten().cpu(), minlength=10)
        assert counts.sum() == 512 and not counts[[1, 9]].any() and len(counts) == 10
        assert counts[[0, 2, 3, 4, 5, 6, 7, 8]].min() > 20  # of 64; a fixed seed


@every
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_rows_without_a_distribution(row, settings):
    row.skip_unless_runnable("sample_tokens")
    logits = randn(3, 4, 1500)
    bad = {(0, 1): math.nan, (1, 2): math.inf, (2, 0): -math.inf}
    for (b, i), value in bad.items():
        if value == -math.inf:
            logits[b, i] = value
        else:
            logits[b, i, 1033] = value
    settings = settings | {"seed": 1, "end_token_ids": [5]}
    with row.active():
        with pytest.raises(ValueError, match=r"row \[0, 1\] has no distribution.*invalid='flag'"):
            sample_tokens(logits, **settings)
        sample = sample_tokens(logits, invalid="flag", **settings)
        # where the bad logit is suppressed nobody reads it
        fine = sample_tokens(logits[:2], suppress_tokens=[1033], **settings)
        mixed = logits[:1].clone()
        mixed[0, 0] = -math.inf
        mixed[0, 0, 3] = math.nan  # a NaN among -inf
        assert sample_tokens(mixed, invalid="flag", **settings).token[0, 0] == -1
    where = torch.zeros(3, 4, dtype=torch.bool)
    for place in bad:
        where[place] = True
    assert torch.equal(sample.token == -1, where)
    for result in sample[1:]:
        assert torch.equal(result.isnan(), where)
    assert (fine.token >= 0).all() and (fine.token != 1033).all() and not any(t.isnan().any() for t in fine[1:])


def test_invalid_rows_under_compile():
    compiled = torch.compile(lambda z: sample_tokens(z).token, fullgraph=True, backend="aot_eager")
    logits = randn(3, 20)
    assert torch.equal(compiled(logits), logits.argmax(-1))
    with pytest.raises(RuntimeError, match="no distribution"):
        compiled(torch.full((3, 20), math.nan))


# ------------------------------------------------------------------------------------------------ the head
@native
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "suppress_tokens": [3, 2047, 4000]},
        {"temperature": 1.0, "top_p": 0.7},
    ],
    ids=["greedy", "plain", "suppressed", "top_p"],
)
def test_the_head_draws_what_its_logits_would(settings, dtype, row):
    row.skip_unless_runnable("lm_head_sample")
    hidden, weight = randn(4, 6, 48, seed=1).to(dtype), (randn(4100, 48, seed=2) * 0.6).to(dtype)
    bias = randn(4100, seed=3).to(dtype)
    for b in (None, bias):
        with row.active():
            head = lm_head_sample(hidden, weight, b, seed=8, end_token_ids=[7, 4099], **settings)
            logits = functional.linear(hidden, weight, b)
            plain = sample_tokens(logits, seed=8, end_token_ids=[7, 4099], **settings)
        assert (head.token == plain.token).float().mean() >= 0.99
        same_token = head.token == plain.token
        # 16-bit logits of two products may round apart now and then; the tile's statistics come from the same product
        tolerance = {F32: 1e-5, BF16: 2**-6, F16: 2**-9}[dtype]
        torch.testing.assert_close(head.log_prob[same_token], plain.log_prob[same_token], rtol=0, atol=tolerance * 4)
        for name in ("entropy", "margin", "end_log_prob"):
            torch.testing.assert_close(getattr(head, name), getattr(plain, name), rtol=tolerance, atol=tolerance)


@native
def test_a_hidden_state_alone_draws_what_it_draws_in_a_batch(row):
    """To the last bits of torch's product, whose order of sums depends on the number of rows."""
    row.skip_unless_runnable("lm_head_sample")
    hidden, weight, settings = randn(6, 5, 32, seed=1), randn(3000, 32, seed=2), {"temperature": 0.8, "seed": 2}
    with row.active():
        whole = lm_head_sample(hidden, weight, **settings)
        alone = lm_head_sample(hidden[3:4], weight, sequence_ids=torch.tensor([3]), **settings)
    assert torch.equal(whole.token[3:4], alone.token)
    for a, b in zip(whole[1:4], alone[1:4], strict=True):
        torch.testing.assert_close(a[3:4], b, rtol=1e-5, atol=1e-5)


@every
def test_end_log_prob_keeps_its_digits_where_the_end_is_certain(row):
    row.skip_unless_runnable("sample_tokens")
    logits = torch.zeros(2, 1200)
    logits[0, 5], logits[0, 1100] = 30.0, 25.0  # two end tokens, and 1198 others of weight exp(-30)
    logits[1, 6] = 30.0
    with row.active():
        end = sample_tokens(logits, end_token_ids=[5, 1100]).end_log_prob.double()
    ended = torch.log1p(torch.tensor(-5.0).double().exp())
    rest = 1198 * torch.tensor(-30.0).double().exp()
    # the weight of the second end token comes once from float32 and once from float64: seen 2.9e-12
    torch.testing.assert_close(end[0], -rest / (1 + ended.expm1()), rtol=0, atol=6e-12)
    torch.testing.assert_close(end[1], torch.tensor(2.0).double().log() - 30, rtol=1e-6, atol=0)


def test_the_head_under_autocast_is_linear_under_autocast():
    hidden, weight = randn(3, 4, 32, seed=1), randn(500, 32, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        head, plain = lm_head_sample(hidden, weight), sample_tokens(functional.linear(hidden, weight))
        after_a_layer = lm_head_sample(hidden.bfloat16(), weight)  # states as a layer under autocast leaves them
    assert same(head, plain) and same(after_a_layer, plain)


def test_rows_with_filters_are_taken_in_chunks(monkeypatch):
    from fastdiff.ops import token_sampling

    hidden, weight = randn(5, 7, 16, seed=1), randn(300, 16, seed=2)
    settings = {"temperature": torch.rand(5, 7), "top_k": 20, "seed": 3, "end_token_ids": [1]}
    whole = lm_head_sample(hidden, weight, **settings)
    monkeypatch.setattr(token_sampling, "_LOGITS_AT_ONCE", 4 * 300 * 4)
    parts = lm_head_sample(hidden, weight, **settings)
    assert torch.equal(whole.token, parts.token)
    torch.testing.assert_close(whole[1:], parts[1:])


# ------------------------------------------------------------------------------------------------ torch
def test_opcheck():
    logits, ids = randn(2, 3, 40), torch.arange(6)
    tail = (torch.tensor([1]), torch.tensor([0, 5]), torch.tensor(3), 0, None, 1, ids, ids)
    calls = {
        "sample_tokens": (logits, torch.rand(6), 0.0, 4, 0.9, *tail),
        "lm_head_sample": (logits, randn(50, 40), randn(50), None, 1.0, *tail),
    }
    check_operators(_token_sampling_backends.SCHEMAS, calls)


def test_schemas_in_python_and_cpp_are_the_same():
    check_schemas(_token_sampling_backends.SCHEMAS)


def test_offsets_beyond_two_to_the_31_elements():
    """4 GiB of which three rows are touched."""
    vocab, stride = 2000, 2**30 + 7
    base = torch.from_numpy(np.zeros(2 * stride + vocab, np.uint16)).view(BF16)
    logits = base.as_strided((3, vocab), (stride, 1))
    values = randn(3, vocab).bfloat16()
    for i in range(3):
        logits[i] = values[i]
    assert same(sample_tokens(logits, temperature=1.0, seed=1), sample_tokens(values, temperature=1.0, seed=1))
