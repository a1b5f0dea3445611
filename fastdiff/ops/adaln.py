"""Fused AdaLN: the norm, modulation and gated residual of a DiT block in one read and one write.

Mathematics, rounding order and bytes: kernels/adaln/README.md. The operation is adaLN-Zero's of DiT (Peebles and Xie
2023, "Scalable Diffusion Models with Transformers"), per sample as there, per frame or per token as in video models.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.adaln import reference
from fastdiff.ops._adaln_backends import IMPLEMENTATIONS
from fastdiff.ops._checks import autocast_dtype, choose_backend, distinct, wants_grad
from fastdiff.ops._outputs import check_apart, check_out, written

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adaln(
    x: Tensor,  # [B, N, D], any leading shape
    shift: Tensor | None,  # [D], [1, D], [B, D], [B, F, D], [B, N, D] or [1, N, D]
    scale: Tensor | None,  # the same
    *,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    norm: str = "layer",
    eps: float = 1e-6,
    out: Tensor | None = None,  # like x
) -> Tensor:  # like x
    """norm(x) · (1 + scale) + shift in one pass, forward and backward.

    Args:
        x: the stream, `[B, N, D]`; `[N, D]` has B = 1, and of more dimensions the middle ones are tokens.
            float32, bfloat16 or float16 (float64 on the CPU, all operands alike, for gradient checks).
        shift, scale: `[D]`, `[1, D]`, `[B, D]` (a sample), `[B, F, D]` with F dividing N (token n belongs to frame
            n // (N / F)), `[B, N, D]` or `[1, N, D]` (a token); beside an x of more dimensions, `[B, T, S, D]`, also
            `[B, 1, 1, D]`, `[B, T, 1, D]` and `[B, T, S, D]`. None leaves it out. Strided views, such as chunks of
            one projection, are read in place. Their dtypes may differ from x's.
        weight, bias: the norm's own affine parameters, `[D]`, or None.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        eps: added to the variance.
        out: written instead of a new tensor; no gradient flows then.

    Returns:
        A tensor of x's shape and dtype; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    batch, tokens, dim = _check_stream("x", x, norm, eps)
    backend = _check_operands("adaln", x, batch, tokens, dim, None, None, shift, scale, weight, bias)
    grad = wants_grad(x, shift, scale, weight, bias)
    out_dtype = check_out("out", out, x, autocast_dtype(x), grad)
    x3, shift, scale = _rows(x, batch, tokens, dim), _readable(shift, x), _readable(scale, x)
    weight, bias = _compute(weight, x), _compute(bias, x)
    if backend == "reference":
        result = reference.adaln(
            x3, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype
        ).view(x.shape)
        return result if out is None else out.copy_(result)
    if out is not None:
        check_apart((("out", out),), (x,), (shift, scale, weight, bias))
    args = (x3, shift, scale, weight, bias, norm == "rms", eps, out_dtype)
    if out is not None:
        IMPLEMENTATIONS[backend].adaln_forward_out(*args, out.view(x3.shape))
        written(out)
        return out
    result = _AdaLN.apply(backend, *distinct(args)) if grad else IMPLEMENTATIONS[backend].adaln_forward(*args)
    return result if x.ndim == 3 else result.view(x.shape)


def gated_residual_adaln(
    residual: Tensor,  # [B, N, D], any leading shape
    branch: Tensor,  # like residual
    gate: Tensor,  # [D], [1, D], [B, D], [B, F, D], [B, N, D] or [1, N, D]
    shift: Tensor | None,  # the same
    scale: Tensor | None,  # the same
    *,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    norm: str = "layer",
    eps: float = 1e-6,
    gate_activation: str | None = None,
    saturate: bool = False,
    residual_out: Tensor | None = None,  # like residual
    out: Tensor | None = None,  # like residual
) -> tuple[Tensor, Tensor]:  # both like residual
    """(r, adaln(r, shift, scale)) with r = residual + gate · branch: one read and one write of each.

    Args:
        residual: the stream, `[B, N, D]` as x of `adaln`. r keeps its dtype, also under autocast.
        branch: what attention or MLP computed, of residual's shape, in its own dtype.
        gate, shift, scale: as shift and scale of `adaln`; each may have its own shape and dtype.
        weight, bias, norm, eps: as for `adaln`. The statistics are those of the stored, rounded r.
        gate_activation: None, or "tanh" to gate with tanh(gate), taken in fp32.
        saturate: keeps a float16 r within ±65504, its largest numbers, where it would overflow to infinity, as public
            float16 blocks clip it; the gradient is 0 for what was clipped. Other dtypes of residual are left as
            they are.
        residual_out, out: written instead of new tensors (both or neither; `residual_out` may be `residual`
            itself); no gradient flows then.

    Returns:
        (r in residual's dtype, the modulated norm of r in residual's dtype or the autocast dtype).

    Raises:
        TypeError, ValueError: an operand's type, dtype, shape or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    batch, tokens, dim = _check_stream("residual", residual, norm, eps)
    for name, t in (("branch", branch), ("gate", gate)):
        if t is None:
            raise TypeError(f"{name}: got None; gated_residual_adaln needs one: pass a tensor, or use adaln")
    backend = _check_operands(
        "gated_residual_adaln", residual, batch, tokens, dim, branch, gate, shift, scale, weight, bias
    )
    if gate_activation is not None:
        if gate_activation != "tanh":
            raise ValueError(f"gate_activation: got {gate_activation!r}; expected None or 'tanh'")
        gate = torch.tanh(_compute(gate, residual))
    grad = wants_grad(residual, branch, gate, shift, scale, weight, bias)
    if (out is None) != (residual_out is None):
        raise ValueError("out, residual_out: got one of them; pass both or neither")
    out_dtype = check_out("out", out, residual, autocast_dtype(residual), grad)
    check_out("residual_out", residual_out, residual, residual.dtype, grad)
    x3, branch = _rows(residual, batch, tokens, dim), _rows(branch, batch, tokens, dim)
    gate, shift, scale = _readable(gate, residual), _readable(shift, residual), _readable(scale, residual)
    weight, bias = _compute(weight, residual), _compute(bias, residual)
    if backend == "reference":
        stream, normed = reference.gated_residual_adaln(
            x3, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype,
            saturate=saturate,
        )  # fmt: skip
        stream, normed = stream.view(residual.shape), normed.view(residual.shape)
        return (stream, normed) if out is None else (residual_out.copy_(stream), out.copy_(normed))
    args = (x3, branch, gate, shift, scale, weight, bias, norm == "rms", eps, out_dtype, saturate)
    if out is not None:
        others = (gate, shift, scale, weight, bias)
        check_apart((("out", out), ("residual_out", residual_out)), (residual, branch), others)
        IMPLEMENTATIONS[backend].gated_residual_adaln_forward_out(
            *args, residual_out.view(x3.shape), out.view(x3.shape)
        )
        written(residual_out)
        written(out)
        return residual_out, out
    if grad:
        stream, normed = _GatedResidualAdaLN.apply(backend, *distinct(args))
    else:
        stream, normed = IMPLEMENTATIONS[backend].gated_residual_adaln_forward(*args)
    return (stream, normed) if residual.ndim == 3 else (stream.view(residual.shape), normed.view(residual.shape))


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, shift, scale, weight, bias, rms, eps, out_dtype):
        out, mean, rstd = IMPLEMENTATIONS[backend].adaln_forward_stats(
            x, shift, scale, weight, bias, rms, eps, out_dtype
        )
        ctx.save_for_backward(x, mean, rstd, shift, scale, weight, bias)
        ctx.backend, ctx.rms = backend, rms
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, mean, rstd, shift, scale, weight, bias = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad_x, grad_shift, grad_scale, grad_weight, grad_bias = IMPLEMENTATIONS[ctx.backend].adaln_backward(
            grad_out.contiguous(), x, mean, rstd, shift, scale, weight, bias, ctx.rms,
            need[2] or need[3], need[4] or need[5],
        )  # fmt: skip
        return (
            None,
            grad_x if need[1] else None,
            _sum_to(grad_shift, shift) if need[2] else None,
            _sum_to(grad_scale, scale) if need[3] else None,
            grad_weight if need[4] else None,
            grad_bias if need[5] else None,
            None,
            None,
            None,
        )


class _GatedResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate):
        stream, out, mean, rstd = IMPLEMENTATIONS[backend].gated_residual_adaln_forward_stats(
            residual, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, saturate
        )
        clipped = residual if saturate and residual.dtype == torch.float16 else None  # says what was, with the branch
        ctx.save_for_backward(stream, mean, rstd, branch, gate, shift, scale, weight, bias, clipped)
        ctx.backend, ctx.rms, ctx.out_dtype = backend, rms, out.dtype
        ctx.set_materialize_grads(False)
        return stream, out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stream, grad_out):
        stream, mean, rstd, branch, gate, shift, scale, weight, bias, clipped = ctx.saved_tensors
        need = ctx.needs_input_grad
        if grad_out is None:
            grad_out = torch.zeros_like(stream, dtype=ctx.out_dtype)
        if grad_stream is not None:
            grad_stream = grad_stream.contiguous()
        grad_residual, grad_branch, grad_gate, grad_shift, grad_scale, grad_weight, grad_bias = IMPLEMENTATIONS[
            ctx.backend
        ].gated_residual_adaln_backward(
            grad_out.contiguous(), grad_stream, stream, mean, rstd, branch, gate, shift, scale, weight, bias, ctx.rms,
            need[3] or need[4] or need[5], need[6] or need[7], clipped,
        )  # fmt: skip
        return (
            None,
            grad_residual if need[1] else None,
            grad_branch if need[2] else None,
            _sum_to(grad_gate, gate) if need[3] else None,
            _sum_to(grad_shift, shift) if need[4] else None,
            _sum_to(grad_scale, scale) if need[5] else None,
            grad_weight if need[6] else None,
            grad_bias if need[7] else None,
            None,
            None,
            None,
            None,
        )


def _sum_to(grad: Tensor, operand: Tensor) -> Tensor:
    """A kernel's [B, F, D] gradient, summed to the operand's shape and rounded once to its dtype."""
    frames = operand.shape[1] if operand.ndim == 3 else 1
    if grad.shape[1] != frames:
        grad = grad.unflatten(1, (frames, grad.shape[1] // frames)).sum(2)
    if operand.ndim == 1 or operand.shape[0] != grad.shape[0]:
        grad = grad.sum(0, keepdim=True)
    return grad.reshape(operand.shape).to(operand.dtype)


def _check_stream(name: str, x: Tensor, norm: str, eps: float) -> tuple[int, int, int]:
    """(B, N, D) of a stream."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got a {type(x).__name__}; expected a torch.Tensor of shape [B, N, D]")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got layout {x.layout}; expected a dense tensor: call to_dense()")
    if norm != "layer" and norm != "rms":
        raise ValueError(f"norm: got {norm!r}; expected 'layer' or 'rms'")
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"eps: got {eps!r}; expected a number >= 0")
    shape = x.shape
    if len(shape) < 2 or shape[-1] == 0:
        raise ValueError(f"{name}: got shape {list(shape)}; expected [B, N, D] or [N, D] with D > 0")
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    return shape[0], shape[1:-1].numel(), shape[-1]


def _check_operands(op, x, batch, tokens, dim, branch, gate, shift, scale, weight, bias) -> str:
    """Raises for whatever does not fit x; returns the backend that will run."""
    dtypes = [x.dtype]
    device = x.device
    for name, m in (("gate", gate), ("shift", shift), ("scale", scale)):
        if m is not None:
            _check_tensor(name, m, device, dtypes)
            _check_modulation(name, m, x, batch, tokens, dim)
    if branch is not None:
        _check_tensor("branch", branch, device, dtypes)
        if branch.shape != x.shape:
            raise ValueError(f"branch: got shape {list(branch.shape)}; expected the residual's, {list(x.shape)}")
    if weight is not None or bias is not None:
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None:
                _check_tensor(name, t, device, dtypes)
                if t.ndim != 1 or t.shape[0] != dim:
                    raise ValueError(f"{name}: got shape {list(t.shape)}; expected [{dim}]")
    for dtype in dtypes:
        if dtype not in _DTYPES or (dtype is torch.float64) != (x.dtype is torch.float64):
            given = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(
                f"{op}: got dtypes {given}; expected float32, bfloat16 or float16, or float64 for all (CPU): cast them"
            )
    return choose_backend(op, device.type, tuple(dtypes))


def _check_tensor(name: str, t: Tensor, device: torch.device, dtypes: list[torch.dtype]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got a {type(t).__name__}; expected a torch.Tensor")
    if t.device != device:
        raise ValueError(
            f"{name}: got one on {t.device}, the stream on {device}; expected one device: move one of them"
        )
    dtypes.append(t.dtype)


def _check_modulation(name: str, m: Tensor, x: Tensor, batch: int, tokens: int, dim: int) -> None:
    shape = m.shape
    dims = len(shape)
    if dims >= 1 and shape[-1] == dim:
        if dims == 1:
            return
        if shape[0] == batch or shape[0] == 1:
            if dims == 2:
                return
            if dims == 3 and (shape[1] == tokens or shape[1] > 0 and tokens % shape[1] == 0):
                return
            if (
                dims == x.ndim
            ):  # over the first dimensions of the tokens, all of them or none: [B, T, 1, D] of [B, T, S, D]
                own = dims - 1
                while own > 1 and shape[own - 1] == 1:
                    own -= 1
                if shape[1:own] == x.shape[1:own]:
                    return
    expected = (
        f"[{dim}], [1, {dim}], [{batch}, {dim}], [{batch}, F, {dim}] with F dividing {tokens}, or [1, {tokens}, {dim}]"
    )
    if x.ndim > 3:
        ones = ", ".join("1" * (x.ndim - 2))
        expected += (
            f", or {list(x.shape)} with 1 for the last of its middle dimensions, down to [{batch}, {ones}, {dim}]"
        )
    raise ValueError(f"{name}: got shape {list(shape)}; expected one of {expected}")


def _rows(x: Tensor, batch: int, tokens: int, dim: int) -> Tensor:
    """x as contiguous [B, N, D]."""
    if x.ndim != 3:
        x = x.reshape(batch, tokens, dim)
    return x.contiguous()


def _readable(m: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation that kernels can read in place: at most [B, F, D] and a contiguous last dimension."""
    if m is None:
        return None
    if m.ndim > 3:
        m = m.flatten(1, -2)
    return m if m.stride(-1) == 1 or m.shape[-1] == 1 else m.contiguous()


def _compute(t: Tensor | None, x: Tensor) -> Tensor | None:
    """In the dtype of the arithmetic: fp32, or fp64 where x is."""
    return None if t is None else t.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
