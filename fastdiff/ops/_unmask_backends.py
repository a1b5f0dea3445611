"""unmask_'s backends as seen from Python: the native operator, its fake kernel, and the Triton launcher.

    unmask_(token_ids, token, log_prob, entropy, margin, rows, block_start, block_end, active, rule, order, values,
        value, mask_token_id, seeds, seed, steps, step, sequence_ids) -> committed

token_ids is int64 [B, L] with a contiguous last dimension, changed in place; token (int64), log_prob, entropy and margin
(float32) are contiguous, [B, L], or [R] where rows is given; values is float32 [B], or None for `value`; rule and order
are the numbers of UnmaskRule and UnmaskOrder in kernels/token_sampling/token_sampling.h; seeds and steps have one
element, or are None for `seed` and `step`; the rest is int64 [B], active bool [B], or None.
"""

import torch

from fastdiff.backends import Backend, register
from fastdiff.ops import _native

# The same schema is written in csrc/unmask.h; a test compares them.
SCHEMA = (
    "(Tensor(a!) token_ids, Tensor token, Tensor log_prob, Tensor entropy, Tensor margin, Tensor? rows, "
    "Tensor? block_start, Tensor? block_end, Tensor? active, int rule, int order, Tensor? values, float value, "
    "int mask_token_id, Tensor? seeds, int seed, Tensor? steps, int step, Tensor? sequence_ids) -> Tensor"
)
IMPLEMENTATIONS = {}


def _fake(token_ids, *args):
    return token_ids.new_empty(token_ids.shape[0])


def _register_native() -> None:
    if _native.cpu_missing is not None:
        return  # without fastdiff._C the operator is not defined
    torch.library.register_fake("fastdiff::unmask_", _fake)
    IMPLEMENTATIONS["cpu"] = IMPLEMENTATIONS["cuda"] = torch.ops.fastdiff.unmask_.default


# Kept alive for the life of the process: operators vanish with their Library object.
_triton_library = torch.library.Library("fastdiff_triton", "FRAGMENT")


def _launch(*args):
    from fastdiff.kernels.token_sampling import triton_kernels  # imports Triton, at the first call

    return triton_kernels.unmask_(*args)


def _register_triton() -> None:
    """An opaque operator around the Triton launcher, so that torch.compile sees what it sees of the native one."""
    if _native.triton_missing is not None:
        return
    _triton_library.define("unmask_" + SCHEMA)
    _triton_library.impl("unmask_", _launch, "CompositeExplicitAutograd")
    torch.library.register_fake("fastdiff_triton::unmask_", _fake, lib=_triton_library)
    IMPLEMENTATIONS["triton"] = torch.ops.fastdiff_triton.unmask_.default


def _float32(refuses):
    """refuses(device, dtypes), and float64 too: it is for the reference."""

    def refusal(device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
        wide = "it takes float32 scores, not float64" if torch.float64 in dtypes else None
        return refuses(device, (torch.float32,)) or wide

    return refusal


_register_native()
_register_triton()
register("unmask_", "reference", Backend(None, _native.refuses_nothing))
register("unmask_", "cpu", Backend(_native.cpu_missing, _float32(_native.refuses_cpu)))
register("unmask_", "cuda", Backend(_native.cpu_missing or _native.cuda_missing, _float32(_native.refuses_cuda)))
register("unmask_", "triton", Backend(_native.triton_missing, _float32(_native.refuses_triton)))
