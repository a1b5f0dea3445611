"""The one harness for every operator: rows of backends, cases of inputs, and how results are compared.

A new operator is an `Operator` in tests/ops/operators.py; a new backend is a row in ROWS. Nothing else changes.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from fastdiff import backends
from fastdiff.ops import _native

Inputs = dict[str, Tensor | None | float | str | tuple]
A, B = TypeVar("A"), TypeVar("B")


@dataclass(frozen=True)
class Row:
    """One way to run an operator on this machine."""

    name: str
    backend: str
    device: str
    isa: str | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.isa is not None:
                before = _native.cpu_module.isa()
                _native.cpu_module.choose_isa(self.isa)
                stack.callback(_native.cpu_module.choose_isa, before)
            stack.enter_context(backends.use_backend(self.backend))
            yield

    def skip_unless_runnable(self, operator: str) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip(f"NOT TESTED: {self.name}: no GPU on this machine (its kernels run in tests/emulator)")
        reason = backends.why_not(operator, self.backend, self.device, (torch.float32,))
        if reason is not None:
            pytest.skip(f"NOT TESTED: {self.name}: {reason}")


def _rows() -> list[Row]:
    isas = _native.cpu_module.isa_names() if _native.cpu_module else ["baseline"]
    rows = [Row("reference", "reference", "cpu")] + [Row(f"cpu-{isa}", "cpu", "cpu", isa) for isa in isas]
    if torch.cuda.is_available():
        return rows + [Row("cuda", "cuda", "cuda"), Row("triton", "triton", "cuda")]
    # Triton's interpreter takes a process of its own: tests/ops/test_triton_interpreted.py
    return rows + ([Row("triton", "triton", "cpu")] if os.environ.get("TRITON_INTERPRET") == "1" else [])


ROWS = _rows()
NATIVE = [row for row in ROWS if row.backend != "reference"]
A_DEVICE = [row for row in NATIVE if row.name in ("cpu-baseline", "cuda")]  # looks at operators, not at kernels
BEST_CPU = [row for row in ROWS if row.backend == "cpu"][-1]


def cover(firsts: Sequence[A], seconds: Sequence[B]) -> Iterator[tuple[Row, A, B, tuple[pytest.MarkDecorator, ...]]]:
    """Every (row, first, second) and its marks: `exhaustive` where the default run leaves it out.

    The reference, the best instruction set and GPUs get the whole grid. The other instruction sets are compiled from
    the same source, so there each first meets one second and each second one first, and other pairs on every row.
    """
    count = max(len(firsts), len(seconds))
    for shift, row in enumerate(ROWS):
        kept = {(i % len(firsts), (i + shift) % len(seconds)) for i in range(count)}
        for (i, first), (j, second) in itertools.product(enumerate(firsts), enumerate(seconds)):
            whole = row.isa is None or row == BEST_CPU
            yield row, first, second, () if whole or (i, j) in kept else (pytest.mark.exhaustive,)


@dataclass(frozen=True)
class Dtypes:
    """The dtype of the stream, and those of branch and modulation; `autocast` is the dtype of autocast, if on."""

    stream: torch.dtype
    other: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        return f"{short[self.stream]}-{short[self.other]}" + (
            f"-autocast_{short[self.autocast]}" if self.autocast else ""
        )

    @property
    def coarsest(self) -> torch.dtype:
        return max((self.stream, self.other, self.autocast or self.stream), key=lambda d: torch.finfo(d).eps)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    Dtypes(F32, F32),
    Dtypes(BF16, BF16),
    Dtypes(F16, F16),
    Dtypes(F32, BF16, BF16),
    Dtypes(BF16, F32),
    Dtypes(F16, BF16),
]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Dtypes, str], Inputs]  # (dtypes, device) -> keyword arguments
    # The input's gradient is a difference of equal terms (the norm of one element): compared in absolute terms.
    cancels: bool = False


def _one_dtype(dtypes: Dtypes, index: int, count: int) -> torch.dtype:
    """All results have the stream's dtype, the last one autocast's where that is on."""
    return dtypes.autocast if dtypes.autocast and index + 1 == count else dtypes.stream


def _fewer_tokens(inputs: Inputs, tokens: int) -> Inputs:
    return {k: v[:, :tokens].contiguous() if k in ("x", "residual", "branch") else v for k, v in inputs.items()}


def _second_sample(inputs: Inputs) -> Inputs:
    return {k: v[1:2] if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in inputs.items()}


@dataclass(frozen=True)
class Operator:
    name: str
    run: Callable[..., tuple[Tensor, ...]]  # the public function, its results as a tuple
    reference: Callable[..., tuple[Tensor, ...]]  # the same in float64
    cases: list[Case]
    # |result - exact| / |exact| in norms; the largest seen: 1.9e-7, 2.7e-3, 3.0e-4 (gradients, which are allowed twice
    # as much: 2.8e-7, 3.8e-3, 5.1e-4).
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: {F32: 1e-6, BF16: 6e-3, F16: 8e-4})
    dtypes: list[Dtypes] = field(default_factory=lambda: DTYPES)
    result_dtype: Callable[[Dtypes, int, int], torch.dtype] = _one_dtype  # (dtypes, index of the result, how many)
    differentiable: bool = True
    # Where norms do not say it: (results, exact results, exact inputs, tolerance), asserts
    compare: Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Inputs, float], None] | None = None
    many: str = "many-segments"  # the case whose rows are many: threads, torch.compile, export
    lengths: tuple[int, ...] = (150, 100, 64)  # of `shorten`, of that case
    shorten: Callable[[Inputs, int], Inputs] = _fewer_tokens
    # the case with several samples, `second` the second of them; None: one result, or not bit for bit the same alone
    batch: str | None = "modulation-BFD:3-chunk"
    second: Callable[[Inputs], Inputs] = _second_sample

    def case(self, name: str) -> Case:
        return next(case for case in self.cases if case.name == name)


def to_double(inputs: Inputs, requires_grad: bool = False) -> Inputs:
    """The same values in float64, on the CPU, as leaves."""
    out: Inputs = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            floats = value.is_floating_point()
            value = value.detach().cpu()
            value = value.double().requires_grad_(requires_grad) if floats else value
        out[name] = value
    return out


def as_leaves(inputs: Inputs) -> Inputs:
    """Leaves that require gradients, with the strides and offsets of the originals."""
    floats = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.detach().requires_grad_(True) if k in floats else v for k, v in inputs.items()}


def call(operator: Operator, inputs: Inputs, dtypes: Dtypes) -> tuple[Tensor, ...]:
    device = next(v.device.type for v in inputs.values() if isinstance(v, Tensor))
    with torch.autocast(device, dtypes.autocast) if dtypes.autocast else contextlib.nullcontext():
        return operator.run(**inputs)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|, in norms over the whole tensor; NaN and Inf count as infinite."""
    difference = (result.detach().double().cpu() - exact).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return (difference / exact.norm().clamp_min(1e-30)).item() if exact.norm() > 0 else difference.item()


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of all outputs with respect to every tensor that requires one."""
    generator = torch.Generator().manual_seed(seed)
    outputs = tuple(o for o in outputs if o.requires_grad)
    if not outputs:
        return {}
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    leaves = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [c.to(o.device, o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    )
    return dict(zip(leaves, grads, strict=True))


def across_threads(run: Callable[[], A]) -> list[A]:
    """What `run` gives with several numbers of torch's threads, one first."""
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 3, 4, 5, 8):
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


def check_schemas(schemas: dict[str, str]) -> None:
    """Asserts that the schemas written in Python are those of the compiled operators."""
    for name, schema in schemas.items():
        written = str(getattr(torch.ops.fastdiff, name).default._schema).removeprefix(f"fastdiff::{name}")
        assert torch._C.parse_schema(name + schema) == torch._C.parse_schema(name + written)


def check_operators(schemas: dict[str, str], calls: dict[str, tuple]) -> None:
    """torch's opcheck of every operator, with the arguments of a call."""
    assert set(calls) == set(schemas)
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.fastdiff, name).default, arguments)
