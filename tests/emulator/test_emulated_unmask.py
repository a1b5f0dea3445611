"""The CUDA kernel of unmask_, executed on the CPU, against the reference.

Every case runs under three schedules of threads and blocks, which must agree; results are integers, so equality is
exact. The last step of a bisection compares fp64 numbers; problems are drawn so that none is within rounding of equal
unless it is exactly equal.
"""

import pytest
import torch
from emulated_unmask import ORDERS, RULES, unmask
from torch import Tensor

from emulator import SCHEDULES, Emulator
from ops.unmask_cases import KINDS, MASK, NUMBERS, Problem, problem


def check(emulator: Emulator, p: Problem, rule: str, order: str, value: float | Tensor, seed: int = 5, step: int = 2):
    expected, count = p.expected(rule, order, value, seed, step)
    for schedule in SCHEDULES:
        emulator.configure(schedule)
        ids = p.token_ids.clone()
        committed = unmask(emulator, ids, p.sample[:4], MASK, rule, order, value, seed=seed, step=step, **p.optional)
        assert torch.equal(ids, expected), f"schedule {schedule}"
        assert torch.equal(committed, count), f"schedule {schedule}"
    return count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_order(emulator, rule, order, kind):
    check(emulator, problem(kind, 5, 67), rule, order, NUMBERS[rule])


@pytest.mark.parametrize("length", [1, 31, 256, 257, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_lengths(emulator, rule, length):
    check(emulator, problem("plain", 2, length, seed=length), rule, "confidence", NUMBERS[rule])


@pytest.mark.parametrize("kind", ["plain", "rows", "ties"])
@pytest.mark.parametrize("rule", ["count", "entropy_budget"])
def test_rows_too_long_for_shared_memory(emulator, rule, kind):
    """Places in the workspace, beyond 4096 positions; the block covers the row's end."""
    p = problem(kind, 2, 4100)
    p.optional["block_start"] = torch.tensor([3900, 4000])
    check(emulator, p, rule, "entropy", NUMBERS[rule])


@pytest.mark.parametrize("rule", RULES)
def test_numbers_seeds_and_steps_in_device_memory(emulator, rule):
    values = {
        "count": [1.0, 5.0, 1000.0], "threshold": [1.0, 0.5, 0.2], "factor": [0.01, 1.5, 30.0],
        "entropy_budget": [0.0, 2.0, torch.inf], "ancestral": [0.0, 0.5, 1.0],
    }[rule]  # fmt: skip
    p, values = problem("plain", 3, 40, seed=9), torch.tensor(values)
    expected, count = p.expected(rule, "random", values, seed=2**40 + 3, step=7)
    ids = p.token_ids.clone()
    committed = unmask(
        emulator,
        ids,
        p.sample[:4],
        MASK,
        rule,
        "random",
        values,
        seed=torch.tensor([2**40 + 3]),
        step=torch.tensor([7]),
    )
    assert torch.equal(ids, expected) and torch.equal(committed, count)
    assert count[0] < count[2]  # the numbers are each row's own


@pytest.mark.parametrize("value", [torch.nan, 0.0, -1.0])
@pytest.mark.parametrize("rule", RULES)
def test_numbers_that_hold_for_nothing_or_all(emulator, rule, value):
    check(emulator, problem("odd values", 4, 50, seed=3), rule, "confidence", torch.full((4,), value))


def test_rows_out_of_range_are_skipped(emulator):
    p = problem("rows", 3, 20)
    rows = p.optional["rows"].clone()
    wrong = rows.clone()
    wrong[rows == -1] = torch.tensor([60, -5, 2**40]).repeat(9)[: int((rows == -1).sum())]
    assert (wrong != rows).any()
    expected, count = p.expected("count", "confidence", 3)
    ids = p.token_ids.clone()
    committed = unmask(emulator, ids, p.sample[:4], MASK, "count", "confidence", 3, rows=wrong)
    assert torch.equal(ids, expected) and torch.equal(committed, count)


def test_strided_rows_and_what_lies_between_them(emulator):
    p = problem("plain", 4, 33)
    memory = torch.full((4, 50), MASK)
    memory[:, :33] = p.token_ids
    expected, count = p.expected("count", "margin", 4)
    committed = unmask(emulator, memory[:, :33], p.sample[:4], MASK, "count", "margin", 4)
    assert torch.equal(memory[:, :33], expected) and torch.equal(committed, count) and (memory[:, 33:] == MASK).all()


def test_more_rows_than_the_grid_has_blocks(emulator):
    p = problem("rows", 7, 40)
    expected, count = p.expected("factor", "confidence", 1.25)
    for schedule in SCHEDULES:
        emulator.configure(schedule, max_grid=2)
        ids = p.token_ids.clone()
        committed = unmask(emulator, ids, p.sample[:4], MASK, "factor", "confidence", 1.25, **p.optional)
        assert torch.equal(ids, expected) and torch.equal(committed, count)


def test_no_rows_no_positions_no_entries(emulator):
    empty = [torch.empty(0, dtype=torch.int64), *(torch.empty(0) for _ in range(3))]
    assert unmask(emulator, torch.empty(0, 8, dtype=torch.int64), empty, MASK, "count", "confidence", 1).shape == (0,)
    assert unmask(emulator, torch.empty(3, 0, dtype=torch.int64), empty, MASK, "count", "confidence", 1).tolist() == [
        0, 0, 0,
    ]  # fmt: skip
    ids = torch.full((2, 4), MASK)
    one = [torch.zeros(1, dtype=torch.int64), *(torch.zeros(1) for _ in range(3))]
    assert unmask(emulator, ids, one, MASK, "count", "confidence", 1, rows=torch.tensor([-1])).tolist() == [0, 0]
    assert (ids == MASK).all()


def test_refused_parameters(emulator, monkeypatch):
    p = problem("plain", 2, 8)
    monkeypatch.setattr("emulated_unmask.RULES", (*RULES, "sixth"))
    with pytest.raises(ValueError, match="cudaError 1"):
        unmask(emulator, p.token_ids, p.sample[:4], MASK, "sixth", "confidence", 1)
    with pytest.raises(ValueError, match="cudaError 1"):
        unmask(emulator, p.token_ids[:1].expand(2, 8), p.sample[:4], MASK, "count", "confidence", 1)
