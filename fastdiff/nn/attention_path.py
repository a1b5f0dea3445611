"""Which attention is the fastest on a CPU: measured, or a default."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import tuning

# Where nothing is measured, on every machine. Beyond these fused attention is about as fast and never holds the L x L
# weights. From 2 threads of an AVX-512-BF16 machine, forward and backward, 64 channels per head, ms (plain / fused):
#   bfloat16  L 16: 1.1 / 7.7    49: 1.1 / 10.3    256: 11 / 27    512: 17 / 37    1024: 49 / 52
#   float32   L 16: 0.9 / 1.8    49: 1.5 / 1.9     256: 22 / 22    512: 43 / 44    1024: 110 / 71
DEFAULT_LONGEST = {torch.float32: 128, torch.bfloat16: 512, torch.float16: 512}
_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)  # that are tried; a longer sequence always takes fused attention
_ROWS = 4096  # samples x heads x length of a trial, about: a millisecond or two
_NONE = "none"  # of the lengths
# What may be chosen: the lengths from one of these to another, "32-512".
_RANGES = (_NONE, *(f"{a}-{b}" for a in _LENGTHS for b in _LENGTHS if a <= b))

Products = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value [B, H, L, d] -> [B, H, L, d]


def products_win(query: Tensor, products: Products) -> bool:
    """Whether `products` beat fused attention for a query `[B, H, L, d]` on a CPU, with as many keys.

    For which lengths they do (each to the next power of two) is a choice of `fastdiff.tuning`, by dtype, channels per
    head (to the next power of two), and whether a gradient is wanted; it is measured with the samples and heads of the
    first query. Never for other dtypes than float32, bfloat16 and float16.
    """
    length, longest = query.shape[-2], DEFAULT_LONGEST.get(query.dtype, 0)
    if not longest or torch.compiler.is_compiling():
        return length <= longest
    channels = 1 << max(query.shape[-1] - 1, 0).bit_length()
    grad = torch.is_grad_enabled() and query.requires_grad
    name = str(query.dtype).removeprefix("torch.")
    key = f"attention {name}, {channels} channels, {'training' if grad else 'inference'}"
    samples, heads = query.shape[:-3].numel(), query.shape[-3]
    chosen = tuning.decide(
        key, f"16-{longest}", lambda: _measure(products, query.dtype, samples, heads, channels, grad), _RANGES
    )
    if chosen == _NONE:
        return False
    first, last = map(int, chosen.split("-"))
    return first <= max(1 << max(length - 1, 0).bit_length(), _LENGTHS[0]) <= last


def fastest_way(qkv: Tensor, ways: Mapping[str, Callable[[Tensor], Tensor]], default: str) -> str:
    """Which of the `ways` of self-attention is the fastest for a projection `[B, N, 3, H, d]` on a CPU.

    A choice of `fastdiff.tuning`, by dtype, channels per head and tokens (each to the next power of two), and whether a
    gradient is wanted; it is measured with the samples and heads of the first projection. The default under a compiler.
    """
    if torch.compiler.is_compiling():
        return default
    samples, tokens, _, heads, channels = qkv.shape
    tokens, channels = (1 << max(size - 1, 0).bit_length() for size in (max(tokens, _LENGTHS[0]), channels))
    grad = torch.is_grad_enabled() and qkv.requires_grad
    name = str(qkv.dtype).removeprefix("torch.")
    key = f"self-attention {name}, {channels} channels, {tokens} tokens, {'training' if grad else 'inference'}"
    size = (max(min(samples, _ROWS // (heads * tokens)), 1), tokens, 3, heads, channels)

    def measure() -> tuning.Measured:
        return tuning.fastest({way: _packed(run, qkv.dtype, size, grad) for way, run in ways.items()}, default)

    return tuning.decide(key, default, measure, tuple(ways))


def _packed(
    way: Callable[[Tensor], Tensor], dtype: torch.dtype, size: tuple[int, ...], grad: bool
) -> Callable[[], None]:
    """One call of a way of self-attention as a model makes it."""
    source = torch.Generator().manual_seed(0)
    packed = torch.randn(size, generator=source, dtype=torch.float32, device="cpu").to(dtype).requires_grad_(grad)

    def run() -> None:
        mixed = way(packed)
        if grad:
            mixed.backward(mixed.detach())
            packed.grad = None

    return run


def _measure(
    products: Products, dtype: torch.dtype, samples: int, heads: int, channels: int, grad: bool
) -> tuning.Measured:
    won, seconds, settled = [], {}, True
    for length in _LENGTHS:
        plain, fused = f"{length} tokens, products", f"{length} tokens, fused"
        size = (max(min(samples, _ROWS // (heads * length)), 1), length, 3, heads, channels)
        contenders = {
            # products want query, key and value copied apart
            plain: _packed(lambda qkv: products(*qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)), dtype, size, grad),
            fused: _packed(
                lambda qkv: F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)), dtype, size, grad
            ),
        }
        found = tuning.fastest(contenders, plain if length <= DEFAULT_LONGEST[dtype] else fused, seconds=0.03)
        seconds, settled = seconds | found.seconds, settled and found.settled
        won += [length] if found.chosen == plain else []
    if not settled:
        return tuning.Measured(f"16-{DEFAULT_LONGEST[dtype]}", seconds, settled=False)
    return tuning.Measured(f"{won[0]}-{won[-1]}" if won else _NONE, seconds)
