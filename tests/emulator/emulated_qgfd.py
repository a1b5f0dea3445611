"""QGFD attention's CUDA launch functions in the emulator, and the operator under it in float64."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from emulator import DTYPES, Emulator, pointer

_P, _I = ctypes.c_void_p, ctypes.c_int64
PATHS = ("by_shape", "passes", "fused")  # as in qgfd_cuda.h
SHARED = 99 << 10  # what these kernels take at most: a block's on sm_86, sm_89 and sm_120


class Heads(ctypes.Structure):
    _fields_ = [("data", _P), *((name, _I) for name in ("batch_stride", "head_stride", "row_stride"))]


class Matrix(ctypes.Structure):
    _fields_ = [
        ("query", Heads),
        ("key", Heads),
        *((name, _P) for name in ("key_mask", "row_begin", "row_end")),
        *((name, _I) for name in ("begin_batch_stride", "end_batch_stride")),
        *((name, _I) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    ]


class Recurrence(ctypes.Structure):
    _fields_ = [*((name, _I) for name in ("hops", "first_mixed", "last_mixed")), ("alpha", ctypes.c_float)]


class ForwardParams(ctypes.Structure):
    _fields_ = [
        ("matrix", Matrix),
        ("recurrence", Recurrence),
        ("value", Heads),
        *((name, _P) for name in ("out", "lse", "passes", "workspace")),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        ("matrix", Matrix),
        ("recurrence", Recurrence),
        *((name, Heads) for name in ("value", "out", "grad_out")),
        *((name, _P) for name in ("lse", "passes", "grad_query", "grad_key", "grad_value", "workspace")),
    ]


@dataclass
class Case:
    """The arguments of the operator: query [B, H, L_q, d], key and value [B, H_kv, L_k, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None = None  # bool [B, L_k]
    row_begin: Tensor | None = None  # int32 [B or 1, L_q]
    row_end: Tensor | None = None
    scale: float = 0.3
    hops: int = 1
    mixed: range = range(0)
    alpha: float = 0.7

    @property
    def saved(self) -> int:
        return self.hops if self.hops in self.mixed else self.hops - 1

    def matrix(self) -> Matrix:
        batch, heads, queries, dim = self.query.shape
        return Matrix(
            heads_of(self.query), heads_of(self.key), pointer(self.key_mask), pointer(self.row_begin),
            pointer(self.row_end), _stride(self.row_begin), _stride(self.row_end), batch, heads, self.key.shape[1],
            queries, self.key.shape[2], dim, self.scale, DTYPES[self.query.dtype],
        )  # fmt: skip

    def recurrence(self) -> Recurrence:
        first, last = (self.mixed.start, self.mixed.stop - 1) if len(self.mixed) else (1, 0)
        return Recurrence(self.hops, first, last, self.alpha)


def heads_of(t: Tensor) -> Heads:
    return Heads(t.data_ptr(), *t.stride()[:3])


def _stride(bounds: Tensor | None) -> int:
    return 0 if bounds is None or bounds.shape[0] == 1 else bounds.shape[1]


def _workspace(size: int) -> Tensor:
    return torch.full((size,), 0xFF, dtype=torch.uint8)  # NaN


class QgfdEmulator:
    """Outputs and workspaces start as NaN."""

    def __init__(self, emulator: Emulator):
        self.emulator, self.lib = emulator, emulator.lib
        self.configure()
        for name in ("forward", "backward"):
            getattr(self.lib, f"fd_qgfd_{name}_workspace_bytes").restype = ctypes.c_long
        assert ctypes.sizeof(ForwardParams) == self.lib.fd_size_of_qgfd_forward_params()
        assert ctypes.sizeof(BackwardParams) == self.lib.fd_size_of_qgfd_backward_params()

    def configure(self, schedule: int = 0, **options) -> None:
        self.emulator.configure(schedule, shared_limit=SHARED, **options)

    def fuses(self, c: Case) -> bool:
        return bool(self.lib.fd_qgfd_fuses(ctypes.byref(ForwardParams(c.matrix(), c.recurrence(), heads_of(c.value)))))

    def forward(
        self, c: Case, path: str = "by_shape", saved: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """out [B, L_q, H, d]; where saved lse [B, H, L_q] and passes [S, B, H, L_q, d]."""
        batch, heads, queries, dim = c.query.shape
        nan = float("nan")
        out = torch.full((batch, queries, heads, dim), nan, dtype=c.query.dtype)
        lse = torch.full((batch, heads, queries), nan) if saved else None
        passes = torch.full((c.saved, *c.query.shape), nan, dtype=c.query.dtype) if saved else None
        number = PATHS.index(path)
        p = ForwardParams(c.matrix(), c.recurrence(), heads_of(c.value), pointer(out), pointer(lse), pointer(passes))
        workspace = _workspace(self.lib.fd_qgfd_forward_workspace_bytes(ctypes.byref(p), number))
        p.workspace = pointer(workspace)
        self.emulator.check(self.lib.fd_qgfd_forward(ctypes.byref(p), number))
        return out, lse, passes

    def backward(self, c: Case, grad_out: Tensor, saved: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """grad_query [B, L_q, H, d], grad_key and grad_value [B, L_k, H, d]; `saved` is what forward gave."""
        out, lse, passes = saved
        batch, heads, queries, dim = c.query.shape
        sizes = (queries, c.key.shape[2], c.key.shape[2])
        grads = [torch.full((batch, n, heads, dim), float("nan"), dtype=c.query.dtype) for n in sizes]
        p = BackwardParams(
            c.matrix(), c.recurrence(), heads_of(c.value), heads_of(out.transpose(1, 2)), heads_of(grad_out),
            pointer(lse), pointer(passes), *map(pointer, grads),
        )  # fmt: skip
        workspace = _workspace(self.lib.fd_qgfd_backward_workspace_bytes(ctypes.byref(p)))
        p.workspace = pointer(workspace)
        self.emulator.check(self.lib.fd_qgfd_backward(ctypes.byref(p)))
        return tuple(grads)


def exact(c: Case, grad_out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """out [B, H, L_q, d], lse, passes (all y_j) and, given ∂/∂out, the gradients of query, key and value as
    backward() has them, one per query head: plain attention by dense matrices in float64, without rounding."""
    groups = c.query.shape[1] // c.key.shape[1]
    query = c.query.double().requires_grad_()
    key, value = (t.double().repeat_interleave(groups, 1).requires_grad_() for t in (c.key, c.value))
    queries, keys = query.shape[2], key.shape[2]
    j = torch.arange(keys)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if c.row_begin is not None:
        mask = mask & (j >= c.row_begin[:, None, :, None])
    if c.row_end is not None:
        mask = mask & (j < c.row_end[:, None, :, None])
    if c.key_mask is not None:
        mask = mask & c.key_mask[:, None, None]
    some = mask.any(-1, keepdim=True)
    scores = (query @ key.mT * c.scale).masked_fill(~mask & some, -torch.inf)
    m = scores.softmax(-1) * some
    lse = (scores.logsumexp(-1) if keys else scores.new_zeros(scores.shape[:-1])).masked_fill(~some[..., 0], 0.0)
    u, passes = value, []
    for hop in range(1, c.hops + 1):
        u = m @ u
        passes.append(u)
        if hop in c.mixed:
            u = c.alpha * u + (1 - c.alpha) * value
    grads = []
    if grad_out is not None:
        grads = list(torch.autograd.grad(u, (query, key, value), grad_out.double()))
    return u.detach(), lse.detach(), torch.stack(passes).detach(), grads
