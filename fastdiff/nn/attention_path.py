"""Up to which length plain matrix products are the faster attention on a CPU: measured, or a default."""

from collections.abc import Callable

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
_ROWS = 8192  # heads x length of a trial, about: a millisecond or two

Products = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value [B, H, L, d] -> [B, H, L, d]


def longest_of_products(query: Tensor, products: Products) -> int:
    """The longest sequence for which `products` beats fused attention, for a query `[B, H, L, d]` on a CPU.

    It depends on dtype, channels per head (to the next power of two), and whether a gradient is wanted: a choice of
    `fastdiff.tuning`, measured with the query's batch and heads. 0 for other dtypes than float32, bfloat16 and float16.
    """
    default = DEFAULT_LONGEST.get(query.dtype, 0)
    if not default or torch.compiler.is_compiling() or query.shape[-2] > _LENGTHS[-1]:
        return default
    channels = 1 << max(query.shape[-1] - 1, 0).bit_length()
    grad = torch.is_grad_enabled() and query.requires_grad
    name = str(query.dtype).removeprefix("torch.")
    key = f"attention {name}, {channels} channels, {'training' if grad else 'inference'}"
    heads = query.shape[:-2].numel()
    return tuning.decide(key, default, lambda: _measure(products, query.dtype, heads, channels, grad))


def _measure(products: Products, dtype: torch.dtype, heads: int, channels: int, grad: bool) -> tuning.Measured:
    longest, seconds = 0, {}
    for length in _LENGTHS:
        plain, fused = f"{length} tokens, plain products", f"{length} tokens, fused"
        default = plain if length <= DEFAULT_LONGEST[dtype] else fused
        count = max(min(heads, _ROWS // length), 1)
        contenders = {
            plain: _trial(products, dtype, count, length, channels, grad),
            fused: _trial(F.scaled_dot_product_attention, dtype, count, length, channels, grad),
        }
        found = tuning.fastest(contenders, default, seconds=0.04)
        seconds |= found.seconds
        if found.chosen == fused:
            break
        longest = length
    return tuning.Measured(longest, seconds)


def _trial(
    attention: Products, dtype: torch.dtype, heads: int, length: int, channels: int, grad: bool
) -> Callable[[], None]:
    """One call as a model makes it: query, key and value are views of one projection [1, L, 3, H, d]."""
    source = torch.Generator().manual_seed(0)
    packed = torch.randn(1, length, 3, heads, channels, generator=source, dtype=torch.float32, device="cpu").to(dtype)
    packed.requires_grad_(grad)

    def run() -> None:
        mixed = attention(*packed.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)
        if grad:
            mixed.backward(mixed.detach())
            packed.grad = None

    return run
