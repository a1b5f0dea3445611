"""Which samples a training step reads: a pure function of seed and step, so that a resumed run needs only its step."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class EpochStream:
    """Endless stream of sample indices: every epoch is one permutation, epochs follow each other without a gap.

    Args:
        size: number of samples.
        batch_size: samples a step, over all processes.
        seed: seed of the permutations.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        if size < 1 or batch_size < 1:
            raise ValueError(f"size: got {size}, and batch_size {batch_size}; expected both at least 1")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.size))

    def indices(self, step: int) -> Tensor:
        """The samples of one step: int64 [batch_size]."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = positions // self.size, positions % self.size
        first, last = int(epochs[0]), int(epochs[-1])
        return torch.cat([self._permutation(epoch)[offsets[epochs == epoch]] for epoch in range(first, last + 1)])

    def epoch(self, step: int) -> float:
        """How many times the data has been read when `step` begins."""
        return step * self.batch_size / self.size


def share(count: int, parts: int, part: int) -> slice:
    """The `part`-th of `parts` contiguous shares of range(count); shares differ by at most one."""
    return slice(count * part // parts, count * (part + 1) // parts)
