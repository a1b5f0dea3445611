"""The masked loss's row kernel in Triton: the device code. triton_kernels.py launches it; README.md has the rest."""

import triton
import triton.language as tl

from fastdiff.kernels.common.triton_math import as_double, log1p


@triton.jit
def _load_logits(ptr, ids, vocab, suppressed_ptr):
    """ptr[ids] as fp32, and which of them are allowed; -inf where not."""
    allowed = ids < vocab
    z = tl.load(ptr + ids, mask=allowed, other=float("-inf")).to(tl.float32)
    if suppressed_ptr is not None:
        allowed = allowed & (tl.load(suppressed_ptr + ids, mask=allowed, other=1) == 0)
        z = tl.where(allowed, z, float("-inf"))
    return z, allowed


@triton.jit
def _load_target(ptr, target, vocab, suppressed_ptr):
    """The target's logit, NaN where the target is not an allowed id."""
    allowed = (target >= 0) & (target < vocab)
    if suppressed_ptr is not None:
        allowed = allowed & (tl.load(suppressed_ptr + target, mask=allowed, other=1) == 0)
    return tl.load(ptr + target, mask=allowed, other=float("nan")).to(tl.float32)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=["smoothing_low", "smoothing_high", "allowed_count"])
def cross_entropy_kernel(
    logits_ptr, targets_ptr, row_weight_ptr, suppressed_ptr, row_loss_ptr,
    vocab, allowed_count, smoothing_low, smoothing_high,
    SMOOTH: tl.constexpr, WANT_GRAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The loss of one row, and its gradient in the logits' place. Grid: (rows,).

    The target's weight is kept apart from the sum of the others, which so keeps its digits where it is far below one:
    the loss of a near-certain row is log1p of it, and p[target] - 1 needs no subtraction. Each lane has a maximum and a
    sum of its own; they meet in fp64.
    """
    row = tl.program_id(0)
    ptr = logits_ptr + row.to(tl.int64) * vocab
    target = tl.load(targets_ptr + row)
    z_target = _load_target(ptr, target, vocab, suppressed_ptr)
    tl.debug_barrier()  # all threads have read it before one writes the gradient there
    anchor = tl.where(_finite(z_target), z_target, 0.0)

    tile = tl.arange(0, TILE)
    lane_maximum = tl.full([TILE], float("-inf"), tl.float32)
    lane_sum = tl.zeros([TILE], tl.float32)
    lane_difference = tl.zeros([TILE], tl.float32)
    for first in range(0, vocab, TILE):
        ids = first + tile
        z, allowed = _load_logits(ptr, ids, vocab, suppressed_ptr)
        if SMOOTH:
            lane_difference += tl.where(allowed, z - anchor, 0.0)
        z = tl.where(ids == target, float("-inf"), z)
        maximum = tl.maximum(lane_maximum, z)
        origin = tl.where(maximum == float("-inf"), 0.0, maximum)
        lane_sum = lane_sum * tl.exp(lane_maximum - origin) + tl.exp(z - origin)
        lane_maximum = maximum
    maximum = tl.maximum(tl.max(lane_maximum, axis=0), tl.where(z_target == z_target, z_target, float("-inf")))
    valid = _finite(maximum) & (z_target == z_target)
    maximum = tl.where(valid, maximum, 0.0)
    scale = tl.exp((lane_maximum - maximum).to(tl.float64))
    others = tl.sum(lane_sum.to(tl.float64) * scale, axis=0)
    others = tl.where(valid, others, float("nan"))
    below = (z_target - maximum).to(tl.float64)
    total = others + tl.exp(below)
    loss = tl.where(below == 0.0, log1p(others), tl.log(total) - below)
    smoothing = as_double(smoothing_low, smoothing_high)
    if SMOOTH:
        # (1 - e) * loss + e * mean(loss of every id), and that mean is loss - mean(z - z_target)
        missing = (anchor - z_target).to(tl.float64)  # +inf where the target's own logit is -inf
        mean = tl.sum(lane_difference.to(tl.float64), axis=0) / allowed_count
        loss = tl.where(missing == 0.0, loss - smoothing * mean, missing)
    tl.store(row_loss_ptr + row, tl.where(valid, loss, float("nan")).to(tl.float32))

    if WANT_GRAD:
        weight = tl.full([], 1.0, tl.float64)
        if row_weight_ptr is not None:
            weight = tl.load(row_weight_ptr + row).to(tl.float64)
        factor = (weight / total).to(tl.float32)
        uniform = smoothing / allowed_count
        shift = (weight * uniform).to(tl.float32)
        at_target = (weight * (smoothing - uniform - others / total)).to(tl.float32)
        for first in range(0, vocab, TILE):
            ids = first + tile
            z, allowed = _load_logits(ptr, ids, vocab, suppressed_ptr)
            gradient = tl.where(ids == target, at_target, tl.exp(z - maximum) * factor - shift)
            gradient = tl.where(allowed, gradient, 0.0)
            tl.store(ptr + ids, gradient.to(logits_ptr.dtype.element_ty), mask=ids < vocab)
