"""Token sampling in Triton: the launch functions, on tensors that fastdiff.ops has checked. README.md has the rest.

logits are [B, L, V] with a contiguous last dimension and any other strides, in fp32, bf16 or fp16; hidden is contiguous
[B, L, D], weight [V, D] with contiguous rows. What belongs to rows is [B * L] and contiguous: temperatures (fp32),
sequence_ids, positions (int64). suppress_tokens and end_token_ids are int64 without duplicates, seeds and steps int64
scalars on the device. Nothing here waits for the device, so that a graph can capture it.

There is no autotuning. tools/triton_aot.py compiles every variant that these functions can pick, and fails on a spill.
"""

import torch
import triton
from torch import Tensor

from fastdiff.kernels.common import triton_logits as logits_of
from fastdiff.kernels.common.triton_math import double_words, seed_words, word

from . import triton_device as device
from . import triton_threshold_device as threshold_device

BLOCK = logits_of.BLOCK.value
CELL = 128
MAX_VOCAB = logits_of.MAX_VOCAB
HEAD_TILE = 8192  # ids a matrix product of lm_head_sample makes: 64 thread blocks of 128 columns, 6 % of 126 464 ids
SPAN = 4  # blocks that the search of a threshold reads at a time
DRAW_WARPS, HEAD_WARPS = 4, 8
MAX_REGISTERS = (
    255  # per thread; with this limit ptxas does not spill a register or two to fit more programs of few rows
)
HEAD_CHUNK = 64  # columns of hidden at a time, where a cell's logits are computed again


def _kinds(vocab: int, suppress_tokens: Tensor | None, end_token_ids: Tensor | None, device: torch.device):
    """uint8 [V]: SUPPRESSED (end tokens too), END or 0 for each id; None where neither is given."""
    return logits_of.kinds_of(vocab, device, (end_token_ids, logits_of.END), (suppress_tokens, logits_of.SUPPRESSED))


def _random(seeds, seed: int, steps, step: int, sequence_ids, positions) -> dict[str, object]:
    low, high = seed_words(seed)
    return {
        "seed_ptr": seeds, "step_ptr": steps, "sequence_ids_ptr": sequence_ids, "positions_ptr": positions,
        "seed_low": low, "seed_high": high, "step_number": word(step),
    }  # fmt: skip


def _temperature(temperatures: Tensor | None, temperature: float) -> tuple[dict[str, object], bool, bool]:
    """Arguments of the kernels, whether every row is greedy, and whether a row's T may be something else than 1."""
    low, high = double_words(temperature)
    arguments = {"temperatures_ptr": temperatures, "temperature_low": low, "temperature_high": high}
    return arguments, temperatures is None and temperature == 0, temperatures is not None or temperature != 1


class _Outputs:
    """token, log_prob, entropy, margin [B, L], and end_log_prob, [0] where it isn't asked for."""

    def __init__(self, like: Tensor, ends: bool):
        shape = like.shape[:2]
        self.token = torch.empty(shape, dtype=torch.int64, device=like.device)
        self.floats = [torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(3)]
        self.end = torch.empty(shape if ends else 0, dtype=torch.float32, device=like.device)

    def arguments(self) -> dict[str, object]:
        names = ("log_prob_ptr", "entropy_ptr", "margin_ptr")
        end = self.end if self.end.ndim == 2 else None
        return {"token_ptr": self.token, **dict(zip(names, self.floats, strict=True)), "end_log_prob_ptr": end}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.token, *self.floats, self.end


def _records(rows: int, blocks: int, like: Tensor) -> dict[str, Tensor]:
    return {
        "records_ptr": torch.empty(device.FIELDS, rows, blocks, dtype=torch.float64, device=like.device),
        "argmax_ptr": torch.empty(rows, blocks, dtype=torch.int32, device=like.device),
    }


def sample_tokens(
    logits: Tensor,  # [B, L, V]
    temperatures: Tensor | None,  # fp32 [B * L]
    temperature: float,
    top_k: int,
    top_p: float,
    suppress_tokens: Tensor | None,
    end_token_ids: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    steps: Tensor | None,
    step: int,
    sequence_ids: Tensor | None,  # None: the row of the batch
    positions: Tensor | None,  # None: the position in the row
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(token int64, log_prob, entropy, margin, end_log_prob fp32), each [B, L]; -1 and NaN without a distribution.

    top_k 0 and top_p 1.0 are off; end_log_prob is an empty [0] tensor where end_token_ids is None.
    Raises ValueError for more than 1 048 576 ids, or 2^31 - 1 blocks in all.
    """
    batch, length, vocab = logits.shape
    rows = batch * length
    blocks = logits_of.count_blocks(rows, vocab)
    out = _Outputs(logits, end_token_ids is not None)
    if rows == 0:
        return out.tensors()
    kinds = _kinds(vocab, suppress_tokens, end_token_ids, logits.device)
    heat, greedy, scaled = _temperature(temperatures, temperature)
    top_k = top_k if 0 < top_k < vocab else 0
    searched = not greedy and (top_k > 0 or top_p < 1)
    records = _records(rows, blocks, logits)
    common = {
        "logits_ptr": logits, "kinds_ptr": kinds, "rows": rows, "length": length, "vocab": vocab, "blocks": blocks,
        "batch_stride": logits.stride(0), "row_stride": logits.stride(1), "ALIGNED": logits_of.aligned(logits), **heat,
    }  # fmt: skip
    thresholds = None
    nblocks = logits_of.padded_blocks(blocks)
    with torch.cuda.device_of(logits):
        device.block_kernel[(rows * blocks,)](
            **common, **records, cells_ptr=None, first_block=0, tile_blocks=blocks, ENDS=end_token_ids is not None,
            SUMS=not greedy and not searched, SCALED=scaled, num_warps=4,
        )  # fmt: skip
        if searched:
            thresholds = torch.empty(rows, dtype=torch.float32, device=logits.device)
            low, high = double_words(top_p)
            threshold_device.threshold_kernel[(rows,)](
                **common, records_ptr=records["records_ptr"], thresholds_ptr=thresholds, top_k=top_k, top_p_low=low,
                top_p_high=high, SCALED=scaled, TOP_K=top_k > 0, TOP_P=top_p < 1, NBLOCKS=nblocks, SPAN=SPAN,
                num_warps=8,
            )  # fmt: skip
            threshold_device.kept_sum_kernel[(rows * blocks,)](
                **common, records_ptr=records["records_ptr"], thresholds_ptr=thresholds, SCALED=scaled, num_warps=4
            )
        device.draw_kernel[(rows,)](
            **common, **records, **_random(seeds, seed, steps, step, sequence_ids, positions), **out.arguments(),
            thresholds_ptr=thresholds, GREEDY=greedy, SCALED=scaled, NBLOCKS=nblocks,
            num_warps=DRAW_WARPS, maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return out.tensors()


def _draw_greedy_head(records, kinds, random, heat, out, rows, length, vocab, blocks, nblocks, like) -> None:
    """At temperature 0 the records have everything: no logit is read (draw_kernel's are any tensor of that dtype)."""
    device.draw_kernel[(rows,)](
        logits_ptr=like, kinds_ptr=kinds, thresholds_ptr=None, **records, **random, **heat, **out.arguments(),
        rows=rows, length=length, batch_stride=0, row_stride=0, vocab=vocab, blocks=blocks,
        ALIGNED=True, GREEDY=True, SCALED=True, NBLOCKS=nblocks, num_warps=DRAW_WARPS, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def lm_head_sample(
    hidden: Tensor,  # [B, L, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    temperatures: Tensor | None,  # fp32 [B * L]
    temperature: float,
    suppress_tokens: Tensor | None,
    end_token_ids: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    steps: Tensor | None,
    step: int,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sample_tokens(hidden @ weight.T + bias), rounded to hidden's dtype, HEAD_TILE ids at a time.

    The product is torch's; hidden, weight and bias have one dtype. Raises as sample_tokens does.
    """
    batch, length, dim = hidden.shape
    rows, vocab = batch * length, weight.shape[0]
    blocks = logits_of.count_blocks(rows, vocab)
    out = _Outputs(hidden, end_token_ids is not None)
    if rows == 0:
        return out.tensors()
    kinds = _kinds(vocab, suppress_tokens, end_token_ids, hidden.device)
    heat, greedy, scaled = _temperature(temperatures, temperature)
    records = _records(rows, blocks, hidden)
    cells = None
    if not greedy:
        cells = torch.empty(rows, blocks, BLOCK // CELL, dtype=torch.float64, device=hidden.device)
    tile = min(HEAD_TILE, blocks * BLOCK)
    logits = torch.empty(rows, tile, dtype=hidden.dtype, device=hidden.device)
    sizes = {"rows": rows, "length": length, "vocab": vocab, "blocks": blocks}
    random = _random(seeds, seed, steps, step, sequence_ids, positions)
    flat = hidden.view(rows, dim)
    nblocks = logits_of.padded_blocks(blocks)
    with torch.cuda.device_of(hidden):
        for begin, end in logits_of.head_tiles(flat, weight, bias, logits):
            tile_blocks = triton.cdiv(end - begin, BLOCK)
            device.block_kernel[(rows * tile_blocks,)](
                logits_ptr=logits, kinds_ptr=kinds, cells_ptr=cells, **records, **heat, rows=rows, length=rows,
                batch_stride=0, row_stride=tile, vocab=vocab, blocks=blocks, first_block=begin // BLOCK,
                tile_blocks=tile_blocks, ALIGNED=True, ENDS=end_token_ids is not None, SUMS=not greedy, SCALED=scaled,
                num_warps=4,
            )  # fmt: skip
        if greedy:
            _draw_greedy_head(records, kinds, random, heat, out, **sizes, nblocks=nblocks, like=logits)
        else:
            device.draw_head_kernel[(rows,)](
                hidden_ptr=hidden, weight_ptr=weight, bias_ptr=bias, kinds_ptr=kinds, cells_ptr=cells, **records,
                **random, **heat, **out.arguments(), **sizes, dim=dim, weight_stride=weight.stride(0),
                ALIGNED=dim % 16 == 0, SCALED=scaled, NBLOCKS=nblocks, CHUNK=HEAD_CHUNK,
                num_warps=HEAD_WARPS, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
    return out.tensors()
