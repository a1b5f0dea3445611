"""What data sets have in common: two parts that give batches of tensors, and the classes' names."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor


class ExampleSet(Protocol):
    """Examples of one shape."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """The examples at `indices`, one tensor a field; row i is the example at indices[i]."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when the examples do."""
        ...


@dataclass(frozen=True)
class LabelledData:
    """A data set: its part to train on, its held-out part, and the classes' names in the order of their labels."""

    name: str
    train: ExampleSet
    held_out: ExampleSet
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of both parts and of the classes."""
        parts = (self.name, *self.class_names, self.train.fingerprint(), self.held_out.fingerprint())
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()

    def record(self) -> dict[str, Any]:
        """What a run keeps of its data, as plain values: `fastdiff.training.provenance` compares it later."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "class_names": list(self.class_names),
            "examples": {"train": len(self.train), "held_out": len(self.held_out)},
        }
