"""The next step's batches, prepared by a thread while this step runs."""

import contextvars
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def pays(device: torch.device) -> bool:
    """Whether a thread has something to run on: a GPU leaves the CPU free; on a CPU, a core that torch's threads leave.

    With all cores in use it takes from the step what it gives.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return device.type != "cpu" or cores > torch.get_num_threads()


class Ahead(Generic[T]):
    """Calls `make(step)`, a pure function, one step ahead: `take(step)` gives its result or raises its error.

    With `enabled` False each is made when it is taken. Results are the same either way.
    """

    def __init__(self, make: Callable[[int], T], enabled: bool):
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next batch") if enabled else None
        self._next: tuple[int, Future[T]] | None = None

    def take(self, step: int, following: bool = False) -> T:
        """What belongs to `step`. With `following` the next step's is begun."""
        prepared, self._next = self._next, None
        if prepared is not None and prepared[0] == step:
            result = prepared[1].result()
        else:
            result = self._make(step)
        if following and self._thread is not None:
            self._next = step + 1, self._thread.submit(contextvars.copy_context().run, self._make, step + 1)
        return result

    def settle(self) -> None:
        """Waits until the thread is at rest: what it reads may then be read by others. Its result is kept."""
        if self._next is not None:
            self._next[1].exception()

    def close(self) -> None:
        """Ends the thread; what it prepared is dropped."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = self._next = None
