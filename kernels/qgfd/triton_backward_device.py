"""QGFD attention in Triton: the device code of the backward pass, on top of triton_device.py, which says how heads lie.

Where rows are keys (M transposed, grad_key, grad_value), masks by intervals apply to the columns of a tile; key_mask
makes whole rows of the result zero, once at the end.
"""

import triton
import triton.language as tl

from fastdiff.kernels.qgfd.triton_device import (
    LOG2_E,
    SIZES,
    UNIT,
    bounds,
    intervals,
    load_rows,
    masked,
    place,
    products,
    spans,
    store_rows,
)

RANGE_ROWS = tl.constexpr(1024)  # queries that query_span_kernel looks at together


@triton.jit(do_not_specialize=SIZES)
def query_span_kernel(
    begin_ptr, begin_batch_stride, end_ptr, end_batch_stride, span_ptr,
    queries, keys, tiles, KEYS: tl.constexpr,
):  # fmt: skip
    """span = the first query that sees a key of this tile, and the one after the last. Grid: (batch * tiles,)."""
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    start = program % tiles * KEYS
    first = queries
    last = 0
    for row in range(0, queries, RANGE_ROWS):
        rows = row + tl.arange(0, RANGE_ROWS)
        begin, end = intervals(
            begin_ptr, end_ptr, batch * begin_batch_stride, batch * end_batch_stride, rows, queries, keys
        )
        sees = (rows < queries) & (begin < end) & (begin < start + KEYS) & (end > start)
        first = tl.minimum(first, tl.min(tl.where(sees, rows, queries), axis=0))
        last = tl.maximum(last, tl.max(tl.where(sees, rows + 1, 0), axis=0))
    tl.store(span_ptr + program.to(tl.int64) * 2, first)
    tl.store(span_ptr + program.to(tl.int64) * 2 + 1, last)


@triton.jit
def _query_span(span_ptr, batch, span_batch_stride, tile, queries, ROWS: tl.constexpr):
    """The queries of which a tile of keys is seen, from a multiple of ROWS on."""
    first = 0
    last = queries
    if span_ptr is not None:
        pointer = span_ptr + batch * span_batch_stride + tile * 2
        first = tl.load(pointer) // ROWS * ROWS
        last = tl.load(pointer + 1)
    return first, last


@triton.jit
def _weight(power):
    """2 ** power; above 0 it is by rounding alone, of scores so large that differences have no digits. NaN stays."""
    return tl.exp2(tl.where(power > 0, 0.0, power))


@triton.jit
def _transposed_weights(
    s, columns, rows, lse_base, begin_ptr, end_ptr, begin_offset, end_offset, queries, keys
):  # fmt: skip
    """M^T [KEYS, ROWS] of a tile's scores, but for key_mask, which makes whole rows of it zero."""
    lse = tl.load(lse_base + rows, mask=rows < queries, other=float("inf"))  # queries past the last: weights of 0
    p = _weight(s - (lse * LOG2_E)[None, :])
    if begin_ptr is not None or end_ptr is not None:
        begin, end = intervals(begin_ptr, end_ptr, begin_offset, end_offset, rows, queries, keys)
        p = tl.where((columns[:, None] >= begin[None, :]) & (columns[:, None] < end[None, :]), p, 0.0)
    return p


@triton.jit
def _only_allowed(values, key_mask_ptr, offset, columns, keys):
    """Zeros in the rows of keys that key_mask hides."""
    if key_mask_ptr is not None:
        allowed = tl.load(key_mask_ptr + offset + columns, mask=columns < keys, other=0)
        values = tl.where((allowed != 0)[:, None], values, 0.0)
    return values


@triton.jit(do_not_specialize=SIZES)
def transposed_kernel(
    query_ptr, query_batch_stride, query_head_stride, query_row_stride,
    key_ptr, key_batch_stride, key_head_stride, key_row_stride,
    h_ptr, out_ptr, lse_ptr, key_mask_ptr, begin_ptr, begin_batch_stride, end_ptr, end_batch_stride,
    span_ptr, span_batch_stride, heads, group, queries, keys, tiles, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out = round(M^T h) for one tile of keys; h and out are contiguous. Grid: (batch * heads * tiles,)."""
    batch, head, tile = place(tiles, heads)
    columns = tile * KEYS + tl.arange(0, KEYS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    lse_base = lse_ptr + (batch * heads + head) * queries
    h_base = h_ptr + (batch * heads + head) * queries * D
    k = load_rows(k_base, columns, key_row_stride, keys, D, DIM, False)
    acc = tl.zeros([KEYS, DIM], tl.float32)
    first, last = _query_span(span_ptr, batch, span_batch_stride, tile, queries, ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        q = load_rows(q_base, rows, query_row_stride, queries, D, DIM, False)
        s = products(
            k, q, tl.zeros([KEYS, ROWS], tl.float32), k_base, columns, key_row_stride, keys,
            q_base, rows, query_row_stride, queries, D, DIM, CHUNK,
        )  # fmt: skip
        p = _transposed_weights(
            s * scale_log2, columns, rows, lse_base, begin_ptr, end_ptr,
            batch * begin_batch_stride, batch * end_batch_stride, queries, keys,
        )  # fmt: skip
        h = load_rows(h_base, rows, D // UNIT, queries, D, DIM, False)
        acc = tl.dot(p.to(h.dtype), h, acc, input_precision="ieee")
    acc = _only_allowed(acc, key_mask_ptr, batch * keys, columns, keys)
    store_rows(out_ptr + (batch * heads + head) * keys * D, columns, D // UNIT, keys, acc, D, DIM)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    h_ptr, passes_ptr, out_ptr, delta_ptr, heads, queries, rows_count, hops, saved,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = the sum over hops of rowsum(h y), fp32, one per row of [B, H, L]; the last y is `out` if not saved.

    h is [hops, B, H, L, D], passes [saved, B, H, L, D], out [B, L, H, D]. Grid: (rows / ROWS,).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    delta = tl.zeros([ROWS], tl.float32)
    stride = rows_count.to(tl.int64) * D
    for hop in range(0, saved):
        offset = hop * stride
        h = load_rows(h_ptr + offset, rows, D // UNIT, rows_count, D, DIM, False).to(tl.float32)
        delta += tl.sum(
            h * load_rows(passes_ptr + offset, rows, D // UNIT, rows_count, D, DIM, False).to(tl.float32), axis=1
        )
    if saved < hops:
        head = rows // queries
        places = (head // heads * queries + rows % queries) * heads + head % heads
        places = tl.where(rows < rows_count, places, rows_count)
        h = load_rows(h_ptr + saved * stride, rows, D // UNIT, rows_count, D, DIM, False).to(tl.float32)
        delta += tl.sum(h * load_rows(out_ptr, places, D // UNIT, rows_count, D, DIM, False).to(tl.float32), axis=1)
    tl.store(delta_ptr + rows, delta, mask=rows < rows_count)


@triton.jit(do_not_specialize=SIZES)
def grad_key_kernel(
    query_ptr, query_batch_stride, query_head_stride, query_row_stride,
    key_ptr, key_batch_stride, key_head_stride, key_row_stride,
    value_ptr, value_batch_stride, value_head_stride, value_row_stride,
    h_ptr, hidden_ptr, value_sum_ptr, grad_key_ptr, grad_value_ptr, lse_ptr, delta_ptr,
    key_mask_ptr, begin_ptr, begin_batch_stride, end_ptr, end_batch_stride, span_ptr, span_batch_stride,
    heads, group, queries, keys, tiles, hops, hop_stride, scale, scale_log2,
    MANY: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """grad_key = scale dS^T query and grad_value = M^T h_1 + value_sum for one tile of keys, [B, L, H, D] both.

    h is [hops, B, H, L, D] from h_1 on, hidden [hops - 1, B, H, L, D] from u_1 on (MANY: hops > 1), value_sum fp32
    [B, H, L, D]; all contiguous. Grid: (batch * heads * tiles,).
    """
    batch, head, tile = place(tiles, heads)
    columns = tile * KEYS + tl.arange(0, KEYS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    v_base = value_ptr + (batch * value_batch_stride + head // group * value_head_stride) * UNIT
    index = batch * heads + head
    h_base = h_ptr + index * queries * D
    k = load_rows(k_base, columns, key_row_stride, keys, D, DIM, False)
    v = load_rows(v_base, columns, value_row_stride, keys, D, DIM, False)
    grad_key = tl.zeros([KEYS, DIM], tl.float32)
    grad_value = tl.zeros([KEYS, DIM], tl.float32)
    first, last = _query_span(span_ptr, batch, span_batch_stride, tile, queries, ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        q = load_rows(q_base, rows, query_row_stride, queries, D, DIM, False)
        s = products(
            k, q, tl.zeros([KEYS, ROWS], tl.float32), k_base, columns, key_row_stride, keys,
            q_base, rows, query_row_stride, queries, D, DIM, CHUNK,
        )  # fmt: skip
        p = _transposed_weights(
            s * scale_log2, columns, rows, lse_ptr + index * queries, begin_ptr, end_ptr,
            batch * begin_batch_stride, batch * end_batch_stride, queries, keys,
        )  # fmt: skip
        h = load_rows(h_base, rows, D // UNIT, queries, D, DIM, False)
        grad_value = tl.dot(p.to(h.dtype), h, grad_value, input_precision="ieee")
        ds = products(
            v, h, tl.zeros([KEYS, ROWS], tl.float32), v_base, columns, value_row_stride, keys,
            h_base, rows, D // UNIT, queries, D, DIM, CHUNK,
        )  # fmt: skip
        if MANY:  # u_j h_{j+1}^T
            u_base, h_next = hidden_ptr + index * keys * D, h_base
            for _ in range(1, hops):
                h_next += hop_stride * UNIT
                u = load_rows(u_base, columns, D // UNIT, keys, D, DIM, False)
                g = load_rows(h_next, rows, D // UNIT, queries, D, DIM, False)
                ds = products(
                    u, g, ds, u_base, columns, D // UNIT, keys, h_next, rows, D // UNIT, queries, D, DIM, CHUNK
                )
                u_base += hop_stride * UNIT
        delta = tl.load(delta_ptr + index * queries + rows, mask=rows < queries, other=0.0)
        ds = p * (ds - delta[None, :])
        grad_key = tl.dot(ds.to(q.dtype), q, grad_key, input_precision="ieee")
    grad_key = _only_allowed(grad_key * scale, key_mask_ptr, batch * keys, columns, keys)
    grad_value = _only_allowed(grad_value, key_mask_ptr, batch * keys, columns, keys)
    if value_sum_ptr is not None:
        grad_value += load_rows(value_sum_ptr + index * keys * D, columns, D // UNIT, keys, D, DIM, False)
    out = (batch * keys * heads + head) * D
    store_rows(grad_key_ptr + out, columns, heads * (D // UNIT), keys, grad_key, D, DIM)
    store_rows(grad_value_ptr + out, columns, heads * (D // UNIT), keys, grad_value, D, DIM)


@triton.jit(do_not_specialize=SIZES)
def grad_query_kernel(
    query_ptr, query_batch_stride, query_head_stride, query_row_stride,
    key_ptr, key_batch_stride, key_head_stride, key_row_stride,
    value_ptr, value_batch_stride, value_head_stride, value_row_stride,
    h_ptr, hidden_ptr, grad_query_ptr, lse_ptr, delta_ptr,
    key_mask_ptr, begin_ptr, begin_batch_stride, end_ptr, end_batch_stride,
    heads, group, queries, keys, tiles, hops, hop_stride, scale, scale_log2,
    MANY: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """grad_query = scale dS key for one tile of queries, [B, L, H, D]; h and hidden as in grad_key_kernel."""
    batch, head, tile = place(tiles, heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    v_base = value_ptr + (batch * value_batch_stride + head // group * value_head_stride) * UNIT
    index = batch * heads + head
    h_base = h_ptr + index * queries * D
    begin, end = intervals(
        begin_ptr, end_ptr, batch * begin_batch_stride, batch * end_batch_stride, rows, queries, keys
    )
    q = load_rows(q_base, rows, query_row_stride, queries, D, DIM, False)
    h = load_rows(h_base, rows, D // UNIT, queries, D, DIM, False)
    lse = tl.load(lse_ptr + index * queries + rows, mask=rows < queries, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + index * queries + rows, mask=rows < queries, other=0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    first, whole_first, whole_last, last = spans(begin, end, keys, KEYS, key_mask_ptr is not None)
    for span in tl.static_range(3):
        if (key_mask_ptr is None and (span > 0 or begin_ptr is not None)) or (key_mask_ptr is not None and span == 0):
            start, stop = bounds(span, first, whole_first, whole_last, last)
            for column in range(start, stop, KEYS):
                columns = column + tl.arange(0, KEYS)
                k = load_rows(k_base, columns, key_row_stride, keys, D, DIM, span == 1)
                s = products(
                    q, k, tl.zeros([ROWS, KEYS], tl.float32), q_base, rows, query_row_stride, queries,
                    k_base, columns, key_row_stride, keys, D, DIM, CHUNK,
                )  # fmt: skip
                s = masked(s * scale_log2, columns, begin, end, key_mask_ptr, batch * keys, keys, span == 1)
                v = load_rows(v_base, columns, value_row_stride, keys, D, DIM, span == 1)
                ds = products(
                    h, v, tl.zeros([ROWS, KEYS], tl.float32), h_base, rows, D // UNIT, queries,
                    v_base, columns, value_row_stride, keys, D, DIM, CHUNK,
                )  # fmt: skip
                if MANY:  # h_{j+1} u_j^T
                    u_base, h_next = hidden_ptr + index * keys * D, h_base
                    for _ in range(1, hops):
                        h_next += hop_stride * UNIT
                        u = load_rows(u_base, columns, D // UNIT, keys, D, DIM, span == 1)
                        g = load_rows(h_next, rows, D // UNIT, queries, D, DIM, False)
                        ds = products(
                            g, u, ds, h_next, rows, D // UNIT, queries, u_base, columns, D // UNIT, keys, D, DIM, CHUNK
                        )  # fmt: skip
                        u_base += hop_stride * UNIT
                ds = _weight(s - lse[:, None]) * (ds - delta[:, None])
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    out_base = grad_query_ptr + (batch * queries * heads + head) * D
    store_rows(out_base, rows, heads * (D // UNIT), queries, acc * scale, D, DIM)
