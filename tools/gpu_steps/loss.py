"""masked_linear_cross_entropy with its gradients, all rows masked, beside logits of all rows at once."""

import baselines
import torch

from fastdiff import ops
from gpu_steps.bench import Bench
from gpu_steps.device import Function


def run(bench: Bench) -> None:
    dim, vocab = (32, 700) if bench.small else (4096, 126_464)
    for rows in (20,) if bench.small else (1024, 8192):
        hidden = bench.randn(rows, dim).requires_grad_(True)
        weight = bench.randn(vocab, dim, scale=dim**-0.5).requires_grad_(True)
        targets, mask = bench.ids(vocab, rows), torch.ones(rows, dtype=torch.bool, device=bench.device)
        ones = torch.ones(rows, device=bench.device)

        def fused(hidden=hidden, weight=weight, targets=targets, mask=mask) -> object:
            loss, _ = ops.masked_linear_cross_entropy(hidden, weight, targets, mask)
            return torch.autograd.grad(loss, (hidden, weight))

        def gathered(hidden=hidden, weight=weight, targets=targets, mask=mask, ones=ones) -> object:
            loss = baselines.masked_loss_of_gathered_rows(hidden, weight, targets, mask, ones)
            return torch.autograd.grad(loss, (hidden, weight))

        contenders: dict[str, Function] = {name: fused for name in bench.on.backends} | {"public": gathered}
        bench.compare(
            "masked_linear_cross_entropy",
            f"loss and gradients, {rows} × {dim} × {vocab}",
            {name: lambda function=function: [function] for name, function in contenders.items()},
            flops=6 * rows * dim * vocab,
            uncaptured=tuple(contenders),  # the number of masked rows is read on the host
        )
