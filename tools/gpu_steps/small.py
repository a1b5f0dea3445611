"""Small batches, where launches and latency are all there is, and token sampling, whose top-p has the widest guess."""

import baselines
import torch
from masked_lm_baselines import dream_sample, llada_sample, softmax_sample

from fastdiff import ops
from gpu_steps import adaln
from gpu_steps.bench import Bench
from gpu_steps.device import Function

SAMPLING = {  # name: scale of the logits, options, the public step beside it
    "T 0": (3.0, {}, lambda logits: softmax_sample(logits)),
    "T 1": (3.0, {"temperature": 1.0}, lambda logits: llada_sample(logits, 1.0)),
    "top-p 0.9, flat": (1.0, {"temperature": 1.0, "top_p": 0.9}, lambda logits: dream_sample(logits, 1.0, 0.9)),
    "top-p 0.9, peaked": (8.0, {"temperature": 1.0, "top_p": 0.9}, lambda logits: dream_sample(logits, 1.0, 0.9)),
}


def called_from_python(bench: Bench) -> None:
    """Wall time of a call in eager Python, where no graph hides the host."""
    shape = adaln.SMALL[0] if bench.small else adaln.Shape("XL/2 B1 N256", 1, 256, 1152)
    for operator in adaln.OPERATORS:
        for direction in ("forward", "backward"):
            for name in (*bench.on.backends, "eager"):
                backend = name if name in bench.on.backends else None
                function = getattr(baselines if backend is None else ops, operator)
                case = f"{operator} {direction}, {shape.name}, from Python"

                def timed(function=function, operator=operator, direction=direction) -> float:
                    call = adaln.calls(bench, function, operator, shape, direction)[0]
                    return bench.on.wall(call, 300)[1]

                bench.by_the_clock((operator,), case, name, timed, backend=backend)


def sampling(bench: Bench) -> None:
    vocab = 2100 if bench.small else 126_464
    for rows in (2,) if bench.small else (32, 1024):
        for name, (scale, options, public) in SAMPLING.items():

            def logits(scale: float = scale, rows: int = rows) -> list[torch.Tensor]:
                return [bench.randn(rows, vocab, scale=scale) for _ in range(bench.on.sets(2 * rows * vocab))]

            def fused(logits=logits, options=options) -> list[Function]:
                return [lambda one=one: ops.sample_tokens(one, seed=7, invalid="flag", **options) for one in logits()]

            def usual(logits=logits, public=public) -> list[Function]:
                return [lambda one=one: public(one) for one in logits()]

            contenders = {name: fused for name in bench.on.backends} | {"public step": usual}
            bench.compare(
                "sample_tokens", f"sample_tokens {rows} × {vocab}, {name}", contenders, bytes=2 * rows * vocab,
                uncaptured=("public step",),  # torch.multinomial looks at its weights
            )  # fmt: skip


def run(bench: Bench) -> None:
    called_from_python(bench)
    sampling(bench)
