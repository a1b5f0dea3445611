"""What a trainer needs to know of what it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.training.provenance import DataSet

Batch = dict[str, Tensor]


class Task(Protocol):
    """A model, its data and its loss. The trainer knows nothing else of them.

    `batch` must be a pure function of its arguments (and of the task's seed): that is what makes resume exact and
    the number of processes irrelevant. Slots are positions in the step's global batch, 0 … batch_size - 1.

    A task may have a method `save_averaged(model, folder)`, too: after `save` it adds to `folder` what is measured of
    the averaged weights, which ema.safetensors has already.
    """

    model: nn.Module
    unit: str  # what is counted, for the progress line: "images"
    partial_gradients: bool  # whether a step may leave parameters without a gradient

    def batch(self, step: int, slots: range) -> Batch:
        """The inputs of these slots, on the CPU, randomness included."""
        ...

    def weight(self, batch: Batch) -> float:
        """This batch's part of the number by which the sum of losses is divided: samples, or masked tokens."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the batch's losses (a scalar with gradient), computed by `model`."""
        ...

    def sample_ids(self, step: int) -> list[int]:
        """Which samples of the data set the step reads: named when its loss is not finite."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes model.safetensors, config.json and what else a checkpoint's users need, all of it in `folder`."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Measures of `model` (the averaged weights) on held-out data, for validation.jsonl; {} for none.

        loss.png shows the one named "loss", or else the first, with its "standard_error" where there is one.
        """
        ...

    def preview(self, model: nn.Module, path: Path) -> None:
        """Draws samples of `model` (the averaged weights, eval mode) as a picture at `path`."""
        ...

    def data_sets(self) -> Mapping[str, DataSet]:
        """The data by the section of the recipe that names it, {} for none: a run knows what it was trained on.

        The trainer keeps their records in each checkpoint, and refuses to resume with other data. What a task's
        command evaluates it passes to `fastdiff.tasks.run.Run.check_data`.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What users of a checkpoint need beside weights and recipe, as plain values: class names."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Everything the run was made from, as plain values, with the trainer's part under "training"."""
        ...


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
