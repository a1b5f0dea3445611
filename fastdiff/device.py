"""On which device and in which precision a model runs, and in which mode."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff import tuning

PRECISIONS = ("bf16", "no")  # accelerate's names of what "auto" chooses from
_TRIED_PRODUCTS = 3  # of a model: those in which it spends most


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


def autocast_dtype(mixed_precision: str, device_type: str, model: nn.Module | None = None) -> torch.dtype | None:
    """In which type a run's `training.mixed_precision` ("auto", "bf16" or "no") computes on a device; None: float32.

    "auto" is bfloat16 where the device has instructions for it. On a CPU that has them it is what the run was trained
    in (`fastdiff.tuning.using`), or where choices are the machine's (`fastdiff.tuning.measuring`) that in which the
    largest matrix products of `model` are faster.
    """
    if mixed_precision == "auto":
        mixed_precision = "bf16" if computes_bf16(device_type) else "no"
        if device_type == "cpu":
            chosen = tuning.made("mixed_precision", PRECISIONS)
            if chosen is None and mixed_precision == "bf16" and model is not None and tuning.may_measure():
                chosen = precision_of_products(model).chosen
            mixed_precision = chosen or mixed_precision
    return torch.bfloat16 if mixed_precision == "bf16" else None


def precision_of_products(model: nn.Module) -> tuning.Measured:
    """bf16 or no: in which the linear layers of a model that hold most of its weights are faster on this CPU."""
    shapes = Counter((each.out_features, each.in_features) for each in model.modules() if isinstance(each, nn.Linear))
    largest = sorted(shapes, key=lambda shape: shape[0] * shape[1] * shapes[shape], reverse=True)[:_TRIED_PRODUCTS]
    if not largest:
        return tuning.Measured("bf16")
    counts = [(*shape, shapes[shape]) for shape in largest]
    about = ", ".join(f"{count} of {inputs} x {outputs}" for outputs, inputs, count in counts)
    digest = hashlib.sha256(about.encode()).hexdigest()[:6]
    first = about.split(",")[0]
    return tuning.answer(
        f"precision of products {digest}, {first}, …", "bf16", lambda: _measure_products(counts), PRECISIONS
    )


@torch.no_grad()
def _measure_products(shapes: list[tuple[int, int, int]]) -> tuning.Measured:
    """Both precisions as autocast has them: weights and inputs are float32, and rounded at each product."""
    total = dict.fromkeys(PRECISIONS, 0.0)
    for outputs, inputs, count in shapes:
        rows = min(max(2**28 // (outputs * inputs), 256), 2048)
        source = torch.Generator().manual_seed(0)
        x, weight = (
            torch.randn(n, inputs, generator=source, dtype=torch.float32, device="cpu") for n in (rows, outputs)
        )

        def product(dtype: torch.dtype | None, x=x, weight=weight) -> None:
            with autocast("cpu", dtype):
                F.linear(x, weight)

        contenders = {"bf16": lambda run=product: run(torch.bfloat16), "no": lambda run=product: run(None)}
        for name, seconds in tuning.fastest(contenders, "bf16", seconds=0.15).seconds.items():
            total[name] += seconds * count
    return tuning.Measured("no" if total["no"] < (1 - tuning.MARGIN) * total["bf16"] else "bf16", total)


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
