"""eos_log_prob in Triton: the launch functions, on tensors that fastdiff.ops has checked. README.md has the rest.

logits are [B, L, V] with a contiguous last dimension and any other strides, in fp32, bf16 or fp16; hidden is contiguous
[B, L, D], weight [V, D] with contiguous rows; the two lists are int64 without duplicates. Nothing here waits for the
device, so that a graph can capture it. There is no autotuning: tools/triton_aot.py compiles every variant, and fails on
a spill.
"""

import torch
from torch import Tensor

from fastdiff.kernels.common import triton_logits as logits_of

from . import triton_device as device

BLOCK = logits_of.BLOCK.value
HEAD_TILE = 4096  # ids a matrix product of eos_log_prob makes: 8 % of the logits of GPT-2's vocabulary
BLOCK_WARPS, ROW_WARPS = 4, 4
MAX_REGISTERS = (
    255  # per thread; with this limit ptxas does not spill a register or two to fit more programs of few rows
)


class _Parts:
    """The workspace of a call, and the launches that fill it and put it together."""

    def __init__(self, like: Tensor, vocab: int, end_token_ids: Tensor, excluded_ids: Tensor):
        self.batch, self.length, self.vocab = like.shape[0], like.shape[1], vocab
        self.rows = self.batch * self.length
        self.blocks = logits_of.count_blocks(self.rows, vocab)
        self.result = torch.empty(like.shape[:2], dtype=torch.float32, device=like.device)
        lists = ((excluded_ids, logits_of.SUPPRESSED), (end_token_ids, logits_of.END))
        self.kinds = logits_of.kinds_of(vocab, like.device, *lists)
        self.parts = torch.empty(device.FIELDS, self.rows, self.blocks, dtype=torch.float64, device=like.device)

    def see(self, logits: Tensor, first_block: int, tile_blocks: int) -> None:
        """logits [B, L, ids], or [B * L, ids], of the blocks from first_block on."""
        flat = logits.ndim == 2
        device.eos_block_kernel[(self.rows * tile_blocks,)](
            logits_ptr=logits, kinds_ptr=self.kinds, parts_ptr=self.parts, rows=self.rows,
            length=self.rows if flat else self.length, batch_stride=0 if flat else logits.stride(0),
            row_stride=logits.stride(-2), vocab=self.vocab, blocks=self.blocks, first_block=first_block,
            tile_blocks=tile_blocks, ALIGNED=logits_of.aligned(logits), num_warps=BLOCK_WARPS,
        )  # fmt: skip

    def finish(self) -> Tensor:
        device.eos_row_kernel[(self.rows,)](
            parts_ptr=self.parts, end_log_prob_ptr=self.result, rows=self.rows, blocks=self.blocks,
            NBLOCKS=logits_of.padded_blocks(self.blocks), num_warps=ROW_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        return self.result


def eos_log_prob_from_logits(
    logits: Tensor,  # [B, L, V]
    end_token_ids: Tensor,
    excluded_ids: Tensor,  # they and the suppressed ids
) -> Tensor:
    """log P(one of end_token_ids), fp32 [B, L]; NaN for rows without a distribution.

    Raises ValueError for more than 1 048 576 ids, or 2^31 - 1 blocks in all.
    """
    parts = _Parts(logits, logits.shape[2], end_token_ids, excluded_ids)
    if parts.rows == 0:
        return parts.result
    with torch.cuda.device_of(logits):
        parts.see(logits, 0, parts.blocks)
        return parts.finish()


def eos_log_prob(
    hidden: Tensor,  # [B, L, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    end_token_ids: Tensor,
    excluded_ids: Tensor,
) -> Tensor:
    """eos_log_prob_from_logits(hidden @ weight.T + bias), rounded to hidden's dtype, HEAD_TILE ids at a time.

    The product is torch's; hidden, weight and bias have one dtype. Raises as eos_log_prob_from_logits does.
    """
    parts = _Parts(hidden, weight.shape[0], end_token_ids, excluded_ids)
    if parts.rows == 0:
        return parts.result
    tile = min(HEAD_TILE, parts.blocks * BLOCK)
    logits = torch.empty(parts.rows, tile, dtype=hidden.dtype, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for begin, end in logits_of.head_tiles(hidden.view(parts.rows, -1), weight, bias, logits):
            parts.see(logits, begin // BLOCK, -(-(end - begin) // BLOCK))
        return parts.finish()
