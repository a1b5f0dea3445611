"""Every operator on every backend against the float64 reference: values, gradients, determinism, torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastdiff.ops import _native
from ops.harness import (
    BEST_CPU,
    F32,
    NATIVE,
    ROWS,
    Dtypes,
    Inputs,
    Operator,
    across_threads,
    as_leaves,
    call,
    cover,
    gradients,
    relative_error,
    to_double,
)
from ops.operators import OPERATORS

VALUES = [
    pytest.param(op, case, dtypes, row, id=f"{op.name}-{case.name}-{dtypes}-{row.name}", marks=marks)
    for op in OPERATORS
    for row, case, dtypes, marks in cover(op.cases, op.dtypes)
]
BATCHES = [pytest.param(op, dtypes, id=f"{op.name}-{dtypes}") for op in OPERATORS for dtypes in op.dtypes if op.batch]
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
# a graph holds the operator; which instruction set it then runs on is not in the graph
graphs = pytest.mark.parametrize(
    "row", [row for row in NATIVE if row.backend != "cpu" or row == BEST_CPU], ids=lambda r: r.name
)
operators = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_instruction_sets(isa):
    if f"cpu-{isa}" not in {row.name for row in ROWS}:
        pytest.skip(
            f"NOT TESTED: the CPU kernels for {isa}: this CPU lacks its instructions, or fastdiff._C is not built"
        )
    (row,) = (row for row in ROWS if row.isa == isa)
    with row.active():
        assert _native.cpu_module.isa() == isa


def leaves_of(operator: Operator, inputs: Inputs) -> Inputs:
    return as_leaves(inputs) if operator.differentiable else inputs


@pytest.mark.parametrize(("operator", "case", "dtypes", "row"), VALUES)
def test_values_and_gradients(operator, case, row, dtypes):
    row.skip_unless_runnable(operator.name)
    inputs = leaves_of(operator, case.make(dtypes, row.device))
    exact_inputs = to_double(inputs, requires_grad=operator.differentiable)
    exact = operator.reference(**exact_inputs)
    with row.active():
        results = call(operator, inputs, dtypes)
        grads = gradients(results, inputs, seed=8)
        with torch.no_grad():
            again = call(operator, inputs, dtypes)
    tolerance = operator.tolerance[dtypes.coarsest]
    for i, (result, plain, truth) in enumerate(zip(results, again, exact, strict=True)):
        assert result.dtype == operator.result_dtype(dtypes, i, len(results)) and result.shape == truth.shape
        if operator.compare is None:
            assert relative_error(result, truth) <= tolerance
        assert torch.equal(result, plain), "with and without gradients the result is the same"
    if operator.compare is not None:
        operator.compare(results, exact, exact_inputs, tolerance)
    for name, truth in gradients(exact, exact_inputs, seed=8).items():
        assert grads[name].dtype == inputs[name].dtype and grads[name].shape == inputs[name].shape
        if case.cancels:
            scale = max(
                t.abs().max().item() for t in exact_inputs.values() if isinstance(t, Tensor) and t.requires_grad
            )
            assert (grads[name].double() - truth).abs().max() <= 100 * tolerance * max(1.0, scale), name
        else:
            assert relative_error(grads[name], truth) <= 2 * tolerance, name


@native
@operators
def test_results_do_not_depend_on_threads_or_on_the_run(operator, row):
    row.skip_unless_runnable(operator.name)
    case = operator.case(operator.many)

    def run() -> list[Tensor]:
        inputs = leaves_of(operator, case.make(Dtypes(F32, F32), row.device))
        with row.active():
            results = call(operator, inputs, Dtypes(F32, F32))
            return [*results, *gradients(results, inputs, seed=9).values()]

    first, *others = across_threads(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@native
@pytest.mark.parametrize(("operator", "dtypes"), BATCHES)
def test_a_sample_is_the_same_alone_and_in_a_batch(operator, row, dtypes):
    row.skip_unless_runnable(operator.name)
    inputs = operator.case(operator.batch).make(dtypes, row.device)
    with row.active(), torch.no_grad():
        results, alone = call(operator, inputs, dtypes), call(operator, operator.second(inputs), dtypes)
        for whole, part in zip(results, alone, strict=True):
            assert torch.equal(whole[1:2], part)


@graphs
@operators
def test_fullgraph_compile_equals_eager_and_does_not_recompile(operator, row):
    row.skip_unless_runnable(operator.name)
    dtypes, case = Dtypes(F32, F32), operator.case(operator.many)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    compiled = torch.compile(operator.run, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    with row.active():
        for length in operator.lengths:
            inputs = leaves_of(operator, operator.shorten(case.make(dtypes, row.device), length))
            eager, fast = operator.run(**inputs), compiled(**inputs)
            assert all(torch.equal(a, b) for a, b in zip(eager, fast, strict=True))
            for a, b in zip(gradients(eager, inputs, 3).values(), gradients(fast, inputs, 3).values(), strict=True):
                assert torch.equal(a, b)
            compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0, "another length must not compile again"


@operators
def test_inductor(operator):
    torch._dynamo.reset()
    inputs = leaves_of(operator, operator.case(operator.many).make(Dtypes(F32, F32), "cpu"))
    eager, fast = operator.run(**inputs), torch.compile(operator.run, fullgraph=True)(**inputs)
    for a, b in zip(
        (*eager, *gradients(eager, inputs, 3).values()), (*fast, *gradients(fast, inputs, 3).values()), strict=True
    ):
        torch.testing.assert_close(a, b)


@graphs
@operators
def test_export(operator, row):
    row.skip_unless_runnable(operator.name)
    inputs = operator.case(operator.many).make(Dtypes(F32, F32), row.device)
    others = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}

    class Module(torch.nn.Module):
        def forward(self, kwargs):
            return operator.run(**kwargs, **others)

    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    with row.active(), torch.no_grad():
        program = torch.export.export(Module(), (tensors,))
        for a, b in zip(program.module()(tensors), operator.run(**inputs), strict=True):
            assert torch.equal(a, b)
