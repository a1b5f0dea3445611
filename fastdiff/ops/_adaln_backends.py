"""AdaLN's backends as seen from Python: the torch operators, their fake kernels, and the Triton launchers.

The native operators (`fastdiff::…`, csrc/adaln.h) and the Triton launchers share these signatures; x, residual and
branch are contiguous [B, N, D], modulations keep the user's shape, weight and bias are [D] in fp32:

    adaln_forward(x, shift, scale, weight, bias, rms, eps, out_dtype) -> out
    adaln_forward_stats(same) -> out, mean, rstd                        statistics [B * N] in fp32
    adaln_forward_out(same, out) -> None
    gated_residual_adaln_forward(residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate)
        -> residual_out, out
    gated_residual_adaln_forward_stats(same) -> residual_out, out, mean, rstd
    gated_residual_adaln_forward_out(same, residual_out, out) -> None
    adaln_backward(grad_out, x, mean, rstd, shift, scale, weight, bias, rms, need_modulation, need_affine)
        -> grad_x, grad_shift, grad_scale, grad_weight, grad_bias
    gated_residual_adaln_backward(grad_out, grad_residual_out, residual_out, mean, rstd, branch, gate, shift, scale,
        weight, bias, rms, need_modulation, need_affine, residual_in)
        -> grad_residual, grad_branch, grad_gate, grad_shift, grad_scale, grad_weight, grad_bias

saturate: see gated_residual_adaln; residual_in is the residual where it was set and the stream is float16, else None.
Gradients of modulations are [B, F, D] with F the least common multiple of the operands' frame counts, in the operand's
dtype where that is the operand's own shape and in fp32 where a sum is still to be made; what is absent or not needed
is an empty tensor.
"""

import math

import torch
from torch import Tensor

from fastdiff.ops._register import implementations, register_backends


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(x, dtype=dtype or x.dtype, memory_format=torch.contiguous_format)


def _statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1]
    return x.new_empty(0 if rms else rows, dtype=_statistics_dtype(x)), x.new_empty(rows, dtype=_statistics_dtype(x))


def _frames(m: Tensor | None) -> int:
    return m.shape[1] if m is not None and m.ndim == 3 else 1


def _fake_modulation_gradients(x: Tensor, operands: list[Tensor | None], needed: bool) -> list[Tensor]:
    frames = math.lcm(*(_frames(m) for m in operands))
    gradients = []
    for m in operands:
        if m is None or not needed:
            gradients.append(x.new_empty(0))
            continue
        exact = _frames(m) == frames and (m.ndim > 1 and m.shape[0] == x.shape[0] or m.ndim == 1 and x.shape[0] == 1)
        dtype = m.dtype if exact else _statistics_dtype(x)
        gradients.append(x.new_empty((x.shape[0], frames, x.shape[2]), dtype=dtype))
    return gradients


def _fake_affine_gradients(x: Tensor, weight: Tensor | None, bias: Tensor | None, needed: bool) -> list[Tensor]:
    return [
        x.new_empty(x.shape[2] if needed and p is not None else 0, dtype=_statistics_dtype(x)) for p in (weight, bias)
    ]


def _fake_forward(x, shift, scale, weight, bias, rms, eps, out_dtype):
    return _like(x, out_dtype)


def _fake_forward_stats(x, shift, scale, weight, bias, rms, eps, out_dtype):
    return (_like(x, out_dtype), *_statistics(x, rms))


def _fake_forward_out(x, shift, scale, weight, bias, rms, eps, out_dtype, out):
    return None


def _fake_gated_forward(residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate):
    return _like(residual, None), _like(residual, out_dtype)


def _fake_gated_forward_stats(residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate):
    return (_like(residual, None), _like(residual, out_dtype), *_statistics(residual, rms))


def _fake_gated_forward_out(
    residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate, residual_out, out
):
    return None


def _fake_backward(grad_out, x, mean, rstd, shift, scale, weight, bias, rms, need_modulation, need_affine):
    return (
        _like(x, None),
        *_fake_modulation_gradients(x, [shift, scale], need_modulation),
        *_fake_affine_gradients(x, weight, bias, need_affine),
    )


def _fake_gated_backward(
    grad_out, grad_residual_out, residual_out, mean, rstd, branch, gate, shift, scale, weight, bias, rms,
    need_modulation, need_affine, residual_in,
):  # fmt: skip
    return (
        _like(residual_out, None),
        _like(branch, None),
        *_fake_modulation_gradients(residual_out, [gate, shift, scale], need_modulation),
        *_fake_affine_gradients(residual_out, weight, bias, need_affine),
    )


_FORWARD = "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, bool rms, float eps, ScalarType? out_dtype"
_BACKWARD = (
    "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, bool rms, bool need_modulation, bool need_affine"
)
# The same schemas are written in csrc/adaln_cpu.cpp; a test compares them.
SCHEMAS = {
    "adaln_forward": f"(Tensor x, {_FORWARD}) -> Tensor",
    "adaln_forward_stats": f"(Tensor x, {_FORWARD}) -> (Tensor, Tensor, Tensor)",
    "adaln_forward_out": f"(Tensor x, {_FORWARD}, Tensor(a!) out) -> ()",
    "adaln_backward": f"(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, {_BACKWARD})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gated_residual_adaln_forward": f"(Tensor residual, Tensor branch, Tensor gate, {_FORWARD}, bool saturate)"
    " -> (Tensor, Tensor)",
    "gated_residual_adaln_forward_stats": f"(Tensor residual, Tensor branch, Tensor gate, {_FORWARD}, bool saturate)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "gated_residual_adaln_forward_out": f"(Tensor residual, Tensor branch, Tensor gate, {_FORWARD}, bool saturate,"
    " Tensor(a!) residual_out, Tensor(b!) out) -> ()",
    "gated_residual_adaln_backward": "(Tensor grad_out, Tensor? grad_residual_out, Tensor residual_out, Tensor mean,"
    f" Tensor rstd, Tensor branch, Tensor gate, {_BACKWARD}, Tensor? residual_in)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}


_FAKES = {
    "adaln_forward": _fake_forward,
    "adaln_forward_stats": _fake_forward_stats,
    "adaln_forward_out": _fake_forward_out,
    "adaln_backward": _fake_backward,
    "gated_residual_adaln_forward": _fake_gated_forward,
    "gated_residual_adaln_forward_stats": _fake_gated_forward_stats,
    "gated_residual_adaln_forward_out": _fake_gated_forward_out,
    "gated_residual_adaln_backward": _fake_gated_backward,
}

IMPLEMENTATIONS = implementations(SCHEMAS, _FAKES, "fastdiff.kernels.adaln.triton_kernels")
for _operator in ("adaln", "gated_residual_adaln"):
    register_backends(_operator, cpu_takes_float64=True)
