"""Philox4x32-10 (Salmon et al. 2011) in plain PyTorch, bit for bit as philox.h has it: what references draw from."""

import torch
from torch import Tensor

DRAW_TOKEN, DRAW_ORDER, DRAW_ANCESTRAL = 0, 1, 2  # enum Draw
_LOW = 0xFFFFFFFF


def _mulhilo(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words, both held in int64."""
    low, high = constant * (value & 0xFFFF), constant * (value >> 16)  # below 2^48
    return (high + (low >> 16)) >> 16, (low + (high << 16)) & _LOW


def philox(seed: Tensor, sequence_ids: Tensor, positions: Tensor, step: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """The first two words (int64 tensors below 2^32) of Philox4x32-10; all arguments are int64 and broadcast."""
    shape = torch.broadcast_shapes(sequence_ids.shape, positions.shape)
    c = [t.expand(shape) & _LOW for t in (sequence_ids, positions, step)]
    c.append(torch.full_like(c[0], draw))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (h0, l0), (h1, l1) = _mulhilo(0xD2511F53, c[0]), _mulhilo(0xCD9E8D57, c[2])
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c[0], c[1]


def uniform53(words: tuple[Tensor, Tensor]) -> Tensor:
    """53 bits in [0, 1), float64."""
    return ((words[0] >> 5).double() * 2.0**26 + (words[1] >> 6).double()) * 2.0**-53
