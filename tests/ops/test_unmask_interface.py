"""unmask_ as torch sees it (opcheck, torch.compile, meta tensors, direct calls), and what it says to bad input."""

import math

import pytest
import torch
import torch._dynamo.testing

from fastdiff import BackendError, use_backend
from fastdiff.ops import TokenSample, _unmask_backends, unmask_
from ops.harness import ROWS
from ops.unmask_cases import MASK, NUMBERS, RULES, Problem, numbers, problem

rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
every_rule = pytest.mark.parametrize("rule", RULES)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ torch's machinery
def operator_arguments(p: Problem, rule: int, order: int, **given) -> tuple:
    o = {k: p.optional.get(k) for k in ("rows", "block_start", "block_end", "active", "sequence_ids")}
    return (
        p.token_ids.clone(), *p.sample[:4], o["rows"], o["block_start"], o["block_end"], o["active"], rule, order,
        given.get("values"), given.get("value", 2.0), MASK, given.get("seeds"), 3, given.get("steps"), 1,
        o["sequence_ids"],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "rows", "blocks"])
def test_opcheck(kind):
    p, tensors = problem(kind, 3, 20), {"values": torch.full((3,), 2.0), "seeds": torch.tensor(3)}
    for some in ({}, tensors):
        torch.library.opcheck(torch.ops.fastdiff.unmask_.default, operator_arguments(p, 0, 3, **some))


def test_schema_is_the_one_that_csrc_defines():
    for name, schema in _unmask_backends.SCHEMAS.items():
        parsed = torch._C.parse_schema("fastdiff::" + name + schema)
        assert str(getattr(torch.ops.fastdiff, name).default._schema) == str(parsed)


@rows
@every_rule
def test_fullgraph_compile_equals_eager_and_does_not_recompile(row, rule):
    row.skip_unless_runnable("unmask_")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(ids, sample, value, seed, at):
        committed = unmask_(ids, TokenSample(*sample), MASK, rule=rule, **numbers(rule, value), seed=seed, step=at)
        return ids + 1, committed

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    with row.active():
        for i, (batch, length) in enumerate([(4, 30), (4, 30), (3, 77)]):
            p = problem("plain", batch, length, seed=i)
            kind = torch.int64 if rule == "count" else torch.float32
            value = torch.full((batch,), NUMBERS[rule], dtype=kind, device=row.device)
            arguments = [tuple(t.to(row.device) for t in p.sample[:4]), value]
            arguments += [torch.tensor(n, device=row.device) for n in (6, i)]
            eager_ids, ids = (p.token_ids.clone().to(row.device) for _ in range(2))
            assert same(step(eager_ids, *arguments), compiled(ids, *arguments)) and torch.equal(eager_ids, ids)
            compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0, "another step, batch or length must not compile again"


def test_inductor():
    torch._dynamo.reset()
    p = problem("blocks", 4, 40)

    def step(ids):
        return unmask_(ids, p.sample, MASK, rule="factor", order="random", factor=1.25, seed=3, **p.optional)

    ids = p.token_ids.clone()
    committed = torch.compile(step, fullgraph=True)(ids)
    assert same((ids, committed), p.expected("factor", "random", 1.25, seed=3))


def test_meta_tensors_have_shapes():
    ids = torch.empty(3, 8, dtype=torch.int64, device="meta")
    fields = (ids, *(torch.empty(3, 8, device="meta") for _ in range(3)))
    arguments = (None, None, None, None, 0, 0, None, 1.0, MASK, None, 0, None, 0, None)
    result = torch.ops.fastdiff.unmask_(ids, *fields, *arguments)
    assert result.shape == (3,) and result.dtype == torch.int64


# ------------------------------------------------------------------------------------------------ bad input
IDS = torch.full((2, 6), MASK)
SAMPLE = TokenSample(torch.zeros(2, 6, dtype=torch.int64), *(torch.zeros(2, 6) for _ in range(3)))
FLAT = TokenSample(*(t.flatten()[:4] for t in SAMPLE[:4]))
GOOD = {"count": 1, "mask_token_id": MASK}


def bad(ids=IDS, sample=SAMPLE, **keywords):
    return lambda: unmask_(ids, sample, **(GOOD | keywords))


def bad_number(rule, **number):
    return bad(rule=rule, count=None, **number)


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


BAD = {
    "ids-list": (TypeError, "token_ids: got a list", bad([1, 2])),
    "ids-float": (TypeError, "token_ids: got torch.float32", bad(IDS.float())),
    "ids-int32": (TypeError, "token_ids: got torch.int32", bad(IDS.int())),
    "ids-3d": (ValueError, r"token_ids: got shape \[1, 2, 6\]; expected \[B, L\]", bad(IDS[None])),
    "ids-sparse": (TypeError, "expected dense int64", bad(IDS.to_sparse())),
    "ids-transposed": (ValueError, "contiguous last dimension", bad(torch.full((6, 2), MASK).t())),
    "ids-expanded": (ValueError, "do not overlap", bad(IDS[:1].expand(2, 6))),
    "rule": (ValueError, "rule: got 'best'; expected one of count", bad(rule="best")),
    "order": (ValueError, "order: got 'entropi'; expected one of confidence", bad(order="entropi")),
    "no-number": (ValueError, "threshold: got None; rule 'threshold' needs it", bad_number("threshold")),
    "wrong-number": (ValueError, "count: got one with rule 'factor'", bad(rule="factor", factor=1.0)),
    "two-numbers": (ValueError, "factor: got one with rule 'count'", bad(factor=1.0)),
    "count-0": (ValueError, "count: got 0; expected an int >= 1", bad(count=0)),
    "count-float": (ValueError, "count: got 2.0; expected an int", bad(count=2.0)),
    "count-bool": (ValueError, "count: got True", bad(count=True)),
    "count-floats": (TypeError, "count: got torch.float32; expected a tensor of integers", bad(count=torch.ones(2))),
    "count-shape": (ValueError, r"count: got shape \[3\]; expected \[2\]", bad(count=torch.ones(3, dtype=torch.int64))),
    "threshold-0": (
        ValueError,
        r"threshold: got 0; expected in \(0, 1\]",
        bad_number("threshold", threshold=0),
    ),
    "threshold-2": (ValueError, "threshold: got 1.5", bad_number("threshold", threshold=1.5)),
    "threshold-nan": (ValueError, "threshold: got nan", bad_number("threshold", threshold=math.nan)),
    "factor": (ValueError, "factor: got 0; expected > 0", bad_number("factor", factor=0)),
    "budget": (ValueError, "entropy_budget: got -0.1", bad_number("entropy_budget", entropy_budget=-0.1)),
    "probability": (ValueError, "probability: got 1.1", bad_number("ancestral", probability=1.1)),
    "probability-low": (ValueError, "probability: got -1", bad_number("ancestral", probability=-1)),
    "probability-str": (ValueError, "probability: got 'a'", bad_number("ancestral", probability="a")),
    "number-bool": (TypeError, "torch.bool", bad_number("factor", factor=torch.ones(2, dtype=torch.bool))),
    "mask-negative": (ValueError, "mask_token_id: got -1; expected an int >= 0", bad(mask_token_id=-1)),
    "mask-float": (ValueError, "mask_token_id: got 4.0", bad(mask_token_id=4.0)),
    "sample": (TypeError, "sample: got a Tensor; expected a TokenSample", bad(sample=IDS)),
    "sample-shape": (ValueError, r"sample.token: got shape \[4\]; expected \[2, 6\]", bad(sample=FLAT)),
    "sample-dtype": (TypeError, "sample.token: got torch.int32", bad(sample=SAMPLE._replace(token=SAMPLE.token.int()))),
    "sample-half": (
        TypeError,
        "sample.log_prob: got torch.float16",
        bad(sample=SAMPLE._replace(log_prob=SAMPLE.log_prob.half())),
    ),
    "sample-mixed": (
        TypeError,
        "sample.margin: got torch.float64",
        bad(sample=SAMPLE._replace(margin=SAMPLE.margin.double())),
    ),
    "sample-none": (TypeError, "sample.entropy: got a NoneType", bad(sample=SAMPLE._replace(entropy=None))),
    "sample-device": (
        ValueError,
        "sample.token: got one on meta",
        bad(sample=SAMPLE._replace(token=SAMPLE.token.to("meta"))),
    ),
    "rows-shape": (
        ValueError,
        r"rows: got shape \[2, 2\]",
        bad(sample=FLAT, rows=torch.zeros(2, 2, dtype=torch.int64)),
    ),
    "rows-dtype": (TypeError, "rows: got torch.int32", bad(sample=FLAT, rows=torch.zeros(4, dtype=torch.int32))),
    "rows-list": (TypeError, "rows: got a list", bad(sample=FLAT, rows=[0, 1, 2, 3])),
    "rows-length": (
        ValueError,
        r"sample.token: got shape \[4\]; expected \[3\]",
        bad(sample=FLAT, rows=torch.arange(3)),
    ),
    "rows-high": (ValueError, "rows: got 12; expected positions", bad(sample=FLAT, rows=torch.arange(9, 13))),
    "rows-low": (ValueError, "rows: got -2", bad(sample=FLAT, rows=torch.arange(-2, 2))),
    "block-negative": (ValueError, "block_start: got -1", bad(block_start=-1)),
    "block-dtype": (TypeError, "block_end: got torch.int32", bad(block_end=torch.ones(2, dtype=torch.int32))),
    "block-shape": (ValueError, r"block_end: got shape \[1\]; expected \[2\]", bad(block_end=torch.tensor([3]))),
    "active": (TypeError, "active: got torch.int64; expected torch.bool", bad(active=torch.ones(2, dtype=torch.int64))),
    "sequences": (ValueError, r"sequence_ids: got shape \[3\]", bad(sequence_ids=torch.arange(3))),
    "seed-float": (TypeError, "seed: got 0.5; expected an int or", bad(seed=0.5)),
    "seed-large": (ValueError, "seed: got 9223372036854775808", bad(seed=2**63)),
    "seed-shape": (ValueError, r"seed: got shape \[2\]; expected one number", bad(seed=torch.arange(2))),
    "step-dtype": (ValueError, "step: got torch.float32", bad(step=torch.tensor(1.0))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and (IDS == MASK).all()


def test_direct_calls_of_the_operator_do_not_touch_what_is_out_of_bounds():
    op, p = torch.ops.fastdiff.unmask_, problem("rows", 3, 20)
    arguments = operator_arguments(p, 0, 0)
    for index, wrong, message in (
        (0, torch.zeros(3, 20), "token_ids does not fit"),
        (0, torch.zeros(1, 20, dtype=torch.int64).expand(3, 20), "do not overlap"),
        (1, torch.zeros(3, dtype=torch.int64), "token does not fit"),
        (2, p.sample.log_prob.double(), "log_prob does not fit"),
        (6, torch.zeros(2, dtype=torch.int64), "block_start does not fit"),
        (8, torch.zeros(2, dtype=torch.bool), "active does not fit"),
        (9, 5, "rule or order is unknown"),
        (11, torch.zeros(2), "values does not fit"),
        (14, torch.zeros(2, dtype=torch.int64), "seeds does not fit"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments[:index], wrong, *arguments[index + 1 :])
    rows = p.optional["rows"].clone()
    rows[rows < 0] = torch.tensor([60, -9, 2**62]).repeat(20)[: int((rows < 0).sum())]
    committed = op(*arguments[:5], rows, *arguments[6:])
    assert same((arguments[0], committed), p.expected("count", "confidence", 2))


def test_a_backend_asked_for_by_name_that_cannot_run_raises():
    with use_backend("cuda"), pytest.raises(BackendError, match="backend 'cuda' was asked for and cannot run"):
        unmask_(IDS.clone(), SAMPLE, MASK, count=1)


def test_a_step_that_is_an_int_may_change_under_compile():
    compiled = torch.compile(
        lambda ids, step: unmask_(ids, SAMPLE, MASK, rule="count", count=1, order="random", seed=1, step=step),
        fullgraph=True,
        backend="aot_eager",
    )
    for step in range(3):
        ids, expected = torch.full((2, 6), MASK), torch.full((2, 6), MASK)
        compiled(ids, step)
        unmask_(expected, SAMPLE, MASK, rule="count", count=1, order="random", seed=1, step=step)
        assert torch.equal(ids, expected)
