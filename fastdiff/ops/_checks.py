"""What public functions share: the choice of a backend where torch transforms a call, and autograd's small print."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff.backends import BackendError, requested, select


def choose_backend(operator: str, device: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """The backend that runs a differentiable operator; inside a torch.func transform that is the reference.

    Kernels have no rule for forward-mode AD, vmap or torch.func.grad; the reference is plain PyTorch.
    """
    if not torch.compiler.is_compiling() and transformed():
        if requested() not in ("auto", "reference"):
            reason = "it has no rules for torch.func transforms and forward-mode AD: use 'auto' or 'reference'"
            raise BackendError(f"fastdiff.{operator}: backend {requested()!r} was asked for and cannot run: {reason}")
        return "reference"
    return select(operator, device, dtypes)


def transformed() -> bool:
    """Inside torch.func.grad, vmap or jvp, or with forward-mode AD on."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records this call because of one of them."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def distinct(args: tuple) -> list:
    """The same tensor given twice becomes two: torch.compile takes no duplicates in an autograd.Function."""
    result = []
    for value in args:
        if isinstance(value, Tensor) and any(value is other for other in result):
            value = value.view_as(value)
        result.append(value)
    return result
