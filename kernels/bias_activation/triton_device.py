"""bias_activation in Triton: the device code. triton_kernels.py launches it; README.md has the mathematics.

A program takes ROWS rows of COLS columns, so that the bias is loaded once for them. The number of rows is not
specialised on: another one compiles nothing.
"""

import triton
import triton.language as tl

GELU = tl.constexpr(0)  # enum Activation of bias_activation.h
GELU_TANH = tl.constexpr(1)


@triton.jit
def _logistic(z):
    """1 / (1 + exp(-z)) and its derivative, from exp(-|z|): nothing cancels, and nothing overflows."""
    e = tl.exp(-tl.abs(z))
    above = 1.0 / (1.0 + e)
    below = e * above
    return tl.where(z < 0, below, above), below * above


@triton.jit
def _gate(v, ACTIVATION: tl.constexpr):
    """gate(v) and gate'(v) of act(v) = v * gate(v)."""
    if ACTIVATION == GELU:
        gate = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
        slope = tl.exp(-0.5 * v * v) * 0.3989422804014327
    elif ACTIVATION == GELU_TANH:
        # 0.5 (1 + tanh u) is the logistic function of 2u; beyond 64 it is 0 or 1, and its derivative 0 times a number
        c = tl.minimum(tl.maximum(v, -64.0), 64.0)
        square = c * c
        gate, slope = _logistic(c * (1.5957691216057308 + 0.07135481282553536 * square))
        slope = slope * (1.5957691216057308 + 0.21406443847660608 * square)
    else:
        gate, slope = _logistic(v)
    return gate, slope


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _with_bias(x, bias_ptr, cols, col_mask):
    if bias_ptr is not None:
        x += _load(bias_ptr, cols, col_mask)
    return x


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr, bias_ptr, up_ptr, up_bias_ptr, out_ptr, rows, dim,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(rows, ROWS), cdiv(dim, COLS))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    col_mask = cols < dim
    mask = (row < rows) & col_mask
    offset = row.to(tl.int64) * dim + cols
    v = _with_bias(_load(x_ptr, offset, mask), bias_ptr, cols, col_mask)
    gate, _ = _gate(v, ACTIVATION)
    out = v * gate
    if up_ptr is not None:
        out *= _with_bias(_load(up_ptr, offset, mask), up_bias_ptr, cols, col_mask)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad_out_ptr, x_ptr, bias_ptr, up_ptr, up_bias_ptr, grad_x_ptr, grad_up_ptr, sums_ptr, rows, dim,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradients of a segment of rows, and their sums over it, [segments, 1 or 2 (with up), dim]. Grid: as forward."""
    segment = tl.program_id(0)
    row = segment * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    col_mask = cols < dim
    mask = (row < rows) & col_mask
    offset = row.to(tl.int64) * dim + cols
    grad = _load(grad_out_ptr, offset, mask)
    v = _with_bias(_load(x_ptr, offset, mask), bias_ptr, cols, col_mask)
    gate, slope = _gate(v, ACTIVATION)
    kinds = 1
    if up_ptr is not None:
        kinds = 2
        grad_up = tl.where(mask, grad * (v * gate), 0.0)
        grad *= _with_bias(_load(up_ptr, offset, mask), up_bias_ptr, cols, col_mask)
        tl.store(grad_up_ptr + offset, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)
    grad = tl.where(mask, grad * (gate + v * slope), 0.0)
    tl.store(grad_x_ptr + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        at = segment.to(tl.int64) * kinds * dim + cols
        tl.store(sums_ptr + at, tl.sum(grad, axis=0, keep_dims=True), mask=col_mask)
        if up_ptr is not None:
            tl.store(sums_ptr + at + dim, tl.sum(grad_up, axis=0, keep_dims=True), mask=col_mask)


@triton.jit(do_not_specialize=["segments"])
def sums_kernel(sums_ptr, out_ptr, segments, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Adds the sums [segments, columns] of all segments, in a fixed order. Grid: (cdiv(columns, COLS),)."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, segments, ROWS):
        segment = start + tl.arange(0, ROWS)[:, None]
        total += _load(sums_ptr, segment.to(tl.int64) * columns + cols, (segment < segments) & (cols < columns))
    tl.store(out_ptr + cols, tl.sum(total, axis=0, keep_dims=True), mask=cols < columns)
