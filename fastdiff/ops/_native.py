"""Loads the compiled modules once and says in one sentence what is missing where they cannot be loaded."""

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from fastdiff.tuning import apply_sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what every native operator takes


def _load(name: str, how_to_get_it: str) -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(name) is None:
        return None, how_to_get_it
    try:
        return importlib.import_module(name), None
    except (ImportError, OSError) as error:
        return None, f"{name} was built but does not load: {str(error).splitlines()[0]}"


cpu_module, cpu_missing = _load("fastdiff._C", "fastdiff._C was not built; run: pip install -e . --no-build-isolation")
if cpu_module is not None and cpu_module.isa_error():
    raise ValueError(cpu_module.isa_error())
if cpu_module is not None:
    apply_sizes(cpu_module)
cuda_module, cuda_missing = _load(
    "fastdiff._C_cuda", "this build has no CUDA module; build it with nvcc: FASTDIFF_CUDA=1 pip install -e ."
)


def why_no_operator(name: str) -> str | None:
    """Why fastdiff._C does not have an operator: it is missing, or older than the source. None where it has it."""
    if cpu_missing is None and not hasattr(torch.ops.fastdiff, name):
        return f"fastdiff._C is older than its source and has no {name}; run: pip install -e . --no-build-isolation"
    return cpu_missing


TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
triton_missing = None if importlib.util.find_spec("triton") else "Triton is not installed; run: pip install triton"


def _dtype_reason(dtypes: tuple[torch.dtype, ...]) -> str | None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


def refuses_cpu(device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The native CPU kernels; float64 goes through the scalar kernel when every operand is float64."""
    if device != "cpu":
        return f"the tensors are on {device!r}, expected 'cpu'"
    return None if all(dtype == torch.float64 for dtype in dtypes) else _dtype_reason(dtypes)


def refuses_cpu_float64(device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The native CPU kernels of operators without a scalar kernel."""
    return f"the tensors are on {device!r}, expected 'cpu'" if device != "cpu" else _dtype_reason(dtypes)


def refuses_cuda(device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The native CUDA kernels."""
    return f"the tensors are on {device!r}, expected 'cuda'" if device != "cuda" else _dtype_reason(dtypes)


def refuses_triton(device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The Triton kernels; on CPU tensors only in Triton's interpreter."""
    if device != "cuda" and not TRITON_INTERPRET:
        return f"the tensors are on {device!r}, expected 'cuda' (or TRITON_INTERPRET=1 to run Triton's interpreter)"
    return _dtype_reason(dtypes)


def refuses_nothing(device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reference: plain PyTorch."""
    return None
