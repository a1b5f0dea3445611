"""What Triton kernels share: Philox, logarithms near one, numbers that a launch must not round or specialise on.

The random numbers are those of philox.h, bit for bit. A launch passes Python floats as fp32 and specialises on integers
(their width, 1, multiples of 16), so seeds and fp64 numbers travel as 32-bit words: see `double_words`, `word`.
"""

import struct

import triton
import triton.language as tl

DRAW_TOKEN = tl.constexpr(0)  # enum Draw of philox.h
DRAW_ORDER = tl.constexpr(1)
DRAW_ANCESTRAL = tl.constexpr(2)


def word(number: int) -> int:
    """The low 32 bits of `number` as a signed integer, what a kernel's i32 argument holds."""
    number &= 0xFFFFFFFF
    return number - 2**32 if number >= 2**31 else number


def seed_words(seed: int) -> tuple[int, int]:
    """(low, high) word of a 64-bit seed."""
    return word(seed), word(seed >> 32)


def double_words(number: float) -> tuple[int, int]:
    """(low, high) word of a float64; `as_double` puts them together again."""
    return struct.unpack("<ii", struct.pack("<d", number))


@triton.jit
def as_int64(low, high):
    """The integer of two 32-bit words."""
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def as_double(low, high):
    """The fp64 number of two 32-bit words."""
    return as_int64(low, high).to(tl.float64, bitcast=True)


@triton.jit
def philox(seed, sequence, position, step, DRAW: tl.constexpr):
    """The first two words (uint32) of Philox4x32-10; all arguments are int64, and `position` may be a vector."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    zero = (position * 0).to(tl.uint32)
    c0 = zero + sequence.to(tl.uint32)
    c1 = position.to(tl.uint32)
    c2 = zero + step.to(tl.uint32)
    c3 = zero + DRAW
    first = zero + 0xD2511F53
    second = zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        h0 = tl.umulhi(first, c0)
        h1 = tl.umulhi(second, c2)
        l0 = first * c0
        l1 = second * c2
        c0 = h1 ^ c1 ^ k0
        c2 = h0 ^ c3 ^ k1
        c1 = l1
        c3 = l0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1


@triton.jit
def uniform53(w0, w1):
    """53 bits in [0, 1), fp64."""
    return ((w0 >> 5).to(tl.float64) * 67108864.0 + (w1 >> 6).to(tl.float64)) * 1.1102230246251565e-16  # 2^-53


@triton.jit
def log1p(x):
    """log(1 + x) of an fp64 x >= 0: what rounding 1 + x loses is put back (Kahan)."""
    y = 1.0 + x
    lost = y - 1.0
    return tl.where(lost == 0.0, x, tl.log(y) * (x / tl.where(lost == 0.0, 1.0, lost)))


@triton.jit
def expm1(x):
    """exp(x) - 1 of an fp64 x <= 0, -inf included (Kahan)."""
    y = tl.exp(x)
    curved = (y != 1.0) & (y > 1e-30)
    exact = (y - 1.0) * (x / tl.where(curved, tl.log(tl.where(curved, y, 2.0)), 1.0))
    return tl.where(y == 1.0, x, tl.where(curved, exact, -1.0))
