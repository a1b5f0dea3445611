"""The emulator's launch functions, called with torch tensors on the CPU."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # kernels/common/dtype.h
SCHEDULES = (0, 1, 7)  # threads and blocks in order, backwards, shuffled with this seed
_P, _I = ctypes.c_void_p, ctypes.c_int64


class Modulation(ctypes.Structure):
    _fields_ = [
        ("data", _P),
        ("dtype", ctypes.c_int32),
        ("batch_stride", _I),
        ("frame_stride", _I),
        ("tokens_per_frame", _I),
    ]


class ForwardParams(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("x", "branch")),
        *((name, Modulation) for name in ("gate", "shift", "scale")),
        *((name, _P) for name in ("weight", "bias", "residual_out", "out", "mean", "rstd")),
        *((name, _I) for name in ("batch", "tokens", "dim")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("x_dtype", "branch_dtype", "out_dtype")),
        ("rms", ctypes.c_bool),
        ("saturate", ctypes.c_bool),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("grad_out", "grad_residual_out", "x", "mean", "rstd", "branch")),
        *((name, Modulation) for name in ("gate", "scale")),
        *((name, _P) for name in ("weight", "bias", "residual_in", "grad_x", "grad_branch")),
        *((name, _P) for name in ("grad_gate", "grad_shift", "grad_scale", "grad_weight", "grad_bias", "workspace")),
        *((name, _I) for name in ("batch", "tokens", "dim", "grad_tokens_per_frame", "rows_per_segment")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "branch_dtype", "out_dtype")),
        *((name, ctypes.c_int32) for name in ("grad_gate_dtype", "grad_shift_dtype", "grad_scale_dtype")),
        ("rms", ctypes.c_bool),
    ]


class EmulatorError(RuntimeError):
    """A fault that the emulator found in a kernel."""


def pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def modulation(m: Tensor | None, x: Tensor) -> Modulation:
    """Modulation of any shape that the operators take, read in place, beside x [B, N, D]."""
    if m is None:
        return Modulation(None, 0, 0, 0, 1)
    tokens = x.shape[1]
    if m.ndim == 1:
        m = m[None]
    if m.ndim == 2:
        m = m[:, None]
    assert m.stride(-1) == 1 or m.shape[-1] == 1
    batch_stride = 0 if m.shape[0] == 1 else m.stride(0)
    frame_stride = 0 if m.shape[1] == 1 else m.stride(1)
    return Modulation(m.data_ptr(), DTYPES[m.dtype], batch_stride, frame_stride, max(tokens // m.shape[1], 1))


class Emulator:
    """One variant of the library."""

    def __init__(self, library: Path):
        self.lib = ctypes.CDLL(str(library))
        self.lib.fd_error.restype = ctypes.c_char_p
        self.lib.fd_backward_workspace_bytes.restype = ctypes.c_long
        self.configure()
        assert ctypes.sizeof(ForwardParams) == self.lib.fd_size_of_forward_params()
        assert ctypes.sizeof(BackwardParams) == self.lib.fd_size_of_backward_params()

    def configure(self, schedule: int = 0, shared_limit: int = 48 << 10, max_grid: int = 2**31 - 1) -> None:
        self.lib.fd_configure(ctypes.c_int(schedule), ctypes.c_long(shared_limit), ctypes.c_long(max_grid))

    def check(self, status: int) -> None:
        if status == -1:
            raise EmulatorError(self.lib.fd_error().decode())
        if status:
            raise ValueError(f"cudaError {status}")

    def fault(self, name: str, inputs: Tensor, outputs: Tensor, n: int | None = None) -> None:
        n = inputs.numel() if n is None else n
        self.check(self.lib.fd_fault(name.encode(), _P(pointer(inputs)), _P(pointer(outputs)), ctypes.c_int(n)))

    def forward(
        self,
        x: Tensor,  # [B, N, D]
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        *,
        branch: Tensor | None = None,  # [B, N, D]: the gated form
        gate: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        norm: str = "layer",
        eps: float = 1e-6,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        saturate: bool = False,
    ) -> dict[str, Tensor | None]:
        """out, residual_out (gated), mean (layer) and rstd [B * N]; outputs start as NaN."""
        rows, layer = x.shape[0] * x.shape[1], norm == "layer"
        if out is None:
            out = torch.full(x.shape, float("nan"), dtype=out_dtype or x.dtype)
        residual_out = None if branch is None else torch.full_like(x, float("nan"))
        mean = torch.full((rows,), float("nan")) if layer else None
        rstd = torch.full((rows,), float("nan"))
        p = ForwardParams(
            x=pointer(x), branch=pointer(branch), weight=pointer(weight), bias=pointer(bias), out=pointer(out),
            residual_out=pointer(residual_out), mean=pointer(mean), rstd=pointer(rstd),
            gate=modulation(gate, x), shift=modulation(shift, x), scale=modulation(scale, x),
            batch=x.shape[0], tokens=x.shape[1], dim=x.shape[2], eps=eps,
            x_dtype=DTYPES[x.dtype], out_dtype=DTYPES[out.dtype], rms=not layer, saturate=saturate,
            branch_dtype=0 if branch is None else DTYPES[branch.dtype],
        )  # fmt: skip
        self.check(self.lib.fd_adaln_forward(ctypes.byref(p)))
        return {"out": out, "residual_out": residual_out, "mean": mean, "rstd": rstd}

    def backward(
        self,
        grad_out: Tensor,  # [B, N, D]
        x: Tensor,  # [B, N, D]: what was normalised
        saved: dict[str, Tensor | None],  # of forward()
        *,
        wanted: tuple[str, ...],  # of "gate", "shift", "scale", "weight", "bias"
        grad_residual_out: Tensor | None = None,
        branch: Tensor | None = None,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual_in: Tensor | None = None,  # of a forward pass that saturated
        norm: str = "layer",
        frames: int = 1,  # rows of the modulation's gradients a batch entry
        rows_per_segment: int = 4,
        grad_dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """x, branch (gated) and the wanted gradients; gate, shift and scale as [B, frames, D]."""
        batch, tokens, dim = x.shape
        nan = float("nan")
        grads = {"x": torch.full_like(x, nan)}
        if branch is not None:
            grads["branch"] = torch.full_like(branch, nan)
        for name in wanted:
            vector = name in ("weight", "bias")
            grads[name] = torch.full((dim,), nan) if vector else torch.full((batch, frames, dim), nan, dtype=grad_dtype)
        p = BackwardParams(
            grad_out=pointer(grad_out), grad_residual_out=pointer(grad_residual_out), x=pointer(x),
            mean=pointer(saved["mean"]), rstd=pointer(saved["rstd"]), branch=pointer(branch),
            gate=modulation(gate, x), scale=modulation(scale, x), weight=pointer(weight), bias=pointer(bias),
            residual_in=pointer(residual_in), batch=batch, tokens=tokens, dim=dim,
            grad_tokens_per_frame=max(tokens // frames, 1), rows_per_segment=rows_per_segment,
            x_dtype=DTYPES[x.dtype], out_dtype=DTYPES[grad_out.dtype],
            branch_dtype=0 if branch is None else DTYPES[branch.dtype], rms=norm != "layer",
            **{f"grad_{name}": pointer(t) for name, t in grads.items()},
            **{f"grad_{name}_dtype": DTYPES[grad_dtype] for name in ("gate", "shift", "scale")},
        )  # fmt: skip
        workspace = torch.full((self.lib.fd_backward_workspace_bytes(ctypes.byref(p)) // 4,), nan)
        p.workspace = pointer(workspace) if workspace.numel() else None
        self.check(self.lib.fd_adaln_backward(ctypes.byref(p)))
        return grads
