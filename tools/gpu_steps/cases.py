"""One operator, one input, and how far from fp64 its results may lie: what the correctness and sanitizer steps run.

Shapes are those of real models on a GPU, and small ones elsewhere. Each operator of the registry should have a case;
the correctness step names those that have none.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import ops
from fastdiff.kernels.eos_log_prob import reference as eos_reference
from fastdiff.ops.scale_shift import scale_shift
from gpu_steps.bench import Bench

BF16, F32 = torch.bfloat16, torch.float32
Inputs = dict[str, Any]
Results = tuple[Tensor, ...]
# |result - exact| / |exact| in norms; gradients are allowed twice as much
NORMS = {F32: 2e-6, BF16: 6e-3}


@dataclass(frozen=True)
class Case:
    """`judge(results, exact)` is the largest error as a share of what is allowed: 1 is the limit."""

    operator: str  # its name in fastdiff.backends
    name: str
    make: Callable[[], Inputs]
    run: Callable[[Inputs], Results]
    exact: Callable[[Inputs], Results]  # in fp64, on reference operators
    judge: Callable[[Results, Results], float]
    capturable: bool = True


def relative(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in norms; infinite where something is not a number."""
    difference = (result.double() - exact).norm()
    return float(difference / exact.norm().clamp_min(1e-30)) if bool(torch.isfinite(difference)) else float("inf")


def norms(values: int, tolerance: float) -> Callable[[Results, Results], float]:
    """A judge: the first `values` results by `tolerance`, what follows are gradients."""

    def judge(results: Results, exact: Results) -> float:
        errors = [relative(r, e) for r, e in zip(results, exact, strict=True)]
        return max(error / (tolerance if i < values else 2 * tolerance) for i, error in enumerate(errors))

    return judge


def samples(mismatches: int, allowed: float) -> Callable[[Results, Results], float]:
    """A judge of a token, whose draws may fall on the other side of a boundary so often, and of its statistics."""

    def judge(results: Results, exact: Results) -> float:
        differ = results[0] != exact[0]
        worst = float(differ.sum()) / (mismatches + 0.5)
        for index, (result, truth) in enumerate(zip(results[1:], exact[1:], strict=True)):
            error = (result.double() - truth).abs() / (allowed * (truth.abs() + 1))
            error = error[~differ] if index == 0 else error  # log_prob is that of the token
            worst = max(worst, float(error.nan_to_num(nan=torch.inf).max()))
        return worst

    return judge


def equal(results: Results, exact: Results) -> float:
    """A judge of whole numbers."""
    return float(sum(int((r != e).sum()) for r, e in zip(results, exact, strict=True)))


def with_gradients(function: Callable[..., Any], inputs: Inputs) -> Results:
    """The function's results and their gradients to every floating tensor, under the inputs' own `cotangents`."""
    arguments = {k: v for k, v in inputs.items() if k != "cotangents"}
    leaves = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    results = function(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    if not leaves:
        return results
    differentiable = [r for r in results if r.requires_grad]
    cotangents = [c.to(r.dtype) for c, r in zip(inputs["cotangents"], differentiable, strict=True)]
    return (*(r.detach() for r in results), *torch.autograd.grad(differentiable, leaves, cotangents))


def doubled(inputs: Inputs) -> Inputs:
    """The same numbers in fp64."""
    wide = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().double().requires_grad_(value.requires_grad)
        wide[name] = value
    return wide


def _value_case(operator, name, function, make, values, tolerance, capturable=True) -> Case:
    """A differentiable operator against itself in fp64 on the reference backend."""

    def exact(inputs: Inputs) -> Results:
        return with_gradients(function, doubled(inputs))

    return Case(
        operator, name, make, lambda i: with_gradients(function, i), exact, norms(values, tolerance), capturable
    )


def _leaves(*names: str) -> Callable[[Inputs], Inputs]:
    def mark(inputs: Inputs) -> Inputs:
        for name in names:
            inputs[name].requires_grad_(True)
        return inputs

    return mark


def adaln_cases(bench: Bench) -> Iterator[Case]:
    real = {
        "XL/2": (4, 256, 1152, BF16, 1),
        "Flux": (1, 4608, 3072, BF16, 1),
        "Wan, per token": (1, 4096, 5120, BF16, 0),
        "odd, fp32": (2, 77, 1001, F32, 1),
    }
    small = {"XL/2": (2, 5, 64, BF16, 1), "per token": (1, 6, 96, BF16, 0), "odd, fp32": (2, 3, 77, F32, 1)}
    for name, (batch, tokens, dim, dtype, per_sample) in (small if bench.small else real).items():
        rows = (batch, dim) if per_sample else (batch, tokens, dim)

        def plain(batch=batch, tokens=tokens, dim=dim, dtype=dtype, rows=rows) -> Inputs:
            x = bench.randn(batch, tokens, dim, dtype=dtype)
            modulation = {k: bench.randn(*rows, dtype=F32) for k in ("shift", "scale")}
            cotangents = [bench.randn(batch, tokens, dim, dtype=dtype)]
            return _leaves("x", "shift", "scale")({"x": x, **modulation, "cotangents": cotangents})

        def gated(batch=batch, tokens=tokens, dim=dim, dtype=dtype, rows=rows) -> Inputs:
            stream = {k: bench.randn(batch, tokens, dim, dtype=dtype) for k in ("residual", "branch")}
            modulation = {k: bench.randn(*rows, dtype=F32) for k in ("gate", "shift", "scale")}
            cotangents = [bench.randn(batch, tokens, dim, dtype=dtype) for _ in range(2)]
            return _leaves(*stream, *modulation)({**stream, **modulation, "cotangents": cotangents})

        yield _value_case("adaln", name, ops.adaln, plain, 1, NORMS[dtype])
        yield _value_case("gated_residual_adaln", name, ops.gated_residual_adaln, gated, 2, NORMS[dtype])
    batch, tokens, dim = (2, 5, 64) if bench.small else (4, 256, 1152)

    def modulated() -> Inputs:
        rows = {k: bench.randn(batch, dim) for k in ("scale", "shift")}
        inputs = {"x": bench.randn(batch, tokens, dim), **rows, "cotangents": [bench.randn(batch, tokens, dim)]}
        return _leaves("x", "scale", "shift")(inputs)

    yield _value_case("scale_shift", "XL/2", scale_shift, modulated, 1, NORMS[BF16])


def qgfd_cases(bench: Bench) -> Iterator[Case]:
    real = {
        "B1 H4 L4096 d64, with gradients": ((1, 4, 4096, 64), BF16, {}, True),
        "B1 H4 L1024 d128, with gradients": ((1, 4, 1024, 128), BF16, {}, True),
        "B2 H8 L1024 d64, 4 steps, causal, key_mask": ((2, 8, 1024, 64), BF16, {"steps": 4, "is_causal": True}, False),
        "B2 H3 L77 d80, fp32, with gradients": ((2, 3, 77, 80), F32, {}, True),
    }
    small = {
        "L70 d16, with gradients": ((1, 2, 70, 16), BF16, {}, True),
        "L40 d16, 4 steps, causal, key_mask": ((2, 2, 40, 16), F32, {"steps": 4, "is_causal": True}, False),
    }
    for name, (shape, dtype, settings, gradients) in (small if bench.small else real).items():

        def make(shape=shape, dtype=dtype, settings=settings, gradients=gradients) -> Inputs:
            inputs = {k: bench.randn(*shape, dtype=dtype) for k in ("query", "key", "value")}
            if gradients:
                return _leaves(*inputs)({**inputs, "cotangents": [bench.randn(*shape, dtype=dtype)]})
            mask = torch.ones(shape[0], shape[2], dtype=torch.bool, device=bench.device)
            mask[0, shape[2] // 2 :] = False
            return {**inputs, "key_mask": mask, **settings}

        # a hop's values are rounded to the stream's dtype: more than one rounding
        yield _value_case("qgfd_attention", name, ops.qgfd_attention, make, 1, 2 * NORMS[dtype])


def sampling_cases(bench: Bench) -> Iterator[Case]:
    rows, llada, gpt2 = (6, 2100, 1501) if bench.small else (256, 126_464, 50_257)
    settings = {
        "T 0": (llada, 3.0, {}),
        "T 1": (llada, 3.0, {"temperature": 1.0}),
        "T 1, V odd": (gpt2, 3.0, {"temperature": 1.0}),
        "top-p 0.9, flat": (llada, 1.0, {"temperature": 1.0, "top_p": 0.9}),
        "top-p 0.9, peaked": (llada, 8.0, {"temperature": 1.0, "top_p": 0.9}),
        "top-k 40 and top-p 0.8, V odd": (gpt2, 3.0, {"temperature": 0.7, "top_k": 40, "top_p": 0.8}),
    }
    for name, (vocab, scale, filters) in settings.items():

        def make(vocab=vocab, scale=scale) -> Inputs:
            return {"logits": bench.randn(rows, vocab, scale=scale)}

        def run(inputs: Inputs, filters=filters, vocab=vocab) -> Results:
            options = {"suppress_tokens": (3,), "end_token_ids": (0, vocab - 1), "seed": 7, "invalid": "flag"}
            return tuple(ops.sample_tokens(inputs["logits"], **options, **filters))

        def exact(inputs: Inputs, run=run) -> Results:
            return run({"logits": inputs["logits"].double()})

        # of given logits 5 draws in 10 000 may differ, and two of 256 with top-p hardly ever do
        judge = samples(2 if filters else 0, 1e-5)
        yield Case("sample_tokens", f"{rows} × {vocab}, {name}", make, run, exact, judge)

    def unsampled() -> Inputs:
        return {"logits": bench.randn(rows, llada, scale=3.0)}

    def ends(inputs: Inputs) -> Results:
        return (ops.eos_log_prob_from_logits(inputs["logits"], (0, llada - 1), suppress_tokens=(3,)),)

    yield Case(
        "eos_log_prob_from_logits", f"{rows} × {llada}", unsampled, ends, lambda i: ends(doubled(i)), norms(1, 1e-5)
    )


def head_cases(bench: Bench) -> Iterator[Case]:
    rows, dim, vocab = (6, 32, 2100) if bench.small else (64, 4096, 126_464)
    for dtype, mismatches, allowed in ((F32, 1, 2e-4), (BF16, 3, 5e-2)):  # logits are rounded to the head's dtype

        def make(dtype=dtype) -> Inputs:
            return {
                "hidden": bench.randn(rows, dim, dtype=dtype),
                "weight": bench.randn(vocab, dim, dtype=dtype, scale=3 * dim**-0.5),
            }

        options = {"temperature": 1.0, "seed": 7, "invalid": "flag", "suppress_tokens": (3,), "end_token_ids": (0, 5)}

        def draws(inputs: Inputs) -> Results:
            return tuple(ops.lm_head_sample(inputs["hidden"], inputs["weight"], **options))  # noqa: B023

        def exact_draws(inputs: Inputs) -> Results:
            logits = functional.linear(inputs["hidden"], inputs["weight"]).double()
            return tuple(ops.sample_tokens(logits, **options))  # noqa: B023

        def ends(inputs: Inputs) -> Results:
            return (ops.eos_log_prob(inputs["hidden"], inputs["weight"], (0, 5), suppress_tokens=(3,)),)

        def exact_ends(inputs: Inputs) -> Results:
            logits = functional.linear(inputs["hidden"], inputs["weight"])
            excluded = torch.tensor([0, 5, 3], device=bench.device)  # the end tokens, and what is suppressed
            return (eos_reference.eos_log_prob_from_logits(logits.double(), excluded[:2], excluded),)

        name = f"{rows} × {dim} × {vocab}, {str(dtype).removeprefix('torch.')}"
        yield Case("lm_head_sample", name, make, draws, exact_draws, samples(mismatches, allowed))
        yield Case("eos_log_prob", name, make, ends, exact_ends, norms(1, allowed))


def loss_cases(bench: Bench) -> Iterator[Case]:
    rows, dim, vocab = (20, 32, 700) if bench.small else (512, 4096, 126_464)
    for dtype, tolerance in ((F32, 1e-4), (BF16, 1.5e-2)):

        def make(dtype=dtype) -> Inputs:
            inputs = {
                "hidden": bench.randn(rows, dim, dtype=dtype),
                "weight": bench.randn(vocab, dim, dtype=dtype, scale=dim**-0.5),
                "targets": bench.ids(vocab - 1, rows),
                "mask": torch.rand(rows, device=bench.device) < 0.5,
                "cotangents": [torch.ones((), device=bench.device)],
            }
            return _leaves("hidden", "weight")(inputs)

        def loss(**inputs: Any) -> Results:
            return ops.masked_linear_cross_entropy(**inputs, suppress_tokens=(vocab - 1,))

        name = f"{rows} × {dim} × {vocab}, {str(dtype).removeprefix('torch.')}"
        # the number of masked rows is read on the host: no graph can hold that
        yield _value_case("masked_linear_cross_entropy", name, loss, make, 2, tolerance, capturable=False)


def unmask_cases(bench: Bench) -> Iterator[Case]:
    batch, length = (3, 50) if bench.small else (8, 4096)
    rules = {"count": {"count": 7}, "threshold": {"threshold": 0.8}, "factor": {"factor": 1.5},
             "entropy_budget": {"entropy_budget": 3.0}, "ancestral": {"probability": 0.3}}  # fmt: skip

    def make() -> Inputs:
        clean = torch.where(torch.rand(batch, length, device=bench.device) < 0.6, 9, bench.ids(9, batch, length))
        uniform = [torch.rand(batch, length, device=bench.device) for _ in range(3)]
        sample = ops.TokenSample(bench.ids(9, batch, length), uniform[0].log(), uniform[1], uniform[2])
        return {"clean": clean, "sample": sample}

    for rule, number in rules.items():

        def run(inputs: Inputs, rule=rule, number=number) -> Results:
            ids = inputs["clean"].clone()
            committed = ops.unmask_(ids, inputs["sample"], 9, rule=rule, seed=5, **number)
            return ids, committed

        yield Case("unmask_", f"{batch} × {length}, {rule}", make, run, run, equal)


def all_cases(bench: Bench) -> Iterator[Case]:
    """Every case, operators that the most depends on first."""
    yield from adaln_cases(bench)
    yield from sampling_cases(bench)
    yield from unmask_cases(bench)
    yield from qgfd_cases(bench)
    yield from head_cases(bench)
    yield from loss_cases(bench)
