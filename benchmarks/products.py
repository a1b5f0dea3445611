"""The floor of a training step: its matrix products alone, at the speed that this machine gives on their very shapes.

What a model multiplies is read from its own calls: every linear layer's product and the two of its backward pass, every
self-attention's two and four (its weights kept, as a plain backward pass keeps them).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastdiff.nn import SelfAttention


@dataclass(frozen=True)
class Product:
    """C[m, n] = A[m, k] · B[k, n], `batch` of them side by side; "t" in `turned` where A or B lies transposed."""

    batch: int
    m: int
    k: int
    n: int
    turned: str  # of A and B: "nt" for x · wᵀ

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


class _Linears(TorchFunctionMode):
    """Notes the products of every F.linear, those of its gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight = args[0], args[1]
            (outputs, inputs), rows = weight.shape, x.numel() // x.shape[-1]
            self.found[Product(1, rows, inputs, outputs, "nt")] += 1  # x · wᵀ
            self.found[Product(1, outputs, rows, inputs, "tn")] += 1  # gᵀ · x
            if x.requires_grad:
                self.found[Product(1, rows, outputs, inputs, "nn")] += 1  # g · w
        return function(*args, **(kwargs or {}))


def products_of(model: nn.Module, forward: Callable[[], Tensor]) -> Counter[Product]:
    """The products of one training step of `model`, whose forward pass is `forward`."""
    attention: Counter[Product] = Counter()

    def note(module: SelfAttention, args: tuple[Tensor]) -> None:
        batch, tokens, dim = args[0].shape
        heads, size = batch * module.num_heads, dim // module.num_heads
        attention[Product(heads, tokens, size, tokens, "nt")] += 2  # Q · Kᵀ, dO · Vᵀ
        attention[Product(heads, tokens, tokens, size, "nn")] += 2  # P · V, dS · K
        attention[Product(heads, tokens, tokens, size, "tn")] += 2  # Pᵀ · dO, dSᵀ · Q

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, SelfAttention)]
    with _Linears() as linears:
        forward()
    for hook in hooks:
        hook.remove()
    return linears.found + attention


def _operand(batch: int, rows: int, columns: int, turned: bool, dtype: torch.dtype) -> Tensor:
    shape = (batch, columns, rows) if turned else (batch, rows, columns)
    memory = torch.randn(shape, device=measure.DEVICE).to(dtype)
    return memory.transpose(1, 2) if turned else memory


def multiply_all(products: Counter[Product], dtype: torch.dtype) -> Callable[[], None]:
    """A call that makes all of them, one after the other, from operands that lie ready."""
    calls = []
    for product, count in products.items():
        a = _operand(product.batch, product.m, product.k, product.turned[0] == "t", dtype)
        b = _operand(product.batch, product.k, product.n, product.turned[1] == "t", dtype)
        calls.append((torch.bmm, a, b, count) if product.batch > 1 else (torch.mm, a[0], b[0], count))

    def run() -> None:
        for multiply, a, b, count in calls:
            for _ in range(count):
                multiply(a, b)

    return run
