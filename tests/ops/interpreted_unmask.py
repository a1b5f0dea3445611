"""The Triton launch function of unmask_ against the reference, and Philox bit for bit, in Triton's interpreter.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_unmask.py
"""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.common import philox, triton_math
from fastdiff.kernels.unmask import reference
from fastdiff.kernels.unmask import triton_kernels as kernels
from ops import unmask_cases
from ops.triton_interpreter import programs, shuffled

MASK, SEED, STEP = 9, 2**63 - 12345, 2**32 + 3
RULES = {"count": 3.0, "threshold": 0.4, "factor": 1.2, "entropy_budget": 1.0, "ancestral": 0.3}
ORDERS = ("confidence", "margin", "entropy", "random")


class Case(NamedTuple):
    token_ids: Tensor
    token: Tensor
    log_prob: Tensor
    entropy: Tensor
    margin: Tensor


def make(batch: int, length: int, seed: int = 0, coarse: bool = True) -> Case:
    """Masks and samples, some of them the mask token or none; coarse scores, so that many tie."""
    generator = torch.Generator().manual_seed(seed)

    def rand() -> Tensor:
        t = torch.rand(batch, length, generator=generator)
        return (t * 20).round() / 20 if coarse else t

    token_ids = torch.randint(0, 9, (batch, length), generator=generator)
    token_ids[rand() < 0.6] = MASK
    token = torch.randint(-1, 11, (batch, length), generator=generator)
    return Case(token_ids, token, rand().log(), rand(), rand())


def run(case: Case, rule: str, order: str, value=None, rows=None, start=None, end=None, active=None, sequence_ids=None):
    """(token_ids, committed) of the launch function; a value that is a tensor has one number per row."""
    token_ids = case.token_ids.clone()
    value = RULES[rule] if value is None else value
    number = (value, 0.0) if isinstance(value, Tensor) else (None, value)
    committed = kernels.unmask_(
        token_ids, *case[1:], rows, start, end, active, list(RULES).index(rule), ORDERS.index(order), *number, MASK,
        None, SEED, None, STEP, sequence_ids,
    )  # fmt: skip
    return token_ids, committed


def exact(case: Case, rule: str, order: str, value=None, start=None, end=None, active=None, sequence_ids=None):
    batch, length = case.token_ids.shape
    value = RULES[rule] if value is None else value
    value = value.double() if isinstance(value, Tensor) else torch.full((batch,), value, dtype=torch.float64)
    start = torch.zeros(batch, dtype=torch.int64) if start is None else start
    end = torch.full((batch,), length) if end is None else end
    active = torch.ones(batch, dtype=torch.bool) if active is None else active
    sequence_ids = torch.arange(batch) if sequence_ids is None else sequence_ids
    return reference.unmask(
        *case, start, end, active, rule, order, value, MASK, torch.tensor(SEED), torch.tensor(STEP), sequence_ids
    )


def check(case: Case, *args, **kwargs) -> tuple[Tensor, Tensor]:
    found, truth = run(case, *args, **kwargs), exact(case, *args, **kwargs)
    assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])
    assert found[1].dtype == torch.int64
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_every_order(rule, order):
    """Rows with other numbers of masks, other blocks, one finished, one without masks; more than one chunk of each."""
    case = make(5, 200)
    case.token_ids[4] = 0
    start, end = torch.tensor([0, 120, 37, 0, 0]), torch.tensor([200, 150, 190, 200, 200])
    active = torch.tensor([True, True, True, False, True])
    where = {"start": start, "end": end, "active": active, "sequence_ids": torch.tensor([5, -1, 2**40, 3, 4])}
    token_ids, committed = check(case, rule, order, **where)
    assert (committed[:3] >= 1).all() and (committed[3:] == 0).all()
    assert not ((token_ids == MASK) & (case.token_ids != MASK)).any()
    values = torch.tensor([0.0, 0.1, 0.3, 0.5, torch.nan]) * (5 if rule == "count" else 1)
    check(make(5, 60, seed=1, coarse=False), rule, order, value=values)


@pytest.mark.parametrize("rule", RULES)
def test_scores_that_are_not_numbers_rank_last(rule):
    case = make(2, 40)
    for scores in case[2:]:
        scores[:, ::3] = float("nan")
    for scores in case[2:]:
        scores[0, 1::5], scores[0, 2::11] = float("-inf"), float("inf")
        scores[1, 1::3] = torch.tensor([-0.0, 0.0]).repeat(7)[:13]
    case.entropy[1, 5::6] = -0.3
    for order in ORDERS:
        check(case, rule, order)
        check(case, rule, order, value=torch.tensor([0.0, 3.0]))
    nothing = Case(*case[:2], *(torch.full_like(t, float("nan")) for t in case[2:]))
    token_ids, committed = run(nothing, "threshold", "confidence")
    first = ((case.token_ids == MASK) & (case.token >= 0) & (case.token != MASK)).int().argmax(-1)
    assert committed.tolist() == [1, 1] and all(token_ids[b, i] == case.token[b, i] for b, i in enumerate(first))


@pytest.mark.parametrize("kind", unmask_cases.KINDS)
def test_problems_of_every_backend(kind):
    problem = unmask_cases.problem(kind, 3, 140)
    names = ("rows", "block_start", "block_end", "active")
    optional = [problem.optional.get(name) for name in names]
    for rule, order in zip(unmask_cases.RULES, (*unmask_cases.ORDERS, "entropy"), strict=True):
        value, token_ids = unmask_cases.NUMBERS[rule], problem.token_ids.clone()
        committed = kernels.unmask_(
            token_ids, *problem.sample[:4], *optional, unmask_cases.RULES.index(rule), unmask_cases.ORDERS.index(order),
            None, value, unmask_cases.MASK, None, 0, None, 0, problem.optional.get("sequence_ids"),
        )  # fmt: skip
        truth = problem.expected(rule, order, value)
        assert torch.equal(token_ids, truth[0]) and torch.equal(committed, truth[1]), (rule, order)


@pytest.mark.parametrize("rule", RULES)
def test_samples_of_some_positions(rule):
    """rows names the positions that have a sample; what lies outside is none, and the order is free."""
    case = make(3, 150)
    rows = torch.randperm(450, generator=torch.Generator().manual_seed(3))[:300]
    compact = Case(case.token_ids, *(t.flatten()[rows] for t in case[1:]))
    named = torch.arange(300) % 7 > 0
    there = torch.zeros(450, dtype=torch.bool).index_fill(0, rows[named], True).view(3, 150)
    rows = torch.where(named, rows, torch.tensor([-1, 450, -(2**40)])[torch.arange(300) % 3])
    truth = exact(case._replace(token=torch.where(there, case.token, -1)), rule, "entropy")
    found = run(compact, rule, "entropy", rows=rows)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("rule", ["count", "ancestral"])
def test_seeds_in_device_memory_and_strided_token_ids(rule):
    case, numbers = make(3, 50), torch.tensor([SEED, STEP])
    wide = torch.full((3, 80), 77)
    wide[:, 10:60] = case.token_ids
    committed = kernels.unmask_(
        wide[:, 10:60], *case[1:], None, None, None, None, list(RULES).index(rule), 3, None, RULES[rule], MASK,
        numbers[0], 0, numbers[1], 0, None,
    )  # fmt: skip
    truth = exact(case, rule, "random")
    assert torch.equal(wide[:, 10:60], truth[0]) and torch.equal(committed, truth[1])
    assert (wide[:, :10] == 77).all() and (wide[:, 60:] == 77).all()


def test_a_row_alone_is_the_row_in_a_batch():
    case = make(4, 90)
    together = run(case, "factor", "random")
    alone = run(Case(*(t[2:3] for t in case)), "factor", "random", sequence_ids=torch.tensor([2]))
    assert torch.equal(alone[0][0], together[0][2]) and alone[1][0] == together[1][2]


@pytest.mark.parametrize("rule", RULES)
def test_results_do_not_depend_on_the_order_of_programs(rule):
    case = make(2, 300)
    first = run(case, rule, "margin")
    with programs(shuffled(seed=1)):
        other = run(case, rule, "margin")
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("order", ["confidence", "entropy"])
def test_more_chunks_than_one_load_and_a_long_row(order):
    case = make(1, 1300, coarse=False)
    check(case, "entropy_budget", order, value=20.0, start=torch.tensor([1000]), end=torch.tensor([1290]))
    check(case, "count", order, value=500.0, end=torch.tensor([700]))


def test_every_step_fills_a_block_in_the_end():
    case = make(2, 40)
    case.token[:] = torch.randint(0, 9, (2, 40), generator=torch.Generator().manual_seed(5))
    token_ids = case.token_ids.clone()
    masks = (token_ids == MASK).sum(-1)
    for _ in range(3):
        before = (token_ids == MASK).sum(-1)
        committed = kernels.unmask_(
            token_ids, *case[1:], None, None, None, None, 0, 0, None, 8.0, MASK, None, 0, None, 0, None
        )
        assert torch.equal(before - committed, (token_ids == MASK).sum(-1))
    assert torch.equal((token_ids == MASK).sum(-1), (masks - 24).clamp_min(0))


def test_no_positions():
    for shape in ((0, 5), (2, 0)):
        assert run(make(*shape), "count", "margin")[1].tolist() == [0] * shape[0]
    case = make(2, 20)
    none = Case(case.token_ids, *(t.flatten()[:0] for t in case[1:]))
    token_ids, committed = run(none, "factor", "margin", rows=torch.empty(0, dtype=torch.int64))
    assert torch.equal(token_ids, case.token_ids) and committed.tolist() == [0, 0]


def test_too_many_positions_is_an_error():
    ids = torch.empty(2, 2**30, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="token_ids: 2 x 1073741824 positions"):
        kernels.unmask_(ids, *[ids] * 4, *[None] * 4, 0, 0, None, 1.0, 9, None, 0, None, 0, None)


@triton.jit
def philox_kernel(seed_ptr, sequence_ptr, position_ptr, out_ptr, uniform_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    w0, w1 = triton_math.philox(
        tl.load(seed_ptr), tl.load(sequence_ptr + i), tl.load(position_ptr + i), tl.load(seed_ptr + 1), 2
    )
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + N + i, w1.to(tl.int64))
    tl.store(uniform_ptr + i, triton_math.uniform53(w0, w1))


def test_philox_is_the_references_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    numbers, sequence, position = (torch.randint(-(2**62), 2**62, (n,), generator=generator) for n in (2, 64, 64))
    out, uniform = torch.empty(2, 64, dtype=torch.int64), torch.empty(64, dtype=torch.float64)
    philox_kernel[(1,)](
        seed_ptr=numbers, sequence_ptr=sequence, position_ptr=position, out_ptr=out, uniform_ptr=uniform, N=64
    )
    words = philox.philox(numbers[0], sequence, position, numbers[1], 2)
    assert torch.equal(out, torch.stack(words)) and torch.equal(uniform, philox.uniform53(words))
