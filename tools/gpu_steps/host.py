"""unmask_, and how long the host takes to queue a call of each operator, with and without gradients."""

import torch

from fastdiff import ops
from gpu_steps.bench import Bench

CALLS = 1000


def unmask(bench: Bench) -> None:
    for batch, length in ((2, 40),) if bench.small else ((1, 256), (64, 256), (1, 4096), (64, 4096)):
        clean = torch.full((batch, length), 9, device=bench.device)
        uniform = [torch.rand(batch, length, device=bench.device) for _ in range(3)]
        sample = ops.TokenSample(bench.ids(9, batch, length), uniform[0].log(), uniform[1], uniform[2])

        def commit(clean=clean, sample=sample) -> torch.Tensor:
            ids = clean.clone()  # a copy is a kernel of its own: a small share of what is shown
            return ops.unmask_(ids, sample, 9, count=8, seed=5)

        contenders = {name: lambda commit=commit: [commit] for name in bench.on.backends}
        bench.compare("unmask_", f"unmask_ count, B{batch} L{length}", contenders)


def host_time(bench: Bench) -> None:
    x, branch = bench.randn(1, 16, 64), bench.randn(1, 16, 64)
    gate, shift, scale = (bench.randn(1, 64) for _ in range(3))
    logits, hidden, weight = bench.randn(4, 2048), bench.randn(4, 64), bench.randn(2048, 64)
    q, k, v = (bench.randn(1, 2, 64, 32) for _ in range(3))
    ids = torch.full((2, 32), 9, device=bench.device)
    sample = ops.TokenSample(bench.ids(9, 2, 32), *(torch.rand(2, 32, device=bench.device) for _ in range(3)))
    leaf = bench.randn(1, 16, 64).requires_grad_(True)
    targets, mask = bench.ids(2048, 4), torch.ones(4, dtype=torch.bool, device=bench.device)
    calls = {
        "adaln": lambda: ops.adaln(x, shift, scale),
        "adaln, recorded for a gradient": lambda: ops.adaln(leaf, shift, scale),
        "gated_residual_adaln": lambda: ops.gated_residual_adaln(x, branch, gate, shift, scale),
        "qgfd_attention": lambda: ops.qgfd_attention(q, k, v),
        "sample_tokens, invalid flag": lambda: ops.sample_tokens(logits, temperature=1.0, seed=7, invalid="flag"),
        "sample_tokens, invalid raise": lambda: ops.sample_tokens(logits, temperature=1.0, seed=7),
        "lm_head_sample, invalid flag": lambda: ops.lm_head_sample(hidden, weight, seed=7, invalid="flag"),
        "eos_log_prob": lambda: ops.eos_log_prob(hidden, weight, (0, 5)),
        "masked_linear_cross_entropy": lambda: ops.masked_linear_cross_entropy(hidden, weight, targets, mask),
        "unmask_": lambda: ops.unmask_(ids, sample, 9, count=1, seed=5),
        "F.layer_norm, for comparison": lambda: torch.nn.functional.layer_norm(x, (64,)),
    }
    for name, call in calls.items():
        for backend in bench.on.backends:
            operators = (name.partition(",")[0],)
            seconds = lambda call=call: bench.on.wall(call, CALLS)[0]  # noqa: E731
            bench.by_the_clock(operators, f"host time of {name}", backend, seconds, backend=backend, note="host")


def run(bench: Bench) -> None:
    unmask(bench)
    host_time(bench)
