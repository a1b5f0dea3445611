"""QGFD attention with one step (two hops) against the chain of two SDPA calls that computes the same."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff import ops
from gpu_steps.bench import Bench
from gpu_steps.device import Function

HEADS = 16
REAL = tuple((batch, length, dim) for dim in (64, 128) for batch, length in ((1, 1024), (8, 1024), (1, 4096)))
SMALL = ((1, 70, 16),)


def chain(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """out = A·(½·A·V + ½·V) as two calls of torch's attention."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            mixed = torch.lerp(value, F.scaled_dot_product_attention(query, key, value), 0.5)
            return F.scaled_dot_product_attention(query, key, mixed)

    return attend


def calls(bench: Bench, function: Callable, shape: tuple[int, int, int], backward: bool) -> list[Function]:
    batch, length, dim = shape
    made = []
    for _ in range(bench.on.sets(8 * batch * HEADS * length * dim)):
        operands = [bench.randn(batch, HEADS, length, dim).requires_grad_(backward) for _ in range(3)]
        if not backward:
            made.append(lambda operands=operands: function(*operands))
            continue
        out = function(*operands)
        cotangent = torch.randn_like(out)
        made.append(
            lambda out=out, operands=operands, cotangent=cotangent: torch.autograd.grad(
                out, operands, cotangent, retain_graph=True
            )
        )
    return made


def run(bench: Bench) -> None:
    functions = {name: ops.qgfd_attention for name in bench.on.backends}
    functions |= {"SDPA chain, flash": chain(SDPBackend.FLASH_ATTENTION)}
    functions |= {"SDPA chain, cuDNN": chain(SDPBackend.CUDNN_ATTENTION)}
    shapes = SMALL if bench.small else REAL
    backwards = SMALL if bench.small else ((1, 1024, 64), (1, 4096, 64))
    for shape, backward in [*((shape, False) for shape in shapes), *((shape, True) for shape in backwards)]:
        batch, length, dim = shape
        hops = 2 * 4 * batch * HEADS * length**2 * dim
        contenders = {
            name: lambda function=function, shape=shape, backward=backward: calls(bench, function, shape, backward)
            for name, function in functions.items()
        }
        direction = "backward" if backward else "forward"
        bench.compare(
            "qgfd_attention", f"qgfd {direction}, B{batch} H{HEADS} L{length} d{dim}, 1 step", contenders,
            flops=(3 if backward else 1) * hops,
        )  # fmt: skip
