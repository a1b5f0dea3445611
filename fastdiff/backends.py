"""Which backend can run which operator, and why not.

A backend is asked for by name through `use_backend("cpu")` or the environment variable FASTDIFF_BACKEND; without
either, `auto` takes `cuda` or `triton` on a GPU, `cpu` on a CPU, and `reference` where nothing else can run.
A backend that was asked for by name and cannot run raises `BackendError` with its reasons.

The choice is one plain global, so that torch.compile can guard on it: it holds for the whole process, threads included.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

BACKENDS = ("reference", "cpu", "cuda", "triton")  # every name that can be asked for, beside "auto"
_AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}  # by device type


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message lists its reasons."""


@dataclass(frozen=True)
class Backend:
    """One operator's entry for one backend."""

    missing: str | None  # what stands in the way in this installation, whatever the input: one sentence, or None
    # what stands in the way for an input (device type, dtypes): one sentence, or None
    refuses: Callable[[str, tuple[torch.dtype, ...]], str | None]


Refuses = Callable[[str], str | None]
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


_requested = _checked(os.environ.get("FASTDIFF_BACKEND") or "auto", "FASTDIFF_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the operators inside the block on one backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises ValueError for an unknown name; the operators raise `BackendError` where that backend cannot run.
    """
    global _requested
    before, _requested = _requested, _checked(name, "use_backend")
    try:
        yield
    finally:
        _requested = before


def requested() -> str:
    """The backend asked for: by `use_backend`, else by FASTDIFF_BACKEND, else "auto"."""
    return _requested


def select(operator: str, device: str, dtypes: tuple[torch.dtype, ...], refuses: Refuses | None = None) -> str:
    """The backend that runs an operator for an input on `device` ("cpu", "cuda") with these dtypes.

    `refuses(backend)` is one more reason for which a backend cannot run (a head size): one sentence, or None.
    """
    if torch.compiler.is_compiling() or refuses is not None:  # a cache would be state that the compiler has to watch
        return _search(operator, device, dtypes, refuses)
    key = (_requested, operator, device, dtypes)
    found = _selected.get(key)
    if found is None:
        found = _selected[key] = _search(operator, device, dtypes)
    return found


def _search(operator: str, device: str, dtypes: tuple[torch.dtype, ...], refuses: Refuses | None = None) -> str:
    def why(backend: str) -> str | None:
        return why_not(operator, backend, device, dtypes) or (refuses(backend) if refuses is not None else None)

    if _requested != "auto":
        reason = why(_requested)
        if reason is not None:
            raise BackendError(f"fastdiff.{operator}: backend {_requested!r} was asked for and cannot run: {reason}")
        return _requested
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
