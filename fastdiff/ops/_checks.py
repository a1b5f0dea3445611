"""What public functions share: checks of arguments, the choice of a backend in a transform, autograd's small print."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastdiff.backends import BackendError, requested, select

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def choose_backend(
    operator: str, device: str, dtypes: tuple[torch.dtype, ...], refuses: Callable[[str], str | None] | None = None
) -> str:
    """The backend that runs a differentiable operator; inside a torch.func transform that is the reference.

    Kernels have no rule for forward-mode AD, vmap or torch.func.grad; the reference is plain PyTorch. `refuses` says
    why a backend cannot run for a reason other than device and dtypes.
    """
    name = requested()
    if not torch.compiler.is_compiling() and transformed():
        if name not in ("auto", "reference"):
            reason = "it has no rules for torch.func transforms and forward-mode AD: use 'auto' or 'reference'"
            raise BackendError(f"fastdiff.{operator}: backend {name!r} was asked for and cannot run: {reason}")
        return "reference"
    return select(operator, device, dtypes, refuses, name)


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


def check_floats(name: str, t: Tensor, least: int) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got a {type(t).__name__}; expected a torch.Tensor")
    if t.dtype not in _DTYPES:
        raise ValueError(f"{name}: got {t.dtype}; expected float32, bfloat16, float16 or float64")
    if t.layout != torch.strided or t.device.type == "meta":
        raise ValueError(f"{name}: got {t.layout} on {t.device}; expected a dense tensor with data")
    if t.ndim < least:
        raise ValueError(f"{name}: got shape {list(t.shape)}; expected at least {least} dimension(s)")


def check_integers(name: str, t: Tensor, device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got a {type(t).__name__}; expected an int64 torch.Tensor")
    if t.dtype != torch.int64:
        raise ValueError(f"{name}: got {t.dtype}; expected int64")
    if t.device != device:
        raise ValueError(f"{name}: got one on {t.device}, the input on {device}; expected one device: move one of them")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floats("weight", weight, 2)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}; expected [V, {hidden.shape[-1]}] with V > 0")
    if bias is not None:
        check_floats("bias", bias, 1)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: got shape {list(bias.shape)}; expected [{weight.shape[0]}]")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != hidden.device:
            raise ValueError(
                f"{name}: got one on {t.device}, hidden on {hidden.device}; expected one device: move one of them"
            )
        if t.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise ValueError(
                f"{name}: got {t.dtype}, with {hidden.dtype} of hidden; expected one dtype: cast one of them"
            )


def autocast_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which autocast has a matrix product of t made; t's own where it is off."""
    device = t.device.type
    if t.dtype == torch.float64 or (device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device)):
        return t.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    dtype = autocast_dtype(tensors[0])
    return [None if t is None else t.to(dtype) for t in tensors]


def counter(name: str, value: int | Tensor, device: torch.device, words: int = 2) -> tuple[Tensor | None, int]:
    """(int64 tensor of one number, 0), or (None, an int): part of a key or counter of Philox.

    `words` is how many 32-bit words of it count: 2 for a seed; 1 for a step, of which an int must then be in [0, 2^32).
    """
    if isinstance(value, Tensor):
        check_integers(name, value, device)
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {list(value.shape)}; expected one number")
        return value.reshape(()), 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}; expected an int or an int64 tensor of one number")
    if words == 2 and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {value}; expected an int of 64 bits")
    if words == 1 and not 0 <= value < 2**32:
        raise ValueError(f"{name}: got {value}; expected an int from 0 to 2**32 - 1")
    return None, value


def token_ids(name: str, ids: Sequence[int] | Tensor | None, vocab: int, device: torch.device) -> Tensor | None:
    """Ascending int64 ids, each once, or None where there are none."""
    if ids is None:
        return None
    ids = _read_ids(name, ids, vocab, device)
    if isinstance(ids, Tensor):
        return ids
    if not ids and name == "suppress_tokens":
        return None
    return _ids_on(tuple(sorted(set(ids))), device)


def end_and_excluded_ids(
    end_token_ids: int | Sequence[int] | Tensor,
    suppress_tokens: Sequence[int] | Tensor | None,
    vocab: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The end tokens, and they and the suppressed ids together; ascending int64, each once.

    Raises where there is no end token, one is given twice, or one is suppressed.
    """
    if isinstance(end_token_ids, int) and not isinstance(end_token_ids, bool):
        end_token_ids = (end_token_ids,)
    end = _read_ids("end_token_ids", end_token_ids, vocab, device)
    suppressed = _read_ids("suppress_tokens", () if suppress_tokens is None else suppress_tokens, vocab, device)
    if len(end) == 0:
        raise ValueError("end_token_ids: got none; expected at least one id: the tokenizer's end of text, say")
    if isinstance(end, Tensor) or isinstance(suppressed, Tensor):
        ids = [t if isinstance(t, Tensor) else _ids_on(tuple(sorted(set(t))), device) for t in (end, suppressed)]
        return ids[0], torch.cat(ids).sort().values
    ends, excluded = set(end), {*end, *suppressed}
    if len(ends) < len(end):
        twice = next(i for i in end if end.count(i) > 1)
        raise ValueError(f"end_token_ids: got {twice} twice; expected each id once")
    if both := ends.intersection(suppressed):
        raise ValueError(f"end_token_ids: got {min(both)}, which suppress_tokens has too; take it out of one of them")
    return _ids_on(tuple(sorted(ends)), device), _ids_on(tuple(sorted(excluded)), device)


def _read_ids(name: str, ids: Sequence[int] | Tensor, vocab: int, device: torch.device) -> tuple[int, ...] | Tensor:
    """The ids as ints from 0 to vocab - 1; a tensor, in order, where it cannot be read."""
    if isinstance(ids, Tensor):
        check_integers(name, ids, device)
        if ids.ndim > 1:
            raise ValueError(f"{name}: got shape {list(ids.shape)}; expected one dimension")
        if torch.compiler.is_compiling() or torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # not checked here: the caller must pass unique ids below the vocabulary size
            return ids.reshape(-1).sort().values
        ids = ids.reshape(-1).tolist()
    if hasattr(ids, "tolist"):
        ids = ids.tolist()  # NumPy's
    if not isinstance(ids, Iterable) or isinstance(ids, str):
        raise TypeError(f"{name}: got {ids!r}; expected a list of ints or an int64 tensor")
    ids = tuple(ids)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"{name}: got an element of type {type(i).__name__}; expected ints")
        if not 0 <= i < vocab:
            raise ValueError(f"{name}: got {i}; expected ids from 0 to {vocab - 1}")
    return ids


def _ids_on(ids: tuple[int, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(ids, dtype=torch.int64, device=device)
    return _cached_ids(ids, device)


@lru_cache(maxsize=64)
def _cached_ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied to the device once: a copy at each call could not be captured in a graph."""
    return torch.tensor(ids, dtype=torch.int64, device=device)
