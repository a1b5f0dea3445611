"""adaln and gated_residual_adaln, forward and backward, on the streams of DiT-XL/2, Flux and Wan.

Predicted: what issues instructions, not what moves bytes, binds the forward pass at D 1152 (28 % of the bytes' floor).
"""

from collections.abc import Callable
from dataclasses import dataclass

import baselines
import torch
from torch import Tensor

from fastdiff import ops
from gpu_steps.bench import Bench
from gpu_steps.device import Function


@dataclass(frozen=True)
class Shape:
    """A bf16 stream [batch, tokens, dim] with fp32 modulation per sample or per token."""

    name: str
    batch: int
    tokens: int
    dim: int
    per_token: bool = False
    compiled: bool = False  # whether torch.compile takes part: each costs seconds

    @property
    def elements(self) -> int:
        return self.batch * self.tokens * self.dim


REAL = (
    Shape("XL/2 B32 N256", 32, 256, 1152, compiled=True),
    Shape("Flux", 1, 4608, 3072, compiled=True),
    Shape("Wan", 1, 32_760, 5120, compiled=True),
    Shape("Wan, per token", 1, 32_760, 5120, per_token=True, compiled=True),
    Shape("XL/2 B1 N256", 1, 256, 1152),
    Shape("XL/2 B2 N1024", 2, 1024, 1152),
    Shape("XL/2 B32 N1024", 32, 1024, 1152),
)
OPERATORS = ("adaln", "gated_residual_adaln")
SMALL = (Shape("small", 2, 8, 64, compiled=True), Shape("small, per token", 1, 8, 64, per_token=True))
# bytes an element: streams of 2 bytes; modulations of 4, which count where each token has its own
BYTES = {
    ("adaln", "forward"): (2 * 2, 2 * 4),  # x, out; shift, scale
    ("adaln", "backward"): (3 * 2, 3 * 4),  # grad_out, x, grad_x; scale, and gradients of shift and scale
    ("gated_residual_adaln", "forward"): (4 * 2, 3 * 4),  # residual, branch, both results; gate, shift, scale
    ("gated_residual_adaln", "backward"): (6 * 2, 5 * 4),  # two gradients in and out, r, branch; gate, scale, three
}


def operands(bench: Bench, operator: str, shape: Shape, gradient: bool) -> list[Tensor]:
    stream = (shape.batch, shape.tokens, shape.dim)
    rows = stream if shape.per_token else (shape.batch, shape.dim)
    gated = operator == "gated_residual_adaln"
    tensors = [bench.randn(*stream) for _ in range(1 + gated)]
    tensors += [bench.randn(*rows, dtype=torch.float32) for _ in range(2 + gated)]
    return [t.requires_grad_(gradient) for t in tensors]


def plain(operator: str, shape: Shape) -> Callable[..., object]:
    """The public way: LayerNorm without affine, modulate. Per token nothing is to be unsqueezed."""
    if not shape.per_token:
        return getattr(baselines, operator)

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, (x.shape[-1],), eps=1e-6)
        return (normed * (1 + scale) + shift).to(x.dtype)

    def gated(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        stream = (residual + gate * branch).to(residual.dtype)
        return stream, adaln(stream, shift, scale)

    return adaln if operator == "adaln" else gated


def calls(bench: Bench, function: Callable, operator: str, shape: Shape, direction: str) -> list[Function]:
    """Calls of the function, or of its backward pass, each on tensors of its own."""
    per_element, per_modulation = BYTES[operator, direction]
    size = shape.elements * (per_element + per_modulation * shape.per_token)
    made = []
    for _ in range(bench.on.sets(size)):
        tensors = operands(bench, operator, shape, direction == "backward")
        if direction == "forward":
            made.append(lambda tensors=tensors: function(*tensors))
            continue
        results = function(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        cotangents = [torch.randn_like(result) for result in results]
        made.append(
            lambda results=results, tensors=tensors, cotangents=cotangents: torch.autograd.grad(
                results, tensors, cotangents, retain_graph=True
            )
        )
    return made


def compare(bench: Bench, operator: str, shape: Shape, direction: str, names: tuple[str, ...]) -> None:
    per_element, per_modulation = BYTES[operator, direction]
    functions = {name: getattr(ops, operator) for name in bench.on.backends}
    functions["eager"] = plain(operator, shape)
    if "torch.compile" in names:
        functions["torch.compile"] = torch.compile(plain(operator, shape), **bench.on.compile_options)
    contenders = {
        name: lambda function=functions[name]: calls(bench, function, operator, shape, direction) for name in names
    }
    size = shape.elements * (per_element + per_modulation * shape.per_token)
    title = "gated" if operator == "gated_residual_adaln" else "adaln"
    bench.compare(operator, f"{title} {direction}, {shape.name}", contenders, bytes=size)


def run(bench: Bench) -> None:
    from torch._functorch import config

    if hasattr(config, "donated_buffer"):
        config.donated_buffer = False  # compiled backward passes are called again and again, too
    shapes = SMALL if bench.small else REAL
    kinds = [(operator, direction) for direction in ("forward", "backward") for operator in OPERATORS]
    for shape in shapes:
        for operator, direction in kinds:
            compare(bench, operator, shape, direction, (*bench.on.backends, "eager"))
    for shape in (shape for shape in shapes if shape.compiled):  # last, since compiling takes seconds
        for operator, direction in kinds:
            compare(bench, operator, shape, direction, ("torch.compile",))
