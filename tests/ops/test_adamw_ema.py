"""AdamW with a moving average in one pass: against torch's AdamW and plain PyTorch, on every instruction set."""

import pytest
import torch

from fastdiff.kernels.adamw_ema import reference
from fastdiff.ops import adamw_ema as module
from ops.harness import NATIVE, across_threads, check_schemas

SHAPES = [(3,), (1,), (), (70, 33), (8192,), (2, 8193), (0,)]  # with and without a last piece that is short
NUMBERS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "averages")
CPU = [row for row in NATIVE if row.backend == "cpu"]


def lists(dtype=torch.float32, steps=0.0):
    generator = torch.Generator().manual_seed(0)

    def random():
        return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]

    moments = {"exp_avgs": random(), "exp_avg_sqs": [t.square() for t in random()]}
    if steps == 0:
        moments = {name: [torch.zeros_like(t) for t in tensors] for name, tensors in moments.items()}
    counters = [torch.tensor(steps) for _ in SHAPES]
    return {"params": random(), "grads": random(), **moments, "steps": counters, "averages": random()}


def run(step, given, count=3, grad_scale=0.5):
    for index in range(count):
        step(*(given[name] for name in LISTS), *NUMBERS.values(), grad_scale, 1 / (index + 2))
    return given


def assert_close(ours, exact, tolerance):
    for name in LISTS:
        for a, b in zip(ours[name], exact[name], strict=True):
            difference, size = (a.double() - b).norm(), b.double().norm().clamp_min(1e-30)
            assert difference / size < tolerance, name


@pytest.mark.parametrize("row", CPU, ids=lambda row: row.name)
@pytest.mark.parametrize("steps", [0.0, 41.0])
def test_plain_pytorch_in_float64(row, steps):
    row.skip_unless_runnable(module.OPERATOR)
    exact = run(reference.adamw_ema_, lists(torch.float64, steps))
    with row.active():
        ours = run(module.adamw_ema_, lists(steps=steps))
    assert_close(ours, exact, 1e-6)  # seen: 1.2e-7


def test_torchs_adamw():
    given, ours = lists(), lists()
    params = [torch.nn.Parameter(t) for t in given["params"]]
    optimizer = torch.optim.AdamW(params, lr=NUMBERS["lr"], betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        for p, grad in zip(params, given["grads"], strict=True):
            p.grad = 0.5 * grad
        optimizer.step()
    run(module.adamw_ema_, ours)
    for p, weight, first in zip(params, ours["params"], ours["exp_avgs"], strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], first, rtol=1e-5, atol=1e-6)


def test_threads_change_nothing():
    results = across_threads(
        lambda: (run(module.adamw_ema_, lists())["params"], module.gradient_norm(lists()["grads"]))
    )
    for params, norm in results[1:]:
        assert torch.equal(norm, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(params, results[0][0], strict=True))


@pytest.mark.parametrize("row", CPU, ids=lambda row: row.name)
def test_the_norm_of_all_gradients(row):
    row.skip_unless_runnable(module.OPERATOR)
    grads = lists()["grads"]
    with row.active():
        norm = module.gradient_norm(grads)
        grads[3][5, 7] = torch.nan
        assert module.gradient_norm(grads).isnan()
    exact = reference.gradient_norm(lists(torch.float64)["grads"])
    assert norm.shape == (1,) and abs(norm.item() / exact.item() - 1) < 1e-6


def test_schemas_and_refusals():
    check_schemas(module.SCHEMAS)
    torch.library.opcheck(module.gradient_norm, (lists()["grads"],))
    for name in LISTS:
        for wrong in (lists()[name][:-1], [t.double() for t in lists()[name]]):
            with pytest.raises(RuntimeError, match="do not fit|different lengths"):
                run(module.adamw_ema_, lists() | {name: wrong})
    with pytest.raises(RuntimeError, match="empty list"):  # torch's own message
        module.gradient_norm([])
