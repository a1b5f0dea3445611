"""Tensors that the caller gives for an operator to write: what they must be, and autograd's notice of it."""

import torch
from torch import Tensor


def check_out(name: str, out: Tensor | None, like: Tensor, dtype: torch.dtype, grad: bool) -> torch.dtype:
    """`dtype`, once `out` is None or can take a result of the shape and device of `like`.

    Raises TypeError or ValueError, naming the argument, where it cannot, or where a gradient is wanted (`grad`).
    """
    if out is None:
        return dtype
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: got a {type(out).__name__}; expected a torch.Tensor")
    if out.shape != like.shape or out.dtype != dtype or out.device != like.device or not out.is_contiguous():
        expected = f"expected contiguous {list(like.shape)} {dtype} on {like.device}"
        raise ValueError(f"{name}: got {list(out.shape)} {out.dtype} on {out.device}; {expected}")
    if grad or (out.requires_grad and torch.is_grad_enabled()):
        raise ValueError(f"{name}: got one while a gradient is wanted; use torch.no_grad() or leave {name} out")
    return dtype


def check_apart(
    outputs: tuple[tuple[str, Tensor], ...], streams: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]
) -> None:
    """Raises ValueError where an output would be written before something else of the call is read.

    It may be one of the streams, whose rows are read before they are written, or lie apart from all that is read.
    """
    if torch.compiler.is_compiling():
        return  # no addresses there; functionalisation gives outputs of their own
    for index, (name, out) in enumerate(outputs):
        begin, end = _bytes_of(out)
        apart = [
            t
            for t in streams
            if t is not None and (_bytes_of(t) != (begin, end) or t.dtype != out.dtype or not t.is_contiguous())
        ]
        for t in (*apart, *others, *(other for _, other in outputs[:index])):
            if t is not None and _bytes_of(t)[0] < end and begin < _bytes_of(t)[1]:
                raise ValueError(f"{name}: got memory that another tensor of the call shares; pass a tensor of its own")


def written(out: Tensor) -> None:
    """Tells autograd that a tensor was written, so that a graph that had saved it does not use the new values."""
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _bytes_of(t: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to the end of its last."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
