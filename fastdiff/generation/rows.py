"""The rows of a batch that are still being decoded: their tokens, and where each is in its blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.generation.canvas import Canvas
from fastdiff.generation.config import MaskedDiffusionGenerationConfig

_OF_COLUMNS = ("ids", "used", "given")
_OF_ROWS = (
    "starts", "sequence_ids", "generated", "block", "end", "step_in_block", "masks_in_block", "encoder_states",
    "encoder_mask",
)  # fmt: skip


class Turn(NamedTuple):
    """Where a row is before a step, as Python numbers: masks left in its block, steps taken there, its columns."""

    left: int
    step: int
    begin: int
    end: int


class Rows:
    """Rows under way, `A` of a canvas's `B`, as wide as the longest of them: `ids` is `[A, W]`.

    `index` are their places in the canvas. Every row advances by itself, from block to block: the prompt's own masks,
    then the blocks of new tokens.
    """

    def __init__(
        self,
        canvas: Canvas,
        config: MaskedDiffusionGenerationConfig,
        encoder_states: Tensor | None,  # [B, M, D]
        encoder_mask: Tensor | None,  # bool [B, M]
    ) -> None:
        self.canvas, self.mask_token_id = canvas, canvas.mask_token_id
        self.new_tokens, self.block_length = config.max_new_tokens, config.block_length or max(config.max_new_tokens, 1)
        self.index, self.prompt_lengths = list(range(len(canvas.ids))), canvas.prompt_lengths
        self.ids, self.used, self.given, self.columns = canvas.ids, canvas.used, canvas.given, canvas.columns
        self.starts, self.sequence_ids = canvas.starts, canvas.sequence_ids
        self.encoder_states, self.encoder_mask = encoder_states, encoder_mask
        self.generated = (self.ids == self.mask_token_id).sum(1)  # int64 [A]
        self.block = torch.full_like(self.starts, -1)  # where the current block begins
        self.end = torch.full_like(self.starts, -1)
        self.step_in_block = torch.zeros_like(self.starts)
        self.masks_in_block = torch.zeros_like(self.starts)

    @property
    def width(self) -> int:
        """Columns, W."""
        return self.ids.shape[1]

    @property
    def attention_mask(self) -> Tensor | None:
        """True where a key may be attended to, or None where rows are equally long."""
        return None if len(set(self.prompt_lengths)) == 1 else self.used

    def keep(self, kept: list[int]) -> tuple[Tensor, int]:
        """Goes on with these rows alone; returns their places in what was, int64 `[a]`, and the new width."""
        self.write_back()
        self.index = [self.index[row] for row in kept]
        self.prompt_lengths = [self.prompt_lengths[row] for row in kept]
        width = max(self.prompt_lengths) + self.new_tokens
        rows = torch.tensor(kept, device=self.ids.device)
        for name in _OF_COLUMNS:
            setattr(self, name, getattr(self, name).index_select(0, rows)[:, :width].contiguous())
        for name in _OF_ROWS:
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).index_select(0, rows))
        self.columns = self.columns[:width]
        return rows, width

    def write_back(self) -> None:
        """Puts the tokens onto the canvas; while all rows are under way they lie there."""
        if self.ids is not self.canvas.ids:
            self.canvas.ids[torch.tensor(self.index, device=self.ids.device), : self.width] = self.ids

    def begin_step(self) -> Tensor:  # bool [A, W]
        """The positions that may be chosen in this step; notes which rows begin a block."""
        masked = self.ids == self.mask_token_id
        begin, end = self._bounds(masked)
        masked &= (self.columns >= begin[:, None]) & (self.columns < end[:, None])
        fresh = begin != self.block
        self.step_in_block = torch.where(fresh, 0, self.step_in_block + 1)
        self.masks_in_block = torch.where(fresh, masked.sum(1), self.masks_in_block)
        self.block, self.end = begin, end
        return masked

    def turns(self, masked: Tensor) -> list[Turn]:
        """Where the rows are, asked of the device."""
        return [
            Turn(*row) for row in torch.stack([masked.sum(1), self.step_in_block, self.block, self.end], 1).tolist()
        ]

    def _bounds(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Begin and end of each row's block, the one of its first masked position: the prompt, or one of new tokens."""
        first, starts, length = masked.to(torch.int8).argmax(1), self.starts, self.block_length
        begin = starts + (first - starts) // length * length
        prompt = first < starts
        return torch.where(prompt, 0, begin), torch.where(prompt, starts, begin + length)


def planned_turns(infilled: int, prompt_length: int, config: MaskedDiffusionGenerationConfig) -> list[Turn]:
    """All turns of a row under the rule "count", which are known before: nothing is asked of the device."""
    steps = config.steps_per_block
    length = config.block_length or config.max_new_tokens
    starts = range(prompt_length, prompt_length + config.max_new_tokens, max(length, 1))
    turns = []
    for masks, begin, end in [(infilled, 0, prompt_length), *((length, start, start + length) for start in starts)]:
        left, total = masks, steps or masks
        for step in range(min(masks, total)):
            turns.append(Turn(left, step, begin, end))
            left -= masks // total + (step < masks % total)
    return turns
