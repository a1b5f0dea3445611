"""unmask_'s CUDA launch function in the emulator, called with torch tensors on the CPU."""

import ctypes

import torch
from torch import Tensor

from emulator import Emulator, pointer

RULES = ("count", "threshold", "factor", "entropy_budget", "ancestral")  # as in unmask.h
ORDERS = ("confidence", "margin", "entropy", "random")
_P, _I = ctypes.c_void_p, ctypes.c_int64


class UnmaskParams(ctypes.Structure):
    _fields_ = [
        ("token_ids", _P),
        *((name, _I) for name in ("row_stride", "batch", "length")),
        *((name, _P) for name in ("token", "log_prob", "entropy", "margin", "rows")),
        ("row_count", _I),
        *((name, _P) for name in ("block_start", "block_end", "active", "values")),
        ("value", ctypes.c_double),
        *((name, _P) for name in ("seed_at", "step_at", "sequence_ids")),
        *((name, _I) for name in ("seed", "step", "mask_token_id")),
        *((name, _P) for name in ("committed", "workspace")),
        *((name, ctypes.c_int32) for name in ("rule", "order")),
    ]


def unmask(
    emulator: Emulator,
    token_ids: Tensor,  # int64 [B, L], written
    sample: tuple[Tensor, Tensor, Tensor, Tensor],  # token, log_prob, entropy, margin: [B, L] or [R]
    mask_token_id: int,
    rule: str,
    order: str,
    value: float | Tensor,  # a number, or float32 [B]
    *,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    **tensors: Tensor,  # rows, block_start, block_end, active, sequence_ids
) -> Tensor:  # [B]
    """committed; it starts as -77, and the workspace as what no index may be."""
    lib = emulator.lib
    lib.fd_unmask_workspace_bytes.restype = ctypes.c_long
    assert ctypes.sizeof(UnmaskParams) == lib.fd_size_of_unmask_params()
    committed = torch.full(token_ids.shape[:1], -77)
    token, log_prob, entropy, margin = (t.contiguous() for t in sample)
    rows = tensors.get("rows")
    p = UnmaskParams(
        token_ids=pointer(token_ids), row_stride=token_ids.stride(0), batch=token_ids.shape[0],
        length=token_ids.shape[1], token=pointer(token), log_prob=pointer(log_prob), entropy=pointer(entropy),
        margin=pointer(margin), rows=pointer(rows), row_count=0 if rows is None else len(rows),
        mask_token_id=mask_token_id, committed=pointer(committed), rule=RULES.index(rule), order=ORDERS.index(order),
        **{k: pointer(tensors.get(k)) for k in ("block_start", "block_end", "active", "sequence_ids")},
    )  # fmt: skip
    for name, at, number in (("value", "values", value), ("seed", "seed_at", seed), ("step", "step_at", step)):
        if isinstance(number, Tensor):
            setattr(p, at, pointer(number))
        else:
            setattr(p, name, number)
    workspace = torch.full((lib.fd_unmask_workspace_bytes(ctypes.byref(p)) // 4,), 0x7FFFFFFF, dtype=torch.int32)
    p.workspace = pointer(workspace) if workspace.numel() else None
    emulator.check(lib.fd_unmask(ctypes.byref(p)))
    return committed
