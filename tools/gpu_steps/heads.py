"""lm_head_sample and eos_log_prob beside the bare product of the same head, at LLaDA-8B's width and vocabulary."""

import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops
from gpu_steps.bench import Bench


def run(bench: Bench) -> None:
    dim, vocab = (32, 2100) if bench.small else (4096, 126_464)
    weight = bench.randn(vocab, dim, scale=3 * dim**-0.5)
    for rows in (2,) if bench.small else (1, 32, 1024):
        hidden = bench.randn(rows, dim)

        def sample(hidden: Tensor = hidden) -> object:
            return ops.lm_head_sample(hidden, weight, temperature=1.0, seed=7, invalid="flag")

        def end(hidden: Tensor = hidden) -> object:
            return ops.eos_log_prob(hidden, weight, (0, 5))

        def product(hidden: Tensor = hidden) -> Tensor:
            return F.linear(hidden, weight)

        for operator, function in (("lm_head_sample", sample), ("eos_log_prob", end)):
            contenders = {name: lambda function=function: [function] for name in bench.on.backends}
            contenders["F.linear alone"] = lambda product=product: [product]
            case = f"{operator} {rows} × {dim} × {vocab}"
            bench.compare(operator, case, contenders, bytes=2 * vocab * dim, flops=2 * rows * vocab * dim)
