"""On which device and in which precision a model runs, and in which mode."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def check_device(device: torch.device | str | None) -> torch.device:
    """A device that this machine has; None takes a GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = "expected cpu" + (", or cuda" if torch.cuda.is_available() else ": this machine has no usable GPU")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):  # also of a PyTorch built without CUDA
        raise ValueError(f"device: got {str(device)!r}; {expected}") from None
    if found.type == "meta":  # it computes nothing
        raise ValueError(f"device: got {str(device)!r}; {expected}")
    return found


def check_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point dtype by itself or its name; None stays None. Raises ValueError for another."""
    found = dtype if isinstance(dtype, torch.dtype | None) else getattr(torch, dtype, None)
    if found not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64) or (dtype and not found):
        raise ValueError(f"dtype: got {dtype!r}; expected float32, bfloat16 or float16")
    return found


def computes_bf16(device_type: str) -> bool:
    """Whether a device has instructions for bfloat16 matrix products (without them bf16 is slower than float32)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_dtype(mixed_precision: str, device_type: str) -> torch.dtype | None:
    """In which type a run's `training.mixed_precision` ("auto", "bf16" or "no") computes on a device; None: float32."""
    bf16 = mixed_precision == "bf16" or (mixed_precision == "auto" and computes_bf16(device_type))
    return torch.bfloat16 if bf16 else None


def autocast(device: torch.device | str, dtype: torch.dtype | None) -> torch.autocast:
    """A block in which models compute in `dtype` on a device; None: in the dtype of their weights."""
    return torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in eval mode; afterwards it is in the mode that it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
