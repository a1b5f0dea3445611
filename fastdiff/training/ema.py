"""Moving average of a model's weights."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn


class Ema:
    """Keeps `module`, a copy of a model whose weights follow the model's with exponential decay.

    The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    The state is the weights alone; n is the training step. Weights that are frozen now are their own average: `module`
    shares them with the model.
    """

    def __init__(self, model: nn.Module, decay: float):
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(model, frozen).requires_grad_(False).eval()
        self.decay = decay
        pairs = zip(model.parameters(), self.module.parameters(), strict=True)
        self._average = {parameter: average for parameter, average in pairs if average is not parameter}

    def decay_of(self, step: int) -> float:
        """The decay of the update after the optimizer's step `step` (the first is 0)."""
        return min(self.decay, (1 + step) / (10 + step))

    def pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """Every weight of the model that is trained, and its average."""
        return self._average.items()

    def update(self, step: int) -> None:
        """Takes the model's weights after the optimizer's step `step` into the average."""
        self.follow(list(self._average), 1 - self.decay_of(step))

    @torch.no_grad()
    def follow(self, parameters: Sequence[nn.Parameter], weight: float) -> None:
        """Takes some of the model's weights into the average, with weight `weight`."""
        if parameters:
            torch._foreach_lerp_([self._average[p] for p in parameters], list(parameters), weight)
