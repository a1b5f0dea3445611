"""QGFD attention in Triton: the device code of a hop, and what the backward pass shares (triton_backward_device.py).

triton_kernels.py launches it; README.md has the mathematics.

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
SIZES = ["heads", "group", "queries", "keys", "tiles", "hops", "saved", "rows_count"]
SIZES += ["begin_batch_stride", "end_batch_stride", "span_batch_stride", "hop_stride"]
SIZES += [f"{t}_{of}_stride" for t in ("query", "key", "value", "out") for of in ("batch", "head", "row")]
UNIT = tl.constexpr(8)  # of strides


@triton.jit
def place(tiles, heads):
    """The (batch, head, tile) of this program: a head's tiles run next to each other."""
    program = tl.program_id(0)
    head = program // tiles
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), program % tiles


@triton.jit
def load_rows(base, rows, row_stride, count, D: tl.constexpr, DIM: tl.constexpr, INSIDE: tl.constexpr):
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
def store_rows(base, rows, row_stride, count, values, D: tl.constexpr, DIM: tl.constexpr):
    """Rounds and stores the rows below `count`."""
    columns = tl.arange(0, DIM)[None, :]
    pointers = base + rows.to(tl.int64)[:, None] * row_stride * UNIT + columns
    mask = rows[:, None] < count
    if D != DIM:
        mask = mask & (columns < D)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def products(
    a, b, acc, a_base, a_rows, a_stride, a_count, b_base, b_rows, b_stride, b_count,
    D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """acc + a b^T of two loaded tiles; fp32 ones, which registers must hold, are read again in CHUNK columns."""
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
def intervals(begin_ptr, end_ptr, begin_offset, end_offset, rows, queries, keys):
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
def spans(begin, end, keys, KEYS: tl.constexpr, MASKED: tl.constexpr):
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
def bounds(SPAN: tl.constexpr, first, whole_first, whole_last, last):
    """Where the tiles start and stop before (0), within (1) and after (2) those that every row sees the whole of."""
    if SPAN == 0:
        start, stop = first, whole_first
    elif SPAN == 1:
        start, stop = whole_first, whole_last
    else:
        start, stop = whole_last, last
    return start, stop


@triton.jit
def masked(s, columns, begin, end, key_mask_ptr, key_mask_offset, keys, WHOLE: tl.constexpr):
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
    key_mask_ptr, begin_ptr, begin_batch_stride, end_ptr, end_batch_stride,
    maximum_ptr, total_ptr, lse_ptr, heads, group, queries, keys, tiles, scale_log2,
    FIRST: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out = round(M * value) for one tile of queries. Grid: (batch * heads * tiles,).

    FIRST: the softmax is made as the keys go by; what of maximum_ptr and total_ptr (of a row's scores in base 2, and
    the sum of its weights under it) and lse_ptr is not None is filled; value has key's heads. Otherwise the first two
    are read, and value has one head per query head.
    """
    batch, head, tile = place(tiles, heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_base = query_ptr + (batch * query_batch_stride + head * query_head_stride) * UNIT
    k_base = key_ptr + (batch * key_batch_stride + head // group * key_head_stride) * UNIT
    value_head = head
    if FIRST:
        value_head = head // group
    v_base = value_ptr + (batch * value_batch_stride + value_head * value_head_stride) * UNIT
    places = (batch * heads + head) * queries + rows
    begin, end = intervals(
        begin_ptr, end_ptr, batch * begin_batch_stride, batch * end_batch_stride, rows, queries, keys
    )
    q = load_rows(q_base, rows, query_row_stride, queries, D, DIM, False)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    if not FIRST:
        maximum = tl.load(maximum_ptr + places, mask=rows < queries, other=0.0)
        total = tl.load(total_ptr + places, mask=rows < queries, other=1.0)
    first, whole_first, whole_last, last = spans(begin, end, keys, KEYS, key_mask_ptr is not None)
    for span in tl.static_range(3):  # keys that some rows see, that all rows see, that some rows see
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
                v = load_rows(v_base, columns, value_row_stride, keys, D, DIM, span == 1)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    if FIRST:
        total = tl.where(total == 0.0, 1.0, total)  # a row that attends to nothing: zeros, and a log sum exp of 0
        maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
        if maximum_ptr is not None:
            tl.store(maximum_ptr + places, maximum, mask=rows < queries)
            tl.store(total_ptr + places, total, mask=rows < queries)
        if lse_ptr is not None:
            tl.store(lse_ptr + places, (maximum + tl.log2(total)) * LN_2, mask=rows < queries)
    acc = acc / total[:, None]
    out_base = out_ptr + (batch * out_batch_stride + head * out_head_stride) * UNIT
    store_rows(out_base, rows, out_row_stride, queries, acc, D, DIM)
