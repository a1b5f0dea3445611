"""QGFD attention in Triton: the device code. triton_kernels.py launches it; README.md has the mathematics.

Heads are [B, H, L, D], read in place by their strides, which come in units of 8 elements: so Triton knows that rows are
aligned, and compiles nothing new for another length. D is padded to DIM, a power of two, in registers. Scores are in
base 2: `scale_log2` is the scale times log2(e). A query's keys are those of its interval (begin_ptr, end_ptr) that
key_mask_ptr allows; tiles of keys that no query of a program sees are skipped. They would add exact zeros, so that a
row is the same whatever shares its tile; every sum runs in the order of the tiles.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
RANGE_ROWS = tl.constexpr(1024)
SIZES = ["heads", "group", "queries", "keys", "tiles", "hops", "saved", "rows_count"]
SIZES += ["begin_batch_stride", "end_batch_stride", "span_batch_stride", "hop_stride"]
SIZES += [f"{t}_{of}_stride" for t in ("query", "key", "value", "out") for of in ("batch", "head", "row")]
UNIT = tl.constexpr(8)  # of strides


@triton.jit
def _place(tiles, heads):
    """The (batch, head, tile) of this program: a head's tiles run next to each other."""
    program = tl.program_id(0)
    head = program // tiles
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), program % tiles


@triton.jit
def _load(base, rows, row_stride, count, D: tl.constexpr, DIM: tl.constexpr, INSIDE: tl.constexpr):
    """[ROWS, DIM]: zeros past D, and past the last of `count` rows unless all are INSIDE."""
    columns = tl.arange(0, DIM)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * row_stride * UNIT + columns
    if INSIDE and D == DIM:
        values = tl.load(pointers)
    elif INSIDE:
        values = tl.load(pointers, mask=columns < D, other=0.0)
    elif D == DIM:
        values = tl.load(pointers, mask=rows[:, None] < count, other=0.0)
    else:
        values = tl.load(pointers, mask=(rows[:, None] < count) & (columns < D), other=0.0)
    return values


@triton.jit
def _store(base, rows, row_stride, count, values, D: tl.constexpr, DIM: tl.constexpr):
    """Rounds and stores the rows below `count`."""
    columns = tl.arange(0, DIM)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * row_stride * UNIT + columns
    mask = rows[:, None] < count
    if D != DIM:
        mask = mask & (columns < D)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _products(
    a, b, acc, a_base, a_rows, a_stride, a_count, b_base, b_rows, b_stride, b_count,
    D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """acc + a b^T of two loaded tiles; fp32 ones, which registers must hold, are read again, CHUNK columns a time."""
    if CHUNK == DIM:
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    else:
        for start in range(0, DIM, CHUNK):
            columns = start + tl.arange(0, CHUNK)[None, :]
            a_mask = (a_rows[:, None] < a_count) & (columns < D)
            b_mask = (b_rows[:, None] < b_count) & (columns < D)
            a_part = tl.load(a_base + a_rows.to(tl.int64)[:, None] * a_stride * UNIT + columns, mask=a_mask, other=0.0)
            b_part = tl.load(b_base + b_rows.to(tl.int64)[:, None] * b_stride * UNIT + columns, mask=b_mask, other=0.0)
            acc = tl.dot(a_part, tl.trans(b_part), acc, input_precision="ieee")
    return acc


@triton.jit
def _intervals(begin_ptr, end_ptr, begin_offset, end_offset, rows, queries, keys):
    """The first key that each row sees, and the one after the last; rows past the last are as the last."""
    rows = tl.minimum(rows, queries - 1)
    begin = rows * 0
    end = begin + keys
    if begin_ptr is not None:
        begin = tl.maximum(tl.load(begin_ptr + begin_offset + rows), 0)
    if end_ptr is not None:
        end = tl.minimum(tl.load(end_ptr + end_offset + rows), keys)
    return begin, end


@triton.jit
def _spans(begin, end, keys, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """Where tiles of keys start and stop that: some row may see; every row sees the whole of (MASKED: none)."""
    some = begin < end
    first = tl.min(tl.where(some, begin, keys), axis=0) // KEYS * KEYS
    last = tl.max(tl.where(some, end, 0), axis=0)
    whole_first = last
    whole_last = last
    if not MASKED:
        whole_first = tl.minimum(tl.cdiv(tl.max(begin, axis=0), KEYS) * KEYS, last)
        whole_last = tl.maximum(tl.min(end, axis=0) // KEYS * KEYS, whole_first)
    return first, whole_first, whole_last, last


@triton.jit
def _bounds(SPAN: tl.constexpr, first, whole_first, whole_last, last):
    """Where the tiles start and stop before (0), within (1) and after (2) those that every row sees the whole of."""
    if SPAN == 0:
        start, stop = first, whole_first
    elif SPAN == 1:
        start, stop = whole_first, whole_last
    else:
        start, stop = whole_last, last
    return start, stop


@triton.jit
def _masked(s, columns, begin, end, key_mask_ptr, key_mask_offset, keys, WHOLE: tl.constexpr):
    """[ROWS, KEYS]: -inf where a row does not see a key; WHOLE: each sees all."""
    if not WHOLE:
        seen = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
        if key_mask_ptr is not None:
            allowed = tl.load(key_mask_ptr + key_mask_offset + columns, mask=columns < keys, other=0)
            seen = seen & (allowed != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=SIZES)
def hop_kernel(
    query_ptr, query_batch_stride, query_head_stride, query_row_stride,
    key_ptr, key_batch_stride, key_head_stride, key_row_stride,
    value_ptr, value_batch_stride, value_head_stride, value_row_stride,
    out_ptr, out_batch_stride, out_head_stride, out_row_stride,
    key_mask_ptr, begin_ptr, begin_batch_stride, end_ptr, end_batch_stride, lse_ptr,
    heads, group, queries, keys, tiles, scale_log2,
    FIRST: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out = round(M * value) for one tile of queries. Grid: (batch * heads * tiles,).

    FIRST: the softmax is made as the keys go by, and lse_ptr, if any, is filled; value has key's heads. Otherwise
    lse_ptr has the log sum exp of each row, and value a head a query head.
    """
    batch, head, tile = _place(tiles, heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    value_head = head
    if FIRST:
        value_head = head // group
    v_base = value_ptr + (batch * value_batch_stride + value_head * value_head_stride) * UNIT
    lse_base = lse_ptr
    if lse_ptr is not None:
        lse_base = lse_ptr + (batch * heads + head) * queries
    begin, end = _intervals(
        begin_ptr, end_ptr, batch * begin_batch_stride, batch * end_batch_stride, rows, queries, keys
    )
    q = _load(q_base, rows, query_row_stride, queries, D, DIM, False)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    if not FIRST:
        maximum = tl.load(lse_base + rows, mask=rows < queries, other=0.0) * LOG2_E
    first, whole_first, whole_last, last = _spans(begin, end, keys, KEYS, key_mask_ptr is not None)
    for span in tl.static_range(3):  # keys that some rows see, that all rows see, that some rows see
        if (key_mask_ptr is None and (span > 0 or begin_ptr is not None)) or (key_mask_ptr is not None and span == 0):
            start, stop = _bounds(span, first, whole_first, whole_last, last)
            for column in range(start, stop, KEYS):
                columns = column + tl.arange(0, KEYS)
                k = _load(k_base, columns, key_row_stride, keys, D, DIM, span == 1)
                s = _products(
                    q, k, tl.zeros([ROWS, KEYS], tl.float32), q_base, rows, query_row_stride, queries,
                    k_base, columns, key_row_stride, keys, D, DIM, CHUNK,
                )  # fmt: skip
                s = _masked(s * scale_log2, columns, begin, end, key_mask_ptr, batch * keys, keys, span == 1)
                if FIRST:
                    higher = tl.maximum(maximum, tl.max(s, axis=1))
                    origin = tl.where(higher == float("-inf"), 0.0, higher)
                    p = tl.exp2(s - origin[:, None])
                    shrink = tl.exp2(maximum - origin)
                    total = total * shrink + tl.sum(p, axis=1)
                    acc = acc * shrink[:, None]
                    maximum = higher
                else:
                    p = tl.exp2(s - maximum[:, None])
                v = _load(v_base, columns, value_row_stride, keys, D, DIM, span == 1)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if FIRST:
        total = tl.where(total == 0.0, 1.0, total)  # a row that attends to nothing: zeros, and 0
        acc = acc / total[:, None]
        if lse_ptr is not None:
            origin = tl.where(maximum == float("-inf"), 0.0, maximum)
            tl.store(lse_base + rows, (origin + tl.log2(total)) * LN_2, mask=rows < queries)
    out_base = out_ptr + (batch * out_batch_stride + head * out_head_stride) * UNIT
    _store(out_base, rows, out_row_stride, queries, acc, D, DIM)


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
        begin, end = _intervals(
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
        begin, end = _intervals(begin_ptr, end_ptr, begin_offset, end_offset, rows, queries, keys)
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
    batch, head, tile = _place(tiles, heads)
    columns = tile * KEYS + tl.arange(0, KEYS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    lse_base = lse_ptr + (batch * heads + head) * queries
    h_base = h_ptr + (batch * heads + head) * queries * D
    k = _load(k_base, columns, key_row_stride, keys, D, DIM, False)
    acc = tl.zeros([KEYS, DIM], tl.float32)
    first, last = _query_span(span_ptr, batch, span_batch_stride, tile, queries, ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        q = _load(q_base, rows, query_row_stride, queries, D, DIM, False)
        s = _products(
            k, q, tl.zeros([KEYS, ROWS], tl.float32), k_base, columns, key_row_stride, keys,
            q_base, rows, query_row_stride, queries, D, DIM, CHUNK,
        )  # fmt: skip
        p = _transposed_weights(
            s * scale_log2, columns, rows, lse_base, begin_ptr, end_ptr,
            batch * begin_batch_stride, batch * end_batch_stride, queries, keys,
        )  # fmt: skip
        h = _load(h_base, rows, D // UNIT, queries, D, DIM, False)
        acc = tl.dot(p.to(h.dtype), h, acc, input_precision="ieee")
    acc = _only_allowed(acc, key_mask_ptr, batch * keys, columns, keys)
    _store(out_ptr + (batch * heads + head) * keys * D, columns, D // UNIT, keys, acc, D, DIM)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    h_ptr, passes_ptr, out_ptr, delta_ptr, heads, queries, rows_count, hops, saved,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = the sum over hops of rowsum(h y), fp32, one a row of [B, H, L]; the last y is `out` if it was not saved.

    h is [hops, B, H, L, D], passes [saved, B, H, L, D], out [B, L, H, D]. Grid: (rows / ROWS,).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    delta = tl.zeros([ROWS], tl.float32)
    stride = rows_count.to(tl.int64) * D
    for hop in range(0, saved):
        offset = hop * stride
        h = _load(h_ptr + offset, rows, D // UNIT, rows_count, D, DIM, False).to(tl.float32)
        delta += tl.sum(
            h * _load(passes_ptr + offset, rows, D // UNIT, rows_count, D, DIM, False).to(tl.float32), axis=1
        )
    if saved < hops:
        head = rows // queries
        places = (head // heads * queries + rows % queries) * heads + head % heads
        places = tl.where(rows < rows_count, places, rows_count)
        h = _load(h_ptr + saved * stride, rows, D // UNIT, rows_count, D, DIM, False).to(tl.float32)
        delta += tl.sum(h * _load(out_ptr, places, D // UNIT, rows_count, D, DIM, False).to(tl.float32), axis=1)
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
    batch, head, tile = _place(tiles, heads)
    columns = tile * KEYS + tl.arange(0, KEYS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    v_base = value_ptr + (batch * value_batch_stride + head // group * value_head_stride) * UNIT
    index = batch * heads + head
    h_base = h_ptr + index * queries * D
    k = _load(k_base, columns, key_row_stride, keys, D, DIM, False)
    v = _load(v_base, columns, value_row_stride, keys, D, DIM, False)
    grad_key = tl.zeros([KEYS, DIM], tl.float32)
    grad_value = tl.zeros([KEYS, DIM], tl.float32)
    first, last = _query_span(span_ptr, batch, span_batch_stride, tile, queries, ROWS)
    for row in range(first, last, ROWS):
        rows = row + tl.arange(0, ROWS)
        q = _load(q_base, rows, query_row_stride, queries, D, DIM, False)
        s = _products(
            k, q, tl.zeros([KEYS, ROWS], tl.float32), k_base, columns, key_row_stride, keys,
            q_base, rows, query_row_stride, queries, D, DIM, CHUNK,
        )  # fmt: skip
        p = _transposed_weights(
            s * scale_log2, columns, rows, lse_ptr + index * queries, begin_ptr, end_ptr,
            batch * begin_batch_stride, batch * end_batch_stride, queries, keys,
        )  # fmt: skip
        h = _load(h_base, rows, D // UNIT, queries, D, DIM, False)
        grad_value = tl.dot(p.to(h.dtype), h, grad_value, input_precision="ieee")
        ds = _products(
            v, h, tl.zeros([KEYS, ROWS], tl.float32), v_base, columns, value_row_stride, keys,
            h_base, rows, D // UNIT, queries, D, DIM, CHUNK,
        )  # fmt: skip
        if MANY:  # u_j h_{j+1}^T
            u_base, h_next = hidden_ptr + index * keys * D, h_base
            for _ in range(1, hops):
                h_next += hop_stride * UNIT
                u = _load(u_base, columns, D // UNIT, keys, D, DIM, False)
                g = _load(h_next, rows, D // UNIT, queries, D, DIM, False)
                ds = _products(
                    u, g, ds, u_base, columns, D // UNIT, keys, h_next, rows, D // UNIT, queries, D, DIM, CHUNK
                )
                u_base += hop_stride * UNIT
        delta = tl.load(delta_ptr + index * queries + rows, mask=rows < queries, other=0.0)
        ds = p * (ds - delta[None, :])
        grad_key = tl.dot(ds.to(q.dtype), q, grad_key, input_precision="ieee")
    grad_key = _only_allowed(grad_key * scale, key_mask_ptr, batch * keys, columns, keys)
    grad_value = _only_allowed(grad_value, key_mask_ptr, batch * keys, columns, keys)
    if value_sum_ptr is not None:
        grad_value += _load(value_sum_ptr + index * keys * D, columns, D // UNIT, keys, D, DIM, False)
    out = (batch * keys * heads + head) * D
    _store(grad_key_ptr + out, columns, heads * (D // UNIT), keys, grad_key, D, DIM)
    _store(grad_value_ptr + out, columns, heads * (D // UNIT), keys, grad_value, D, DIM)


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
    batch, head, tile = _place(tiles, heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    v_base = value_ptr + (batch * value_batch_stride + head // group * value_head_stride) * UNIT
    index = batch * heads + head
    h_base = h_ptr + index * queries * D
    begin, end = _intervals(
        begin_ptr, end_ptr, batch * begin_batch_stride, batch * end_batch_stride, rows, queries, keys
    )
    q = _load(q_base, rows, query_row_stride, queries, D, DIM, False)
    h = _load(h_base, rows, D // UNIT, queries, D, DIM, False)
    lse = tl.load(lse_ptr + index * queries + rows, mask=rows < queries, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + index * queries + rows, mask=rows < queries, other=0.0)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    first, whole_first, whole_last, last = _spans(begin, end, keys, KEYS, key_mask_ptr is not None)
    for span in tl.static_range(3):
        if (key_mask_ptr is None and (span > 0 or begin_ptr is not None)) or (key_mask_ptr is not None and span == 0):
            start, stop = _bounds(span, first, whole_first, whole_last, last)
            for column in range(start, stop, KEYS):
                columns = column + tl.arange(0, KEYS)
                k = _load(k_base, columns, key_row_stride, keys, D, DIM, span == 1)
                s = _products(
                    q, k, tl.zeros([ROWS, KEYS], tl.float32), q_base, rows, query_row_stride, queries,
                    k_base, columns, key_row_stride, keys, D, DIM, CHUNK,
                )  # fmt: skip
                s = _masked(s * scale_log2, columns, begin, end, key_mask_ptr, batch * keys, keys, span == 1)
                v = _load(v_base, columns, value_row_stride, keys, D, DIM, span == 1)
                ds = _products(
                    h, v, tl.zeros([ROWS, KEYS], tl.float32), h_base, rows, D // UNIT, queries,
                    v_base, columns, value_row_stride, keys, D, DIM, CHUNK,
                )  # fmt: skip
                if MANY:  # h_{j+1} u_j^T
                    u_base, h_next = hidden_ptr + index * keys * D, h_base
                    for _ in range(1, hops):
                        h_next += hop_stride * UNIT
                        u = _load(u_base, columns, D // UNIT, keys, D, DIM, span == 1)
                        g = _load(h_next, rows, D // UNIT, queries, D, DIM, False)
                        ds = _products(
                            g, u, ds, h_next, rows, D // UNIT, queries, u_base, columns, D // UNIT, keys, D, DIM, CHUNK
                        )  # fmt: skip
                        u_base += hop_stride * UNIT
                ds = _weight(s - lse[:, None]) * (ds - delta[:, None])
                acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    out_base = grad_query_ptr + (batch * queries * heads + head) * D
    _store(out_base, rows, heads * (D // UNIT), queries, acc * scale, D, DIM)
