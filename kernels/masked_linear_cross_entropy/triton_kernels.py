"""The masked loss's row kernel in Triton: the launch function, on tensors that fastdiff.ops has checked."""

import torch
import triton
from torch import Tensor

from fastdiff.kernels.common.triton_math import double_words

from . import triton_device as device

MIN_TILE, MAX_TILE = 128, 4096  # ids that a program reads at a time
TILE_PER_WARP = 256  # 8 a thread: 16 spill on sm_100
MAX_ROWS = 2**31 - 1  # a grid's first dimension
MAX_VOCAB = 2**31 - 1 - MAX_TILE  # ids are 32-bit


def cross_entropy_rows_(
    logits: Tensor,  # [C, V] contiguous, fp32, bf16 or fp16
    targets: Tensor,  # int64 [C]
    row_weight: Tensor | None,  # fp32 [C], factors of the gradient
    suppress_tokens: Tensor | None,  # int64, no id twice
    label_smoothing: float,
    want_grad: bool,
) -> Tensor:
    """Loss of each row [C] in fp32, in nats and without row_weight; want_grad: the gradient takes the logits' place.

    A row whose target is not an allowed id, or that has no distribution (NaN, +inf, nothing above -inf), becomes NaN,
    loss and gradient; the gradient at suppressed ids is always 0.
    Raises ValueError for more than 2^31 - 1 rows or about as many ids.
    """
    rows, vocab = logits.shape
    if rows > MAX_ROWS or vocab > MAX_VOCAB:
        raise ValueError(
            f"logits: {rows} x {vocab}; the triton backend takes at most {MAX_ROWS} rows of {MAX_VOCAB} ids: take fewer"
        )
    row_loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows == 0:
        return row_loss
    suppressed, allowed = None, vocab
    if suppress_tokens is not None and suppress_tokens.shape[0] > 0:
        allowed -= suppress_tokens.shape[0]
        suppressed = torch.zeros(vocab, dtype=torch.uint8, device=logits.device).index_fill_(0, suppress_tokens, 1)
    tile = min(max(triton.next_power_of_2(vocab), MIN_TILE), MAX_TILE)
    low, high = double_words(label_smoothing)
    with torch.cuda.device_of(logits):
        device.cross_entropy_kernel[(rows,)](
            logits_ptr=logits, targets_ptr=targets, row_weight_ptr=row_weight, suppressed_ptr=suppressed,
            row_loss_ptr=row_loss, vocab=vocab, allowed_count=allowed, smoothing_low=low, smoothing_high=high,
            SMOOTH=label_smoothing > 0, WANT_GRAD=want_grad, TILE=tile, num_warps=max(tile // TILE_PER_WARP, 1),
        )  # fmt: skip
    return row_loss
