"""Makes an operator's native and Triton implementations callable, and known to torch.compile."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch

from fastdiff.backends import Backend, register
from fastdiff.ops import _native

# Kept alive for the life of the process: operators vanish with their Library object.
_triton_library = torch.library.Library("fastdiff_triton", "DEF")


def implementations(
    schemas: dict[str, str], fakes: dict[str, Callable], triton_module: str
) -> dict[str, SimpleNamespace]:
    """The operators `schemas` names, by backend: fastdiff::name for "cpu" and "cuda", fastdiff_triton::name.

    The native operators are defined in csrc/ with the same schemas (a test compares them); the Triton ones are opaque
    operators around the launchers of the same names in `triton_module`, so that torch.compile sees what it sees of the
    native ones. Backends that are missing are left out.
    """
    found = {}
    if _native.cpu_missing is None:  # without fastdiff._C the operators are not defined
        for name in schemas:
            register_fake(f"fastdiff::{name}", fakes[name])
        native = SimpleNamespace(**{name: getattr(torch.ops.fastdiff, name).default for name in schemas})
        found["cpu"] = found["cuda"] = native
    if _native.triton_missing is None:
        for name, schema in schemas.items():
            _triton_library.define(name + schema)
            _triton_library.impl(name, _triton_launcher(triton_module, name), "CompositeExplicitAutograd")
            register_fake(f"fastdiff_triton::{name}", fakes[name], lib=_triton_library)
        found["triton"] = SimpleNamespace(
            **{name: getattr(torch.ops.fastdiff_triton, name).default for name in schemas}
        )
    return found


def register_fake(name: str, fake: Callable, lib: torch.library.Library | None = None) -> None:
    """As torch.library's; one operand on the meta device among others is refused: torch would call `fake` instead of
    the kernel, and an operator that works in place would do nothing without a word."""

    def on_one_device(*args):
        devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"{name}: got operands on {found}; expected one device: move them")
        return fake(*args)

    torch.library.register_fake(name, on_one_device, lib=lib)


def _triton_launcher(module: str, name: str) -> Callable:
    def launch(*args):
        return getattr(importlib.import_module(module), name)(*args)  # imports Triton, at the first call

    return launch


def register_backends(operator: str, cpu_takes_float64: bool = False) -> None:
    """Adds an operator with the four usual backends to the registry.

    `cpu_takes_float64`: whether its CPU kernel runs float64 where every operand is float64.
    """
    register(operator, "reference", Backend(None, _native.refuses_nothing))
    cpu = _native.refuses_cpu if cpu_takes_float64 else _native.refuses_cpu_float64
    register(operator, "cpu", Backend(_native.cpu_missing, cpu))
    register(operator, "cuda", Backend(_native.cpu_missing or _native.cuda_missing, _native.refuses_cuda))
    register(operator, "triton", Backend(_native.triton_missing, _native.refuses_triton))
