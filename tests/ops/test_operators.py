"""Every operator on every backend against the float64 reference: values, gradients, determinism, torch.compile."""

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from ops.harness import DTYPES, F32, NATIVE, ROWS, Dtypes, as_leaves, call, gradients, relative_error, to_double
from ops.operators import OPERATORS

CASES = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPERATORS for case in op.cases]
FEW = [
    pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPERATORS for case in op.cases if case.name == op.few
]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
native = pytest.mark.parametrize("row", NATIVE, ids=lambda r: r.name)
dtypes_ = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


@rows
@dtypes_
@pytest.mark.parametrize(("operator", "case"), CASES)
def test_values_and_gradients(operator, case, row, dtypes):
    row.skip_unless_runnable(operator.name)
    inputs = as_leaves(case.make(dtypes, row.device))
    exact_inputs = to_double(inputs, requires_grad=True)
    exact = operator.reference(**exact_inputs)
    with row.active():
        results = call(operator, inputs, dtypes)
        grads = gradients(results, inputs, seed=8)
        with torch.no_grad():
            again = call(operator, inputs, dtypes)
    tolerance = operator.tolerance[dtypes.coarsest]
    for i, (result, plain, truth) in enumerate(zip(results, again, exact, strict=True)):
        assert result.dtype == operator.result_dtype(dtypes, i, len(results))
        assert relative_error(result, truth) <= tolerance
        assert torch.equal(result, plain), "with and without gradients the result is the same"
    for name, truth in gradients(exact, exact_inputs, seed=8).items():
        assert grads[name].dtype == inputs[name].dtype and grads[name].shape == inputs[name].shape
        if case.cancels:
            scale = max(t.abs().max().item() for t in exact_inputs.values() if isinstance(t, Tensor))
            assert (grads[name].double() - truth).abs().max() <= 100 * tolerance * max(1.0, scale), name
        else:
            assert relative_error(grads[name], truth) <= 2 * tolerance, name


@native
@pytest.mark.parametrize(("operator", "case"), FEW)
def test_results_do_not_depend_on_threads_or_on_the_run(operator, case, row):
    row.skip_unless_runnable(operator.name)
    threads = torch.get_num_threads()

    def run(n: int) -> list[Tensor]:
        torch.set_num_threads(n)
        inputs = as_leaves(case.make(Dtypes(F32, F32), row.device))
        with row.active():
            results = call(operator, inputs, Dtypes(F32, F32))
            return [*results, *gradients(results, inputs, seed=9).values()]

    try:
        first = run(1)
        for n in (1, 2, 3, 5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(n), strict=True)), f"{n} threads"
    finally:
        torch.set_num_threads(threads)


@native
@dtypes_
@pytest.mark.parametrize("operator", [op for op in OPERATORS if op.batch_case], ids=lambda o: o.name)
def test_a_sample_is_the_same_alone_and_in_a_batch(operator, row, dtypes):
    row.skip_unless_runnable(operator.name)
    case = next(c for c in operator.cases if c.name == operator.batch_case)
    inputs = case.make(dtypes, row.device)
    alone = {k: v[1:2] if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in inputs.items()}
    with row.active(), torch.no_grad():
        for whole, part in zip(call(operator, inputs, dtypes), call(operator, alone, dtypes), strict=True):
            assert torch.equal(whole[1:2], part)


@native
@pytest.mark.parametrize(("operator", "case"), FEW)
def test_fullgraph_compile_equals_eager_and_does_not_recompile(operator, case, row):
    row.skip_unless_runnable(operator.name)
    dtypes = Dtypes(F32, F32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def cut(inputs, tokens):  # fewer tokens; frames stay
        return {k: v[:, :tokens].contiguous() if k in operator.of_tokens else v for k, v in inputs.items()}

    compiled = torch.compile(operator.run, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    with row.active():
        for tokens in (150, 100, 64):
            inputs = as_leaves(cut(case.make(dtypes, row.device), tokens))
            eager, fast = operator.run(**inputs), compiled(**inputs)
            assert all(torch.equal(a, b) for a, b in zip(eager, fast, strict=True))
            for a, b in zip(gradients(eager, inputs, 3).values(), gradients(fast, inputs, 3).values(), strict=True):
                assert torch.equal(a, b)
            compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1] > 0, "another number of tokens must not compile again"


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_inductor(operator):
    torch._dynamo.reset()
    case = next(c for c in operator.cases if c.name == operator.few)
    inputs = as_leaves(case.make(Dtypes(F32, F32), "cpu"))
    eager, fast = operator.run(**inputs), torch.compile(operator.run, fullgraph=True)(**inputs)
    for a, b in zip(
        (*eager, *gradients(eager, inputs, 3).values()), (*fast, *gradients(fast, inputs, 3).values()), strict=True
    ):
        torch.testing.assert_close(a, b)


@native
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_export(operator, row):
    row.skip_unless_runnable(operator.name)
    case = next(c for c in operator.cases if c.name == operator.few)
    inputs = case.make(Dtypes(F32, F32), row.device)

    class Module(torch.nn.Module):
        def forward(self, kwargs):
            return operator.run(**kwargs)

    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    with row.active(), torch.no_grad():
        program = torch.export.export(Module(), (tensors,))
        for a, b in zip(program.module()(tensors), operator.run(**inputs), strict=True):
            assert torch.equal(a, b)
