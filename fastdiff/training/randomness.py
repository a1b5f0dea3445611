"""Seeds for every random thing of a training step, derived from what it belongs to.

No generator is carried from step to step, so a resumed run draws what the uninterrupted one would have drawn, and two
processes draw together what one would have drawn alone.
"""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers (seed, step, purpose, slot, …): SplitMix64's mixing function, once a part."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def normal_noise(slots: range, shape: tuple[int, ...], *parts: int) -> Tensor:
    """Standard normal noise, float32 [len(slots), *shape]: each row depends on its own slot and `parts` alone."""
    noise, source = torch.empty(len(slots), *shape), torch.Generator()
    for row, slot in zip(noise, slots, strict=True):
        torch.randn(shape, generator=source.manual_seed(derive_seed(*parts, slot)), out=row)
    return noise
