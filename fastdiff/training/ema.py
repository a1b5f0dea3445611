"""Moving average of a model's weights."""

import copy

import torch
from torch import nn


class Ema:
    """Keeps `module`, a copy of a model whose weights follow the model's with exponential decay.

    The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    The state is the weights alone; n is the training step.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self._average = list(self.module.parameters())
        self._current = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the model's weights after the optimizer's step `step` (the first is 0) into the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._current, 1 - decay)
