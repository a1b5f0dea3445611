"""AdaLN in Triton: the device code. triton_kernels.py launches it; README.md has the mathematics.

A tile is ROWS rows by BLOCK columns: `cols` is [1, BLOCK], what belongs to rows is [ROWS, 1] (where a program has one
row in several tiles: [BLOCK] and scalars). Everything is computed in fp32 and rounded once, to nearest even, where it
is stored. An absent operand is None, which compiles away. Rows past the last one repeat it, and are not stored.
Row numbers fit in 32 bits (the launch functions check it); offsets in elements have 64.
Arguments that change with the resolution are not specialised on, so that a new resolution compiles nothing.
"""

import triton
import triton.language as tl

_SIZES = ["rows", "tokens", "gate_tokens_per_frame", "shift_tokens_per_frame", "scale_tokens_per_frame"]
_SEGMENT_SIZES = ["frame_rows", "segment_rows", "segments_per_frame", "segments"]


@triton.jit
def _modulation_offset(row, tokens, batch_stride, frame_stride, tokens_per_frame):
    """Where the modulation row of token `row` (of batch * tokens) starts, in elements."""
    sample = row // tokens
    frame = (row % tokens) // tokens_per_frame
    return sample.to(tl.int64) * batch_stride + frame.to(tl.int64) * frame_stride


@triton.jit
def _load(ptr, offset, cols, mask):
    """ptr[offset + cols] as fp32, 0 outside of the mask."""
    return tl.load(ptr + offset + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_stream(x_ptr, branch_ptr, gate_ptr, offset, gate_offset, cols, mask, SATURATE: tl.constexpr):
    """x, or residual + gate * branch rounded to the residual's dtype; with SATURATE within float16's numbers."""
    x = _load(x_ptr, offset, cols, mask)
    if branch_ptr is not None:
        x += _load(gate_ptr, gate_offset, cols, mask) * _load(branch_ptr, offset, cols, mask)
        if SATURATE:  # a NaN stays one
            x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _gain(weight_ptr, scale_ptr, scale_offset, cols, mask):
    """weight * (1 + scale); given the bias for the weight, the bias's share of the output."""
    gain = 1.0
    if scale_ptr is not None:
        gain = 1.0 + _load(scale_ptr, scale_offset, cols, mask)
    if weight_ptr is not None:
        gain = gain * _load(weight_ptr, 0, cols, mask)
    return gain


@triton.jit
def _modulate(xhat, weight_ptr, bias_ptr, shift_ptr, scale_ptr, shift_offset, scale_offset, cols, mask):
    """xhat * a + c, with a = weight * (1 + scale) and c = bias * (1 + scale) + shift."""
    y = xhat * _gain(weight_ptr, scale_ptr, scale_offset, cols, mask)
    if bias_ptr is not None:
        y += _gain(bias_ptr, scale_ptr, scale_offset, cols, mask)
    if shift_ptr is not None:
        y += _load(shift_ptr, shift_offset, cols, mask)
    return y


@triton.jit
def _store(ptr, offset, cols, value, mask):
    tl.store(ptr + offset + cols, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rsqrt(x):
    return tl.div_rn(1.0, tl.sqrt_rn(x))


# ------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
    residual_out_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, tokens, dim, eps,
    gate_batch_stride, gate_frame_stride, gate_tokens_per_frame,
    shift_batch_stride, shift_frame_stride, shift_tokens_per_frame,
    scale_batch_stride, scale_frame_stride, scale_tokens_per_frame,
    RMS: tl.constexpr, SATURATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers, dim <= BLOCK. Grid: (cdiv(rows, ROWS),)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    stored = row < rows
    row = tl.minimum(row, rows - 1)
    mask = cols < dim
    offset = row.to(tl.int64) * dim
    gate_offset = _modulation_offset(row, tokens, gate_batch_stride, gate_frame_stride, gate_tokens_per_frame)
    shift_offset = _modulation_offset(row, tokens, shift_batch_stride, shift_frame_stride, shift_tokens_per_frame)
    scale_offset = _modulation_offset(row, tokens, scale_batch_stride, scale_frame_stride, scale_tokens_per_frame)

    x = _load_stream(x_ptr, branch_ptr, gate_ptr, offset, gate_offset, cols, mask, SATURATE)
    if residual_out_ptr is not None:
        _store(residual_out_ptr, offset, cols, x, mask & stored)
    if RMS:
        rstd = _rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
    else:
        # the mean is corrected with the mean of what is left, which keeps rows far from zero accurate
        mean = tl.sum(x, axis=1, keep_dims=True) / dim
        x = tl.where(mask, x - mean, 0.0)
        correction = tl.sum(x, axis=1, keep_dims=True) / dim
        x = tl.where(mask, x - correction, 0.0)
        rstd = _rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / dim + eps)
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean + correction, mask=stored)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=stored)
    y = _modulate(x * rstd, weight_ptr, bias_ptr, shift_ptr, scale_ptr, shift_offset, scale_offset, cols, mask)
    _store(out_ptr, offset, cols, y, mask & stored)


@triton.jit(do_not_specialize=_SIZES)
def forward_tiled_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
    residual_out_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, tokens, dim, eps,
    gate_batch_stride, gate_frame_stride, gate_tokens_per_frame,
    shift_batch_stride, shift_frame_stride, shift_tokens_per_frame,
    scale_batch_stride, scale_frame_stride, scale_tokens_per_frame,
    RMS: tl.constexpr, SATURATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows wider than BLOCK, one per program, in column tiles. Grid: (rows,).

    The stream is computed again in each pass, and stored in the last: no thread reads what another one wrote, and
    residual_out may be the residual itself.
    """
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * dim
    gate_offset = _modulation_offset(row, tokens, gate_batch_stride, gate_frame_stride, gate_tokens_per_frame)
    shift_offset = _modulation_offset(row, tokens, shift_batch_stride, shift_frame_stride, shift_tokens_per_frame)
    scale_offset = _modulation_offset(row, tokens, scale_batch_stride, scale_frame_stride, scale_tokens_per_frame)

    mean = 0.0
    if not RMS:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + tile
            total += _load_stream(x_ptr, branch_ptr, gate_ptr, offset, gate_offset, cols, cols < dim, SATURATE)
        mean = tl.sum(total, axis=0) / dim

    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + tile
        x = _load_stream(x_ptr, branch_ptr, gate_ptr, offset, gate_offset, cols, cols < dim, SATURATE)
        x = tl.where(cols < dim, x - mean, 0.0)
        total += x
        squares += x * x
    variance = tl.sum(squares, axis=0) / dim
    correction = 0.0
    if not RMS:
        correction = tl.sum(total, axis=0) / dim
        variance -= correction * correction
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean + correction)
    rstd = _rsqrt(variance + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)

    for start in range(0, dim, BLOCK):
        cols = start + tile
        mask = cols < dim
        x = _load_stream(x_ptr, branch_ptr, gate_ptr, offset, gate_offset, cols, mask, SATURATE)
        if residual_out_ptr is not None:
            _store(residual_out_ptr, offset, cols, x, mask)
        xhat = (x - mean - correction) * rstd
        y = _modulate(xhat, weight_ptr, bias_ptr, shift_ptr, scale_ptr, shift_offset, scale_offset, cols, mask)
        _store(out_ptr, offset, cols, y, mask)


# ------------------------------------------------------------------------------------------------------ backward


@triton.jit
def _xhat(x_ptr, mean_ptr, row, rstd, offset, cols, mask):
    """The normalised row, from the saved statistics (mean_ptr is None for rms)."""
    x = _load(x_ptr, offset, cols, mask)
    if mean_ptr is not None:
        x -= tl.load(mean_ptr + row)
    return x * rstd


@triton.jit
def _store_modulation_gradients(
    p, q, g, frame, dim, cols, mask, weight_ptr, bias_ptr, grad_gate_ptr, grad_shift_ptr, grad_scale_ptr
):
    """One frame's gradients from p = sum of grad_out, q = sum of grad_out * xhat, g = sum of grad_stream * branch."""
    offset = frame.to(tl.int64) * dim
    if grad_gate_ptr is not None:
        _store(grad_gate_ptr, offset, cols, g, mask)
    if grad_shift_ptr is not None:
        _store(grad_shift_ptr, offset, cols, p, mask)
    if grad_scale_ptr is not None:
        if weight_ptr is not None:
            q *= _load(weight_ptr, 0, cols, mask)
        if bias_ptr is not None:
            q += _load(bias_ptr, 0, cols, mask) * p
        _store(grad_scale_ptr, offset, cols, q, mask)


@triton.jit(do_not_specialize=_SIZES)
def row_means_kernel(
    grad_out_ptr, x_ptr, mean_ptr, rstd_ptr, scale_ptr, weight_ptr, row_means_ptr,
    rows, tokens, dim, scale_batch_stride, scale_frame_stride, scale_tokens_per_frame,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The two means that the gradient of a row needs, for rows wider than a tile. Grid: (rows,).

    row_means is [2, rows]: mean(ghat), mean(ghat * xhat), with ghat = grad_out * weight * (1 + scale).
    """
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * dim
    scale_offset = _modulation_offset(row, tokens, scale_batch_stride, scale_frame_stride, scale_tokens_per_frame)
    rstd = tl.load(rstd_ptr + row)
    sum_ghat = tl.zeros([BLOCK], tl.float32)
    sum_ghat_xhat = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + tile
        mask = cols < dim
        ghat = _load(grad_out_ptr, offset, cols, mask) * _gain(weight_ptr, scale_ptr, scale_offset, cols, mask)
        sum_ghat += ghat
        sum_ghat_xhat += ghat * _xhat(x_ptr, mean_ptr, row, rstd, offset, cols, mask)
    tl.store(row_means_ptr + row, tl.sum(sum_ghat, axis=0) / dim)
    tl.store(row_means_ptr + rows + row, tl.sum(sum_ghat_xhat, axis=0) / dim)


@triton.jit(do_not_specialize=_SIZES + _SEGMENT_SIZES)
def backward_kernel(
    grad_out_ptr, grad_residual_out_ptr, x_ptr, mean_ptr, rstd_ptr, residual_in_ptr, branch_ptr, gate_ptr, scale_ptr,
    weight_ptr, bias_ptr, row_means_ptr, grad_x_ptr, grad_branch_ptr, sums_ptr,
    grad_gate_ptr, grad_shift_ptr, grad_scale_ptr,
    rows, tokens, dim, frame_rows, segment_rows, segments_per_frame, segments,
    gate_batch_stride, gate_frame_stride, gate_tokens_per_frame,
    scale_batch_stride, scale_frame_stride, scale_tokens_per_frame,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of rows, and its share of the sums. Grid: (segments, cdiv(dim, BLOCK)).

    A segment lies in one frame, so all its rows have the same gate and scale (read from the cache for each row: kept,
    they would be the registers that spill). Its sums go to sums [3, segments, dim],
    or, where a frame is one segment, straight to the modulation gradients. branch is given only where the gradient of
    the gate is wanted or the stream was saturated (as residual_in is), row_means only where a row is wider than BLOCK.
    """
    segment = tl.program_id(0)
    frame = segment // segments_per_frame
    first = (segment % segments_per_frame) * segment_rows
    last = tl.minimum(first + segment_rows, frame_rows)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    col_mask = cols < dim
    frame_row = frame * frame_rows
    scale_offset = _modulation_offset(frame_row, tokens, scale_batch_stride, scale_frame_stride, scale_tokens_per_frame)
    gate_offset = _modulation_offset(frame_row, tokens, gate_batch_stride, gate_frame_stride, gate_tokens_per_frame)

    p = tl.zeros([ROWS, BLOCK], tl.float32)
    q = tl.zeros([ROWS, BLOCK], tl.float32)
    g = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)[:, None]
        mask = col_mask & (token < last)
        row = frame_row + tl.minimum(token, last - 1)
        offset = row.to(tl.int64) * dim
        grad_out = _load(grad_out_ptr, offset, cols, mask)
        rstd = tl.load(rstd_ptr + row)
        xhat = _xhat(x_ptr, mean_ptr, row, rstd, offset, cols, mask)
        ghat = grad_out * _gain(weight_ptr, scale_ptr, scale_offset, cols, col_mask)
        if row_means_ptr is None:
            mean_ghat = tl.sum(ghat, axis=1, keep_dims=True) / dim
            mean_ghat_xhat = tl.sum(ghat * xhat, axis=1, keep_dims=True) / dim
        else:
            mean_ghat = tl.load(row_means_ptr + row)
            mean_ghat_xhat = tl.load(row_means_ptr + rows + row)
        grad = ghat - xhat * mean_ghat_xhat
        if mean_ptr is not None:
            grad -= mean_ghat
        grad *= rstd
        if grad_residual_out_ptr is not None:
            grad += _load(grad_residual_out_ptr, offset, cols, mask)
        if residual_in_ptr is not None:  # what was clipped has no gradient
            total = _load(gate_ptr, gate_offset, cols, col_mask) * _load(branch_ptr, offset, cols, mask)
            total += _load(residual_in_ptr, offset, cols, mask)
            grad = tl.where(tl.abs(total) < 65520.0, grad, 0.0)
        _store(grad_x_ptr, offset, cols, grad, mask)
        if grad_branch_ptr is not None:
            _store(grad_branch_ptr, offset, cols, _load(gate_ptr, gate_offset, cols, col_mask) * grad, mask)
        p += grad_out
        q += grad_out * xhat
        if branch_ptr is not None:
            # the branch is 0 where the mask is off
            g += grad * _load(branch_ptr, offset, cols, mask)

    p = tl.sum(p, axis=0, keep_dims=True)
    q = tl.sum(q, axis=0, keep_dims=True)
    g = tl.sum(g, axis=0, keep_dims=True)
    if sums_ptr is not None:
        offset = segment.to(tl.int64) * dim
        stride = segments.to(tl.int64) * dim
        _store(sums_ptr, offset, cols, p, col_mask)
        _store(sums_ptr, offset + stride, cols, q, col_mask)
        if branch_ptr is not None:
            _store(sums_ptr, offset + 2 * stride, cols, g, col_mask)
    _store_modulation_gradients(
        p, q, g, frame, dim, cols, col_mask, weight_ptr, bias_ptr, grad_gate_ptr, grad_shift_ptr, grad_scale_ptr
    )


@triton.jit(do_not_specialize=_SEGMENT_SIZES)
def reduce_modulation_kernel(
    sums_ptr, weight_ptr, bias_ptr, grad_gate_ptr, grad_shift_ptr, grad_scale_ptr,
    segments_per_frame, segments, dim, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of a frame's segments in order. Grid: (frames, cdiv(dim, BLOCK))."""
    frame = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    col_mask = cols < dim
    stride = segments.to(tl.int64) * dim
    p = tl.zeros([ROWS, BLOCK], tl.float32)
    q = tl.zeros([ROWS, BLOCK], tl.float32)
    g = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, segments_per_frame, ROWS):
        segment = start + tl.arange(0, ROWS)[:, None]
        mask = col_mask & (segment < segments_per_frame)
        offset = (frame * segments_per_frame + segment).to(tl.int64) * dim
        p += _load(sums_ptr, offset, cols, mask)
        q += _load(sums_ptr, offset + stride, cols, mask)
        if grad_gate_ptr is not None:
            g += _load(sums_ptr, offset + 2 * stride, cols, mask)
    p = tl.sum(p, axis=0, keep_dims=True)
    q = tl.sum(q, axis=0, keep_dims=True)
    g = tl.sum(g, axis=0, keep_dims=True)
    _store_modulation_gradients(
        p, q, g, frame, dim, cols, col_mask, weight_ptr, bias_ptr, grad_gate_ptr, grad_shift_ptr, grad_scale_ptr
    )


@triton.jit(do_not_specialize=_SIZES + _SEGMENT_SIZES)
def reduce_affine_kernel(
    sums_ptr, scale_ptr, grad_weight_ptr, grad_bias_ptr,
    tokens, frame_rows, segments_per_frame, segments, dim,
    scale_batch_stride, scale_frame_stride, scale_tokens_per_frame,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds (1 + scale) times the sums of all segments, in order. Grid: (cdiv(dim, BLOCK),)."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    col_mask = cols < dim
    stride = segments.to(tl.int64) * dim
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, segments, ROWS):
        segment = start + tl.arange(0, ROWS)[:, None]
        mask = col_mask & (segment < segments)
        frame_row = segment // segments_per_frame * frame_rows
        scale_offset = _modulation_offset(
            frame_row, tokens, scale_batch_stride, scale_frame_stride, scale_tokens_per_frame
        )
        gain = _gain(None, scale_ptr, scale_offset, cols, mask)
        offset = segment.to(tl.int64) * dim
        grad_bias += gain * _load(sums_ptr, offset, cols, mask)
        grad_weight += gain * _load(sums_ptr, offset + stride, cols, mask)
    if grad_weight_ptr is not None:
        _store(grad_weight_ptr, 0, cols, tl.sum(grad_weight, axis=0, keep_dims=True), col_mask)
    if grad_bias_ptr is not None:
        _store(grad_bias_ptr, 0, cols, tl.sum(grad_bias, axis=0, keep_dims=True), col_mask)
