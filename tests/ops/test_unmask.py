"""unmask_ on every backend: equal to the reference, to the published rules, and unharmed by bad input."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastdiff import BackendError, use_backend
from fastdiff.ops import TokenSample, sample_tokens, unmask_
from ops.harness import NATIVE, ROWS, across_threads, cover
from ops.properties import given, settings, st
from ops.unmask_cases import KINDS, MASK, NUMBERS, ORDERS, RULES, Problem, numbers, problem

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
every_rule = pytest.mark.parametrize("rule", RULES)
CPUS = [r for r in NATIVE if r.backend == "cpu"] or ROWS[:1]


def run(p: Problem, rule: str, order: str = "confidence", value=None, device: str = "cpu", **keywords):
    """(token_ids, committed), both new and on the CPU."""
    value = NUMBERS[rule] if value is None else value
    ids = p.token_ids.clone().to(device)
    sample = TokenSample(*(t.to(device) for t in p.sample[:4]))
    tensors = {k: t.to(device) for k, t in p.optional.items()}
    value = value.to(device) if isinstance(value, Tensor) else value
    committed = unmask_(ids, sample, MASK, rule=rule, order=order, **numbers(rule, value), **(tensors | keywords))
    return ids.cpu(), committed.cpu()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ the reference
@pytest.mark.parametrize(
    ("row", "rule", "order", "kind"),
    [
        pytest.param(row, rule, order, kind, id=f"{row.name}-{rule}-{order}-{kind}", marks=marks)
        for row, (rule, order), kind, marks in cover(list(itertools.product(RULES, ORDERS)), KINDS)
    ],
)
def test_every_rule_and_order_equals_the_reference(row, rule, order, kind):
    row.skip_unless_runnable("unmask_")
    p = problem(kind, 7, 83)
    with row.active():
        result = run(p, rule, order, seed=5, step=2, device=row.device)
    assert same(result, p.expected(rule, order, NUMBERS[rule], seed=5, step=2))


@native
@every_rule
def test_each_row_has_its_own_number(row, rule):
    row.skip_unless_runnable("unmask_")
    values = {
        "count": torch.tensor([1, 2, 50, 3]), "threshold": torch.tensor([1.0, 0.5, 0.1, 0.9], dtype=torch.float64),
        "factor": torch.tensor([0.01, 1.5, 40.0, 2.0]), "entropy_budget": torch.tensor([0.0, 2.0, torch.inf, 0.5]),
        "ancestral": torch.tensor([0.0, 0.5, 1.0, 0.1]),
    }[rule]  # fmt: skip
    p = problem("plain", 4, 50)
    with row.active():
        result = run(p, rule, value=values, seed=1, device=row.device)
    assert same(result, p.expected(rule, "confidence", values.float(), seed=1))


@native
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 1024, 4097])
def test_lengths(row, length):
    row.skip_unless_runnable("unmask_")
    p = problem("plain", 2, length)
    for rule in RULES:
        with row.active():
            assert same(run(p, rule, seed=3, device=row.device), p.expected(rule, "confidence", NUMBERS[rule], seed=3))


@settings(max_examples=400, deadline=None)
@given(
    batch=st.integers(1, 6),
    length=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    rule=st.sampled_from(RULES),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**32 - 1),
    data=st.data(),
    row=st.sampled_from(CPUS),
)
def test_any_problem(batch, length, kind, rule, order, seed, step, data, row):
    """Equal to the reference, and what must hold of any result."""
    p = problem(kind, batch, length, seed=seed % 1000)
    value = data.draw({
        "count": st.integers(1, 80), "threshold": st.floats(1e-3, 1), "factor": st.floats(1e-3, 50),
        "entropy_budget": st.floats(0, 100), "ancestral": st.floats(0, 1),
    }[rule])  # fmt: skip
    with row.active():
        ids, committed = run(p, rule, order, value, seed=seed, step=step)
    assert same((ids, committed), p.expected(rule, order, value, seed=seed, step=step))
    sample, before = p.dense(), p.token_ids
    changed = ids != before
    assert (before[changed] == MASK).all(), "only masks change"
    assert torch.equal(ids[changed], sample.token[changed]) and (ids[changed] != MASK).all() and (ids >= 0).all()
    assert torch.equal(changed.sum(1), committed)
    candidate = (before == MASK) & (sample.token != MASK) & (sample.token >= 0)
    if kind == "blocks":
        o, at = p.optional, torch.arange(length)
        candidate &= (at >= o["block_start"][:, None]) & (at < o["block_end"][:, None]) & o["active"][:, None]
    assert (candidate | ~changed).all(), "only candidates are committed"
    if rule != "ancestral":
        assert torch.equal(committed > 0, candidate.any(1)), "at least one per row that has candidates"
    if rule == "count":
        assert torch.equal(committed, candidate.sum(1).clamp_max(value))


# ------------------------------------------------------------------------------------------------ published rules
def by_confidence(seed: int, batch: int = 9, length: int = 60) -> tuple[Problem, Tensor, Tensor]:
    """A problem without ties, every masked position a candidate; its confidences in float64; its masks."""
    p = problem("plain", batch, length, seed)
    p.sample.token.clamp_(0, MASK - 1)
    return p, p.sample.log_prob.double().exp(), p.token_ids == MASK


@pytest.mark.parametrize("seed", range(3))
def test_count_is_lladas_loop(seed):
    p, confidence, mask = by_confidence(seed)
    counts = torch.randint(1, 9, (9,), generator=torch.Generator().manual_seed(seed))
    confidence = torch.where(mask, confidence, -torch.inf)
    transfer = torch.zeros_like(mask)
    for j in range(len(counts)):
        _, chosen = torch.topk(confidence[j], k=min(int(counts[j]), int(mask[j].sum())))
        transfer[j, chosen] = True
    ids, committed = run(p, "count", value=counts)
    assert torch.equal(ids, torch.where(transfer, p.sample.token, p.token_ids))
    assert torch.equal(committed, transfer.sum(1))


@pytest.mark.parametrize("value", [0.3, 0.8, 0.999])
def test_threshold_is_fast_dllms_rule(value):
    p, confidence, mask = by_confidence(4)
    ids, _ = run(p, "threshold", value=value)
    for j, row_ids in enumerate(ids):
        masked = [i for i in range(60) if mask[j, i]]
        taken = [i for i in masked if confidence[j, i] >= value] or [max(masked, key=lambda i: confidence[j, i])]
        assert [i for i in masked if row_ids[i] != MASK] == taken


@pytest.mark.parametrize("value", [0.2, 1.0, 1.7, 6.0])
def test_factor_is_fast_dllms_rule(value):
    p, confidence, mask = by_confidence(5)
    ids, _ = run(p, "factor", value=value)
    for j, row_ids in enumerate(ids):
        best_first = sorted((i for i in range(60) if mask[j, i]), key=lambda i: -confidence[j, i])
        largest = 1
        for n in range(1, len(best_first) + 1):
            if (n + 1) * (1 - confidence[j, best_first[n - 1]]) < value:
                largest = n
        assert {i for i in best_first if row_ids[i] != MASK} == set(best_first[:largest])


@pytest.mark.parametrize("value", [0.0, 0.15, 1.0, 8.0])
def test_entropy_budget_is_the_entropy_bounded_rule(value):
    p, _, mask = by_confidence(6)
    ids, _ = run(p, "entropy_budget", "entropy", value=value)
    for j, row_ids in enumerate(ids):
        entropies = p.sample.entropy[j].tolist()
        taken, spent = set(), 0.0
        for i in sorted((i for i in range(60) if mask[j, i]), key=lambda i: entropies[i]):
            if spent > value:
                break
            taken.add(i)
            spent += entropies[i]
        assert {i for i in range(60) if mask[j, i] and row_ids[i] != MASK} == taken


def test_ancestral_unmasks_each_position_with_its_probability():
    p, _, mask = by_confidence(7, batch=40, length=1000)
    for probability in (0.01, 0.3, 0.9):
        ids, _ = run(p, "ancestral", value=probability, seed=11)
        taken = (ids != p.token_ids).sum().item()
        expected, deviation = probability * mask.sum(), math.sqrt(mask.sum() * probability * (1 - probability))
        assert abs(taken - expected) < 4 * deviation
    for probability in (0.0, 1e-9):
        ids, counts = run(p, "ancestral", value=probability, seed=11)
        assert torch.equal(ids, p.token_ids) and not counts.any(), "a step in which chance takes none commits none"


def test_random_order_takes_every_position_alike():
    """200 steps of 5 among 50 positions: 20 each in expectation; seen 10 ... 32."""
    ids = torch.full((200, 50), MASK)
    sample = TokenSample(torch.zeros_like(ids), *(torch.zeros(200, 50) for _ in range(3)))
    unmask_(ids, sample, MASK, order="random", count=5, seed=3)
    taken = (ids == 0).sum(0)
    statistic = ((taken - 20).double() ** 2 / (20 * (1 - 5 / 50))).sum().item() * 49 / 50
    assert taken.sum() == 1000 and 25 < statistic < 85  # chi-square with 49 degrees: within (0.1 %, 99.9 %)


# ------------------------------------------------------------------------------------------------ invariance
@native
def test_ties_go_to_the_lower_position(row):
    row.skip_unless_runnable("unmask_")
    ids = torch.full((1, 40), MASK)
    sample = TokenSample(torch.ones_like(ids), *(torch.zeros(1, 40) for _ in range(3)))
    for order in ("confidence", "margin", "entropy"):
        with row.active():
            result, committed = run(Problem(ids, sample), "count", order, 7, device=row.device)
        assert committed.item() == 7 and (result[0, :7] == 1).all() and (result[0, 7:] == MASK).all()


@native
@pytest.mark.parametrize("order", ["confidence", "random"])
@every_rule
def test_a_row_is_the_same_alone_and_in_any_batch(row, rule, order):
    row.skip_unless_runnable("unmask_")
    p = problem("plain", 6, 90)
    names = torch.tensor([7, 1, 2**33, 3, 9, 4])
    with row.active():
        whole = run(p, rule, order, seed=2, sequence_ids=names.to(row.device), device=row.device)
        for picked in ([3], [5, 0, 3, 1]):
            part = Problem(p.token_ids[picked], TokenSample(*(t[picked] for t in p.sample[:4])))
            alone = run(part, rule, order, seed=2, sequence_ids=names[picked].to(row.device), device=row.device)
            assert same(alone, [t[picked] for t in whole])


@native
@every_rule
def test_results_do_not_depend_on_threads(row, rule):
    row.skip_unless_runnable("unmask_")

    def results():
        with row.active():
            return [run(problem(kind, 24, 1500), rule, "entropy", seed=4) for kind in ("plain", "rows")]

    first, *others = across_threads(results)
    assert all(same(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_seed_and_step_and_sequence_change_what_is_random():
    p = problem("plain", 3, 80)
    first = run(p, "count", "random", seed=1)
    assert same(first, run(p, "count", "random", seed=1))
    assert same(first, run(p, "count", "random", seed=torch.tensor(1), step=torch.tensor([0])))
    for other in ({"seed": 2}, {"seed": 1 + 2**40}, {"seed": 1, "step": 1}):
        assert not same(first, run(p, "count", "random", **other))
    assert not same(first, run(p, "count", "random", seed=1, sequence_ids=torch.tensor([2, 0, 1])))
    torch.manual_seed(0)
    drawn = run(p, "ancestral", value=0.5)
    again = run(p, "ancestral", value=0.5)
    torch.manual_seed(0)
    assert not same(drawn, again) and same(drawn, run(p, "ancestral", value=0.5))


# ------------------------------------------------------------------------------------------------ forms of the call
def test_one_row_and_ints_for_blocks():
    p = problem("plain", 1, 30)
    flat = p.token_ids[0].clone()
    committed = unmask_(flat, TokenSample(*(t[0] for t in p.sample[:4])), MASK, count=4, block_start=5, block_end=25)
    p.optional = {"block_start": torch.tensor([5]), "block_end": torch.tensor([25])}
    expected, count = p.expected("count", "confidence", 4)
    assert torch.equal(flat, expected[0]) and torch.equal(committed, count)


@rows
def test_views_are_written_in_place(row):
    row.skip_unless_runnable("unmask_")
    p = problem("plain", 4, 30)
    memory = torch.full((4, 50), MASK, device=row.device)
    memory[:, 10:40] = p.token_ids.to(row.device)
    sample = TokenSample(*(t.to(row.device).t().contiguous().t() for t in p.sample[:4]))  # copied by the call
    with row.active():
        unmask_(memory[:, 10:40], sample, MASK, count=3)
    assert torch.equal(memory[:, 10:40].cpu(), p.expected("count", "confidence", 3)[0])
    assert (memory[:, :10] == MASK).all() and (memory[:, 40:] == MASK).all()


@rows
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(row, shape):
    row.skip_unless_runnable("unmask_")
    ids = torch.zeros(shape, dtype=torch.int64, device=row.device)
    sample = TokenSample(ids, *(torch.zeros(shape, device=row.device) for _ in range(3)))
    with row.active():
        assert unmask_(ids, sample, MASK, count=1).tolist() == [0] * shape[0]
        none = TokenSample(ids.new_empty(0), *(torch.empty(0, device=row.device) for _ in range(3)))
        full = torch.full((2, 3), MASK, device=row.device)
        assert unmask_(full, none, MASK, count=1, rows=ids.new_empty(0)).tolist() == [0, 0]


def test_float64_scores_run_on_the_reference_alone():
    p = problem("plain", 3, 20)
    wide = Problem(p.token_ids, TokenSample(p.sample.token, *(t.double() for t in p.sample[1:4])))
    assert same(run(wide, "factor"), p.expected("factor", "confidence", NUMBERS["factor"]))
    with use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        run(wide, "factor")


def test_a_step_from_logits():
    """sample_tokens of the masked rows, then unmask_: what generation does, until nothing is masked."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(MASK, (3, 24), generator=g)
    ids[:, 6:] = torch.where(torch.rand(3, 18, generator=g) < 0.7, MASK, ids[:, 6:])
    before = ids.clone()
    for step in range(18):
        masked = (ids == MASK).flatten().nonzero()[:, 0]
        logits = torch.randn(len(masked), 50, generator=g)
        sample = sample_tokens(logits, temperature=0.0, suppress_tokens=[MASK])
        assert (unmask_(ids, sample, MASK, count=2, rows=masked, step=step) <= 2).all()
    assert (ids != MASK).all() and torch.equal(ids[before != MASK], before[before != MASK])


def test_writes_are_seen_by_autograd():
    p = problem("plain", 2, 10)
    ids, w = p.token_ids.clone(), torch.randn(50, 4, requires_grad=True)
    loss = torch.nn.functional.embedding(ids, w).sum()
    unmask_(ids, p.sample, MASK, count=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scores_that_require_grad_are_taken_as_they_are():
    p = problem("plain", 2, 10)
    grad = Problem(p.token_ids, TokenSample(p.sample.token, *(t.clone().requires_grad_() for t in p.sample[1:4])))
    assert same(run(grad, "count"), run(p, "count"))
    with use_backend("reference"):
        assert same(run(grad, "count"), run(p, "count"))
