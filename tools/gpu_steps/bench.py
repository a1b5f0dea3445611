"""What a step is given: the device, the time that is left, and where its rows go."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdiff.backends import use_backend
from gpu_steps.device import Function, device_named
from gpu_steps.record import Record

# After one of these nothing in the process can be believed: the step ends there.
_STICKY = ("illegal memory access", "unspecified launch failure", "device-side assert", "misaligned address")


class Bench:
    """One step's device, record and state."""

    def __init__(self, device: str, record: Record, state: Mapping[str, Any]) -> None:
        self.on, self.record = device_named(device), record
        self.device, self.small = self.on.device, self.on.small
        self._wrong = {tuple(pair) for pair in state.get("wrong", ())}
        torch.manual_seed(0)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype).mul_(scale)

    def ids(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, device=self.device)

    def attempt(self, case: str, contender: str, function: Function, ours: bool) -> Any:
        """The function's result; None where it raised, which is written down. `ours`: then that is a failure."""
        try:
            return function()
        except Exception as error:
            print(f"{case}, {contender}:\n{traceback.format_exc()}", flush=True)  # into the step's log
            message = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            if ours:
                self.record.row("failed", case=case, contender=contender, error=f"{type(error).__name__}: {message}")
            else:
                self.record.note(f"{case}, {contender} did not run: {message}")
            if any(words in str(error) for words in _STICKY):
                raise
        return None

    def compare(
        self,
        operator: str,
        case: str,
        contenders: Mapping[str, Callable[[], Sequence[Function]]],
        *,
        bytes: float = 0,
        flops: float = 0,
        uncaptured: Sequence[str] = (),
    ) -> None:
        """Times each contender: a function that makes the calls to be taken in turns, on inputs of their own.

        Contenders that are fastdiff's backends are run on these, and left out where they were found to be wrong.
        `uncaptured`: contenders that wait for the device, which no CUDA graph can hold.
        """
        for name, make in contenders.items():

            def timed(make: Callable = make, name: str = name) -> tuple[float, str]:
                return self.on.seconds(make(), capturable=name not in uncaptured)

            backend = name if name in self.on.backends else None
            self._timed((operator,), case, name, backend, timed, bytes, flops)

    def by_the_clock(
        self,
        operators: Sequence[str],
        case: str,
        contender: str,
        seconds: Callable[[], float],
        *,
        backend: str | None = None,
        note: str = "wall",
    ) -> None:
        """Writes down what `seconds` measures by the host's clock.

        `backend` is the one of fastdiff's that these operators run on, by the report's name; None where none does.
        """
        self._timed(operators, case, contender, backend, lambda: (seconds(), note))

    def _timed(self, operators, case, contender, backend, measure, bytes=0, flops=0) -> None:
        wrong = [operator for operator in operators if (operator, backend) in self._wrong]
        if wrong:
            self.record.note(f"{case}, {contender}: not timed, since {wrong[0]} computes wrong results on {backend}")
            return

        def measured() -> tuple[float, str]:
            with use_backend("auto" if backend is None else self.on.backends[backend]):
                return measure()

        result = self.attempt(case, contender, measured, ours=backend is not None)
        if result is not None:
            seconds, note = result
            self.record.row(
                "time", case=case, contender=contender, seconds=seconds, bytes=bytes, flops=flops, note=note
            )
        self.on.forget()
