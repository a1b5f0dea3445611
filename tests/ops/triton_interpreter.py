"""Triton's interpreter for tests: its bf16 mended, memory accesses checked, programs in any order.

Import it in a process that was started with TRITON_INTERPRET=1. Written for Triton 3.6 to 3.9, whose interpreter
truncates fp32 to bf16, multiplies matrices of bf16 as if their bits were integers, reads and writes out of bounds
without a word, and runs programs in the order of the grid.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Index = tuple[int, int, int]


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 bit patterns, to nearest even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def mend_bf16_rounding() -> None:
    """Makes fp32 -> bf16 casts round to nearest even, as a GPU does, for the rest of the process."""
    original = interpreter._convert_float
    if getattr(original, "mended", False):
        return

    def convert(values, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            return _round_to_bf16(values)
        return original(values, source, target, rounding_mode)

    convert.mended = True
    interpreter._convert_float = convert


def mend_bf16_products() -> None:
    """Makes tl.dot of bf16 multiply numbers, in fp32, for the rest of the process."""
    original = interpreter.InterpreterBuilder.create_dot
    if getattr(original, "mended", False):
        return

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = np.ascontiguousarray(operand.data).view(np.uint16)
        return interpreter.TensorHandle(torch.from_numpy(bits).view(torch.bfloat16).float().numpy(), tl.float32)

    def create_dot(self, a, b, *rest):
        return original(self, widened(a), widened(b), *rest)

    create_dot.mended = True
    interpreter.InterpreterBuilder.create_dot = create_dot


def mend_indices() -> None:
    """Lets Triton 3.6 count with its scalars, arrays of one element, which NumPy 2.4 refuses to take for numbers."""
    original = interpreter._patch_lang_tensor
    if getattr(original, "mended", False):
        return

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.mended = True
    interpreter._patch_lang_tensor = patch


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and past-the-last byte that the tensor's own elements cover; the rest of its storage is out of bounds."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


class _CheckedMemory:
    """Stands for the interpreter's loads and stores, and checks every active lane against the launch's tensors."""

    def __init__(self, original):
        self.original, self.extents = original, []

    def __getattr__(self, name):
        return getattr(self.original, name)

    def _check(self, pointers, mask, what: str) -> None:
        active = np.asarray(pointers).ravel()[np.asarray(mask).ravel().astype(bool)].astype(np.uint64)
        inside = np.zeros(active.shape, dtype=bool)
        for start, end in self.extents:
            inside |= (active >= start) & (active < end)
        if not inside.all():
            program = interpreter.interpreter_builder.grid_idx
            raise IndexError(f"{what} of {int((~inside).sum())} elements out of bounds in program {program}")

    def load(self, pointers, mask, *rest):
        self._check(pointers, mask, "load")
        return self.original.load(pointers, mask, *rest)

    def store(self, pointers, values, mask, *rest):
        self._check(pointers, mask, "store")
        return self.original.store(pointers, values, mask, *rest)


@contextlib.contextmanager
def checked_memory() -> Iterator[None]:
    """Within the block an access outside of the tensors that a launch was given fails the launch (InterpreterError)."""
    original, call = interpreter._interpreter, interpreter.GridExecutor.__call__
    checked = _CheckedMemory(original)

    def checked_call(self, *args, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        checked.extents = [_extent(tensor) for tensor in tensors]
        return call(self, *args, **kwargs)

    interpreter._interpreter, interpreter.GridExecutor.__call__ = checked, checked_call
    try:
        yield
    finally:
        interpreter._interpreter, interpreter.GridExecutor.__call__ = original, call


@contextlib.contextmanager
def programs(choose: Callable[[Index], Sequence[Index]]) -> Iterator[None]:
    """Within the block a launch runs the programs that `choose` names, given the grid, in that order.

    Tensors on the CPU are not copied back onto themselves, so that huge ones stay untouched where nothing writes.
    """
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    originals = executor.__init__, executor._restore_args_dev, builder.set_grid_idx
    chosen: list[Index] = []

    def __init__(self, fn, arg_names, grid, *rest):
        chosen[:] = choose((*grid, 1, 1)[:3])
        originals[0](self, fn, arg_names, (len(chosen),), *rest)

    def set_grid_idx(self, x, y, z):
        self.grid_idx = chosen[x]

    executor.__init__, builder.set_grid_idx = __init__, set_grid_idx
    executor._restore_args_dev = lambda *args: None
    try:
        yield
    finally:
        executor.__init__, executor._restore_args_dev, builder.set_grid_idx = originals


def shuffled(seed: int) -> Callable[[Index], list[Index]]:
    """All programs in a random order, for `programs`."""

    def choose(grid: Index) -> list[Index]:
        indices = list(itertools.product(*map(range, grid)))
        random.Random(seed).shuffle(indices)
        return indices

    return choose
