"""Checks of token ids and attention masks."""

import torch
from torch import Tensor


def check_token_ids(name: str, ids: Tensor, length: str = "L") -> None:
    """Raises TypeError for anything but an int64 tensor `[B, L]`; `length` is what the message calls L."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 2:
        got = f"{ids.dtype} of shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: got {got}; expected an int64 tensor [B, {length}]")


def bool_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> Tensor:
    """A mask of bool or 0/1 integers as bool, True = attend.

    Raises ValueError where its shape is none of `shapes`, TypeError for a floating-point mask, or no tensor.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got a {type(mask).__name__}; expected a torch.Tensor, True = attend")
    if mask.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: got shape {list(mask.shape)}; expected {expected}, True = attend")
    if mask.is_floating_point():
        raise TypeError(f"{name}: got {mask.dtype}; expected bool or 0/1 integers, True = attend")
    return mask.bool()
