"""Every operator once at real shapes, on every backend of this device, against fp64.

The operator runs on a stream that is not the default one; then once more, captured in a CUDA graph, whose replay must
fill the poisoned results again.
"""

import importlib
import math
import pkgutil

import torch
from torch import Tensor

import fastdiff.ops
from fastdiff import backends
from fastdiff.backends import use_backend
from gpu_steps.bench import Bench
from gpu_steps.cases import Case, Results, all_cases


def run(bench: Bench) -> None:
    if bench.small and "triton" in bench.on.backends:
        mend_interpreter()
    for module in pkgutil.iter_modules(fastdiff.ops.__path__):  # each registers its operators
        importlib.import_module(f"fastdiff.ops.{module.name}")
    checked = set()
    for case in all_cases(bench):
        checked.add(case.operator)
        check(bench, case)
        bench.on.forget()
    for operator in sorted(set(backends.table()) - checked):
        bench.record.note(f"{operator}: no case; nothing of it was checked here")


def mend_interpreter() -> None:
    """Triton's interpreter truncates bf16 and multiplies its bits: as a GPU does it, for the stand-in alone."""
    from ops.triton_interpreter import mend_bf16_products, mend_bf16_rounding

    mend_bf16_rounding()
    mend_bf16_products()


def check(bench: Bench, case: Case) -> None:
    inputs = case.make()
    with use_backend("reference"):
        exact = bench.attempt(f"{case.operator}, {case.name}", "fp64", lambda: case.exact(inputs), ours=True)
    if exact is None:
        return
    for name, backend in bench.on.backends.items():
        missing = backends.why_not(case.operator, backend, bench.on.name, (torch.float32,))
        if missing is not None:
            bench.record.row("failed", case=f"{case.operator}, {case.name}", contender=name, error=missing)
            continue

        def judged(backend: str = backend) -> tuple[float, float | None]:
            with use_backend(backend):
                return _errors(bench, case, inputs, exact)

        errors = bench.attempt(f"{case.operator}, {case.name}", name, judged, ours=False)
        if errors is None:  # the check failed, in words that the note before this row gives
            errors = (float("inf"), None)
        eager, replayed = errors
        worst = max(eager, replayed or 0.0)
        bench.record.row(
            "check", operator=case.operator, case=case.name, contender=name, ok=worst <= 1,
            error=worst if math.isfinite(worst) else 1e30,
            note="" if replayed is not None else "not captured in a graph",
        )  # fmt: skip


def _errors(bench: Bench, case: Case, inputs: dict, exact: Results) -> tuple[float, float | None]:
    """The error of a call, and that of a graph's second replay into results that were poisoned."""
    eager = case.judge(case.run(inputs), exact)
    if not case.capturable:
        return eager, None
    held: list[Results] = []
    replay = bench.on.graph([lambda: held.append(case.run(inputs))], 1)
    replay()
    results = held[-1]
    if bench.on.name == "cuda":  # the stand-in computes new ones
        for result in results:
            _poison(result)
        replay()
    return eager, case.judge(results, exact)


def _poison(result: Tensor) -> None:
    with torch.no_grad():
        result.fill_(torch.nan if result.is_floating_point() else -7)
