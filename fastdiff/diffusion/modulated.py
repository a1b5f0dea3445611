"""Sampling with networks whose condition acts through modulations alone (adaLN of DiT, Peebles & Xie, 2023).

A modulation depends on time and label, or prompt, not on the sample. A sampler knows its times before it starts, and a
batch has few labels: ten classes and the null label need eleven rows a step, where a guided batch of a hundred has two
hundred. A text that became one vector a layer costs no more than a label.
"""

from torch import Tensor, nn

from fastdiff.nn.head import unhooked

_MOST_BYTES = 64 << 20  # of the modulations held at a time (one step's, where these are more)


def knows_modulations(model: nn.Module) -> bool:
    """Whether a model makes its modulations ahead (`DiT.modulations`), and calling its parts does nothing else.

    Wrapped models (compiled, sharded, with hooks somewhere), and those with a `forward` or layers of their own, are
    called as they are: `makes_modulations` of the model says which it is.
    """
    makes = getattr(model, "makes_modulations", None)
    return makes is not None and makes() and all(unhooked(module) for module in model.modules())


class Modulated:
    """What `Guided` takes as `predict`: a model that gets its modulations from a table.

    Calls must come in the order of the steps, one each, as `sample` makes them. The table is made in pieces of whole
    steps, each for the first step that needs it, under the autocast of that call.

    Args:
        model: a `DiT`, or another module with its `modulations`.
        times: [S], the time of each step as the model gets it.
        class_labels: [N], those of all samples of a call; a call of fewer samples has the first of them.
        layer_embedding: [N, L, D], what stands in the place of labels.
    """

    def __init__(
        self,
        model: nn.Module,
        times: Tensor,
        class_labels: Tensor | None = None,
        *,
        layer_embedding: Tensor | None = None,
    ) -> None:
        self.model, self.times = model, times
        name, given = "class_labels", class_labels
        if class_labels is None:
            name, given = "layer_embedding", layer_embedding
        distinct, self.rows = given.unique(dim=0, return_inverse=True)
        self.distinct = {name: distinct}
        self.step = 0  # of the next call
        self.table: list[Tensor] = []  # by layer, [steps, labels or prompts, width]: of the steps from `first` to `end`
        self.first = self.end = 0

    def __call__(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:  # [N, C, H, W], [N]
        """`condition` is known already."""
        if self.step == self.end:
            self._advance()
        rows = self.rows[: len(x)]
        modulations = [layer[self.step - self.first].index_select(0, rows) for layer in self.table]
        self.step += 1
        dtype = next(self.model.parameters()).dtype
        return self.model(x.to(dtype), time, modulations=modulations)

    def _advance(self) -> None:
        """The next piece of the table: first one step, which tells how many fit."""
        held = sum(layer[0].nbytes for layer in self.table)
        count = max(1, _MOST_BYTES // held) if held else 1
        self.table = []  # before the next is made: both would be twice the memory
        self.first, self.end = self.end, min(self.end + count, len(self.times))
        self.table = self.model.modulations(self.times[self.first : self.end], **self.distinct)
