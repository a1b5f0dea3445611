"""Which backend can run which operator, and why not.

A backend is asked for by name through `use_backend("cpu")` or the environment variable FASTDIFF_BACKEND; without
either, `auto` takes `cuda` or `triton` on a GPU, `cpu` on a CPU, and `reference` where nothing else can run.
A backend that was asked for by name and cannot run raises `BackendError` with its reasons.

The choice is a context variable: each thread and each asyncio task has its own, and one that starts later begins with
FASTDIFF_BACKEND's (a task with that of the code that made it). An operator reads it once a call; its backward pass runs
on the backend of its forward pass, whichever of autograd's threads that is in.
"""

import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from fastdiff.errors import BackendError

BACKENDS = ("reference", "cpu", "cuda", "triton")  # every name that can be asked for, beside "auto"
_AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}  # by device type


@dataclass(frozen=True)
class Backend:
    """One operator's entry for one backend."""

    missing: str | None  # what stands in the way in this installation, whatever the input: one sentence, or None
    # what stands in the way for an input (device type, dtypes): one sentence, or None
    refuses: Callable[[str, tuple[torch.dtype, ...]], str | None]


Refuses = Callable[[str], str | None]
P, R = ParamSpec("P"), TypeVar("R")
_registry: dict[str, dict[str, Backend]] = {}
_selected: dict[tuple, str] = {}  # what select() found before


def register(operator: str, backend: str, entry: Backend) -> None:
    """Adds one operator's entry for one backend; `fastdiff.ops` calls it at import."""
    assert backend in BACKENDS, backend
    _registry.setdefault(operator, {})[backend] = entry
    _selected.clear()


def _checked(name: str, where: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; expected one of {', '.join(('auto', *BACKENDS))}")
    return name


_FIRST = _checked(os.environ.get("FASTDIFF_BACKEND") or "auto", "FASTDIFF_BACKEND")
_choice: ContextVar[str] = ContextVar("_choice", default=_FIRST)
_this_module = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    """`backends.current` is the context variable's value: torch.compile can guard on a module's attribute."""
    if name == "current":
        return _choice.get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def requested() -> str:
    """The backend asked for: by `use_backend`, else by FASTDIFF_BACKEND, else "auto"."""
    return _this_module.current


class use_backend:
    """Runs the operators on one backend: "auto", "reference", "cpu", "cuda" or "triton".

    `use_backend("triton")` holds from the call on, in this thread (or asyncio task) alone; FASTDIFF_BACKEND holds for a
    whole process. `with use_backend("triton"):` gives back at its end what was chosen before the call. A function that
    torch.compile compiles as a whole (fullgraph=True) is called under it, and does not call it.

    Raises ValueError at the call for an unknown name. The operators raise `BackendError` where that backend cannot run.
    """

    def __init__(self, name: str):
        self._name, self._before = _checked(name, "use_backend"), _choice.get()
        _choice.set(name)

    def __enter__(self) -> None:
        _choice.set(self._name)

    def __exit__(self, *error: object) -> None:
        _choice.set(self._before)


def with_this_backend(function: Callable[P, R]) -> Callable[P, R]:
    """The function, always run with the backend that is asked for now: what a checkpoint computes again, later, in one
    of autograd's threads."""
    if torch.compiler.is_compiling():  # there the choice is a constant of the compiled code
        return function
    name = requested()

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with use_backend(name):
            return function(*args, **kwargs)

    return run


def select(
    operator: str, device: str, dtypes: tuple[torch.dtype, ...], refuses: Refuses | None = None, name: str | None = None
) -> str:
    """The backend that runs an operator for an input on `device` ("cpu", "cuda") with these dtypes.

    `refuses(backend)` is one more reason for which a backend cannot run (a head size): one sentence, or None. `name` is
    `requested()` where the caller has read it.
    """
    name = requested() if name is None else name
    if torch.compiler.is_compiling() or refuses is not None:  # a cache would be state that the compiler has to watch
        return _search(name, operator, device, dtypes, refuses)
    key = (name, operator, device, dtypes)
    found = _selected.get(key)
    if found is None:
        found = _selected[key] = _search(name, operator, device, dtypes)
    return found


def _search(
    name: str, operator: str, device: str, dtypes: tuple[torch.dtype, ...], refuses: Refuses | None = None
) -> str:
    def why(backend: str) -> str | None:
        return why_not(operator, backend, device, dtypes) or (refuses(backend) if refuses is not None else None)

    if name != "auto":
        reason = why(name)
        if reason is not None:
            raise BackendError(f"fastdiff.{operator}: backend {name!r} was asked for and cannot run: {reason}")
        return name
    for candidate in _AUTO_ORDER.get(device, ("reference",)):
        if why(candidate) is None:
            missing = _registry[operator]["cpu"].missing if candidate == "reference" and device == "cpu" else None
            if missing is not None and not torch.compiler.is_compiling():
                warnings.warn(f"fastdiff.{operator} runs on slow reference operators: {missing}", stacklevel=5)
            return candidate
    raise BackendError(f"fastdiff.{operator}: no backend runs {dtypes} on {device!r}")


def why_not(operator: str, backend: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why a backend cannot run an operator on this input: one sentence, or None where it can."""
    entry = _registry[operator].get(backend)
    if entry is None:
        return "this operator has no such backend"
    return entry.missing if entry.missing is not None else entry.refuses(device, dtypes)


def table() -> dict[str, dict[str, str | None]]:
    """Every operator and backend of this build: why it cannot run in this installation, or None where it can."""
    return {op: {name: entry.missing for name, entry in entries.items()} for op, entries in _registry.items()}
