"""Small decisions a trainer makes before its first step, and the signals that end it."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import nn

from fastdiff.device import PRECISIONS, computes_bf16
from fastdiff.training.config import TrainingConfig
from fastdiff.tuning import made, using


def on_cpu(config: TrainingConfig) -> bool:
    """Whether a run trains on the CPU."""
    return config.device == "cpu" or not torch.accelerator.is_available()


def resolve_precision(config: TrainingConfig, choices: Mapping[str, Any]) -> str:
    """accelerate's name of the precision that "auto" means here: "bf16" or "no". `choices`: what the run goes by."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    with using(choices):
        found = made("mixed_precision", PRECISIONS) if on_cpu(config) else None
    on_gpu = config.device == "auto" and torch.cuda.is_available()
    return found or ("bf16" if computes_bf16("cuda" if on_gpu else "cpu") else "no")


def forget_accelerator() -> None:
    """Lets a run of one process have another device and precision than the run before it."""
    if PartialState._shared_state and PartialState().num_processes == 1:
        # accelerate keeps device and precision for the life of a process; another run in it may want others
        AcceleratorState._reset_state(reset_partial_state=True)


def make_accelerator(
    config: TrainingConfig, choices: Mapping[str, Any], partial_gradients: bool = False
) -> Accelerator:
    """accelerate's view of devices, precision, processes and trackers.

    With `partial_gradients` a step of several processes may leave parameters without a gradient.
    """
    folder = config.output_dir
    # where there is none to use it has to be told: of processes that torchrun started each would think itself alone
    return Accelerator(
        mixed_precision=resolve_precision(config, choices),
        cpu=on_cpu(config),
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(folder, logging_dir=str(Path(folder) / "tracking")),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if partial_gradients else None,
    )


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks for the next step instead of giving them back to the kernel.

    By default each activation of more than 128 KiB may be mapped anew, page by page, in every step: on 2 cores the
    demo's model trains at 495 images/s so and at 665 with the pages kept. Returns whether the C library took it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(m_mmap_threshold, 2**30) and mallopt(m_trim_threshold, 2**31 - 1))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with decay (matrices) and without (biases, gains)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass
class Signals:
    """Whether the process was asked to stop."""

    received: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Signals]:
    """Turns the first SIGINT or SIGTERM inside the block into a flag; a second one acts as usual.

    Only the main thread may set handlers; elsewhere the flag stays False.
    """
    state, before = Signals(), {}

    def handle(number, frame):
        state.received = True
        for each, handler in before.items():
            signal.signal(each, handler)

    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
