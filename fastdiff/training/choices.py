"""What a run on a CPU goes by: precision and what else is measured. Found once, kept in its config.yaml.

`fastdiff.tuning` says what a choice is. The training step itself is measured, on a batch of the recipe's.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, convert_outputs_to_fp32
from torch import nn

from fastdiff import backends, tuning
from fastdiff.data.stream import share
from fastdiff.device import PRECISIONS, autocast, computes_bf16, precision_of_products
from fastdiff.errors import reason_of
from fastdiff.ops._sizes import measure_sizes
from fastdiff.training.config import TrainingConfig
from fastdiff.training.run_folder import RunFolder
from fastdiff.training.setup import on_cpu
from fastdiff.training.task import Batch, Task

_SECONDS = 1.5  # for the steps of a comparison, about
_STEP_SECONDS = 0.2  # for one of them, at most: each precision has one to warm up and at least five
_SLOW_SECONDS = 3.0  # of a step: another one would cost too much
_MOST_WEIGHTS = 2 * 10**8  # of a model of which whole samples are tried
_BATCHES = 5  # of which the middle one by size is tried: windows of text differ from step to step

Choices = dict[str, tuning.Value]


def choices_of(task: Task, config: TrainingConfig, folder: RunFolder) -> Choices:
    """What a run goes by: what it went by before, what its recipe gives, or else what is measured now.

    On a GPU nothing is measured: a run that began on a CPU keeps its record, for the day it comes back. Several
    processes go by what the first one found.
    """
    tuning.enabled()  # a wrong value ends all processes
    if not on_cpu(config):
        return folder.choices() if config.resume else {}
    state, found = PartialState(cpu=True), [{}]
    if state.is_main_process:
        found = [_choices_on_cpu(task, config, folder, state.num_processes)]
    return broadcast_object_list(found)[0] if state.num_processes > 1 else found[0]


def _choices_on_cpu(task: Task, config: TrainingConfig, folder: RunFolder, processes: int) -> Choices:
    if config.choices:
        return dict(config.choices)
    if folder.config.is_file() and not config.overwrite:  # a run that goes on, or is about to be refused
        return folder.choices() if config.resume else {}
    found = measure_choices(task, config, processes)
    if config.mixed_precision != "auto":
        return found.choices
    return {"mixed_precision": found.chosen, **found.choices}


def measure_choices(task: Task, config: TrainingConfig, processes: int = 1) -> tuning.Measured:
    """The precision of a recipe's training steps, with the choices that are made within one: known, or measured now.

    `seconds` are those of forward and backward in each precision. Where it cannot be measured: the default, which is
    bf16 where the CPU has instructions for it.
    """
    wanted = _wanted(config)
    if not tuning.enabled():
        return tuning.Measured(wanted[0])
    slots = len(range(config.batch_size)[share(config.batch_size, processes, 0)]) // config.accumulation_steps
    parts = {name: part for name, part in task.recipe().items() if name not in ("training", "sampling")}
    facts = [parts, config.accumulation_steps, processes, wanted, backends.requested()]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:6]
    weights = sum(parameter.numel() for parameter in task.model.parameters())
    key = f"training step {digest}, {weights / 1e6:.1f} million weights, {slots} {task.unit}"
    measure_sizes()
    try:
        return tuning.answer(key, wanted[0], functools.partial(_measure_step, task, slots, wanted), PRECISIONS)
    except Exception as error:  # where a step itself is wrong, the run ends with its message
        print(f"a training step could not be measured ({reason_of(error)}): {wanted[0]} for now", file=sys.stderr)
        return tuning.Measured(wanted[0])


def _wanted(config: TrainingConfig) -> tuple[str, ...]:
    """The precisions to compare, the default first."""
    if config.mixed_precision != "auto":
        return (config.mixed_precision,)
    return PRECISIONS if computes_bf16("cpu") else ("no",)


def _measure_step(task: Task, slots: int, wanted: tuple[str, ...]) -> tuning.Measured:
    if sum(parameter.numel() for parameter in task.model.parameters()) > _MOST_WEIGHTS:
        return _by_products(task.model, wanted)
    model = copy.deepcopy(task.model).train()  # gradients, buffers and hooks of the run's own stay as they are
    made: dict[str, Choices] = {}
    step = functools.partial(_step, task, model, made)
    batch = _fitting_batch(task, slots, functools.partial(step, wanted[0], measured=False))
    if batch is None:
        return _by_products(model, wanted)
    contenders = {name: functools.partial(step, name, batch) for name in wanted}
    found = tuning.fastest(contenders, wanted[0], seconds=_SECONDS if len(wanted) > 1 else 0.0)
    with torch.no_grad():  # for what sampling asks
        step(found.chosen, batch)
    choices = {key: value for key, value in made[found.chosen].items() if key != "mixed_precision"}
    return dataclasses.replace(found, choices=choices)


def _fitting_batch(task: Task, slots: int, step: Callable[[Batch], None]) -> Batch | None:
    """The largest part of a step's batch that is quick enough; None where not even one sample is."""
    step(_batch(task, 1))  # the first of all takes long
    size = 1
    while True:
        batch, seconds = _batch(task, size), math.inf
        for _ in range(3):  # a size's first calls plan and take memory
            start = tuning.clock()
            step(batch)
            seconds = min(seconds, tuning.clock() - start)
            if seconds > _SLOW_SECONDS:
                return None
            if size > 1 and seconds < _STEP_SECONDS / 2:
                break
        fitting = min(slots, 8 * size, int(size * _STEP_SECONDS / max(seconds, 1e-9)))
        if fitting < 1:
            return None
        if fitting <= size:
            return batch
        size = fitting


def _by_products(model: nn.Module, wanted: tuple[str, ...]) -> tuning.Measured:
    """By the largest matrix products alone: of a model whose steps take seconds."""
    found = precision_of_products(model)
    return found if len(wanted) > 1 else tuning.Measured(wanted[0])


def _batch(task: Task, size: int) -> Batch:
    """The first samples of a step's batch: of the first steps, that whose batch is of middle size."""
    batches = [task.batch(step, range(size)) for step in range(_BATCHES)]
    return sorted(batches, key=lambda batch: sum(each.numel() for each in batch.values()))[_BATCHES // 2]


def _step(
    task: Task, model: nn.Module, made: dict[str, Choices], name: str, batch: Batch, measured: bool = True
) -> None:
    """Forward and backward as the trainer has them (accelerate's autocast of `forward`), in a precision.

    With `measured` False other choices are defaults: what they depend on is that of the whole batch.
    """
    plain = type(model).forward.__get__(model)
    rounded = autocast("cpu", torch.bfloat16)(plain)
    model.forward = plain if name == "no" else convert_outputs_to_fp32(rounded)
    known = {"mixed_precision": name, **made.get(name, {})}
    with tuning.measuring(known) if measured else tuning.using(known):
        loss = task.loss(model, batch)
        if measured:
            made[name] = tuning.choices()
    if loss.requires_grad:
        loss.backward()
        model.zero_grad(set_to_none=True)


def with_choices(recipe: Mapping[str, Any], choices: Choices) -> dict[str, Any]:
    """A recipe, as plain values, with what its run goes by."""
    return {**recipe, "training": {**recipe["training"], "choices": choices}}
