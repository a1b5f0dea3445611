"""Unmasking in Triton: the launch function, on tensors that fastdiff.ops has checked. README.md has the rules."""

import torch
import triton
from torch import Tensor

from fastdiff.kernels.common.triton_math import double_words, seed_words, word

from . import triton_device as device

CHUNK = 128  # positions a program orders or ranks,
OTHERS = 64  # and how many it compares them with at a time
COMMIT_CHUNK = 1024
RANDOM, FACTOR = 3, 2  # enums of unmask.h
RANKED = (0, 2, 3)  # count, factor, entropy_budget
MAX_LENGTH = 2**31 - 1 - COMMIT_CHUNK  # positions are 32-bit


def _index(rows: Tensor, positions: int) -> Tensor:
    """int32 [positions]: where the sample of a flat position lies, -1 where it has none."""
    index = torch.full((positions,), -1, dtype=torch.int32, device=rows.device)
    count = rows.shape[0]
    if count:
        grid = (triton.cdiv(count, COMMIT_CHUNK),)
        device.index_kernel[grid](
            rows_ptr=rows, index_ptr=index, count=count, positions=positions, CHUNK=COMMIT_CHUNK, num_warps=4
        )
    return index


def unmask_(
    token_ids: Tensor,  # int64 [B, L]
    token: Tensor,  # int64 [B, L], or [R] where rows is given; so are the other three
    log_prob: Tensor,
    entropy: Tensor,
    margin: Tensor,
    rows: Tensor | None,  # int64 [R], flat positions b * L + l, or -1
    block_start: Tensor | None,  # int64 [B]
    block_end: Tensor | None,  # int64 [B]
    active: Tensor | None,  # bool [B]
    rule: int,
    order: int,
    values: Tensor | None,  # fp32 [B]
    value: float,
    mask_token_id: int,
    seeds: Tensor | None,
    seed: int,
    steps: Tensor | None,
    step: int,
    sequence_ids: Tensor | None,  # int64 [B]
) -> Tensor:
    """Commits in place; returns how many positions of each row were written, int64 [B].

    rule and order are the enums of unmask.h; token_ids may have any row stride, all else is contiguous.
    Raises ValueError for more than 2^31 - 1025 positions in all.
    """
    batch, length = token_ids.shape
    if batch * length > MAX_LENGTH:
        raise ValueError(
            f"token_ids: {batch} x {length} positions; the triton backend takes at most {MAX_LENGTH}: split the batch"
        )
    committed = torch.zeros(batch, dtype=torch.int64, device=token_ids.device)
    if committed.numel() == 0 or length == 0 or token.numel() == 0:
        return committed

    def workspace(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(batch, columns, dtype=dtype, device=token_ids.device)

    chunks, ranked = triton.cdiv(length, CHUNK), rule in RANKED
    value_low, value_high = double_words(value)
    seed_low, seed_high = seed_words(seed)
    with torch.cuda.device_of(token_ids):
        index = None if rows is None else _index(rows, batch * length)
        where = {"block_start_ptr": block_start, "block_end_ptr": block_end, "active_ptr": active}
        value = {"values_ptr": values, "value_low": value_low, "value_high": value_high}
        sample = {"log_prob_ptr": log_prob, "entropy_ptr": entropy, "margin_ptr": margin}
        work = {"index_ptr": index, "order_ptr": workspace(length, torch.int64)}
        work |= {"turn_ptr": workspace(length, torch.int32), "length": length, "chunks": chunks}
        words = workspace(length, torch.int64) if rule == FACTOR and order == RANDOM else None
        device.order_kernel[(batch * chunks,)](
            token_ids_ptr=token_ids, token_ptr=token, **sample, **where, **value, **work, word_ptr=words,
            seed_ptr=seeds, step_ptr=steps, sequence_ids_ptr=sequence_ids, row_stride=token_ids.stride(0),
            mask_token_id=mask_token_id, seed_low=seed_low, seed_high=seed_high, step_number=word(step),
            RULE=rule, ORDER=order, CHUNK=CHUNK, num_warps=4,
        )  # fmt: skip
        failure = workspace(chunks, torch.int32) if ranked else None
        if ranked:
            device.rank_kernel[(batch * chunks,)](
                **sample, **where, **value, **work, word_ptr=words, failure_ptr=failure,
                RULE=rule, ORDER=order, CHUNK=CHUNK, OTHERS=OTHERS, num_warps=8,
            )  # fmt: skip
        device.commit_kernel[(batch,)](
            token_ids_ptr=token_ids, token_ptr=token, **work, failure_ptr=failure, committed_ptr=committed,
            row_stride=token_ids.stride(0), CHUNK=COMMIT_CHUNK, RULE=rule, RANKED=ranked, num_warps=4,
        )  # fmt: skip
    return committed
