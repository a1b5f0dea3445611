"""The rows of a batch that are still being decoded: their tokens, and where each is in its blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.generation.canvas import Canvas
from fastdiff.generation.config import MaskedDiffusionGenerationConfig

_OF_COLUMNS = ("ids", "used", "given")
_OF_ROWS = (
    "starts", "origin", "stops", "block_length", "steps", "sequence_ids", "generated", "block", "end", "step_in_block",
    "masks_in_block", "encoder_states", "encoder_mask",
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

    Args:
        index: of the rows; None is all.
        blocks: length of each row's blocks where config.block_length is None, counted from its end: a window, or what
            it grew by.
    """

    def __init__(
        self,
        canvas: Canvas,
        config: MaskedDiffusionGenerationConfig,
        encoder_states: Tensor | None,  # [B, M, D]
        encoder_mask: Tensor | None,  # bool [B, M]
        index: list[int] | None = None,
        blocks: list[int] | None = None,
    ) -> None:
        self.canvas, self.mask_token_id = canvas, canvas.mask_token_id
        self.index = list(range(len(canvas.ids)))
        # where each row's last new token is followed by filling
        self.lengths = [prompt + window for prompt, window in zip(canvas.prompt_lengths, canvas.windows, strict=True)]
        self.ids, self.used, self.given, self.columns = canvas.ids, canvas.used, canvas.given, canvas.columns
        self.starts, self.sequence_ids = canvas.starts, canvas.sequence_ids
        self.encoder_states, self.encoder_mask = encoder_states, encoder_mask
        self.generated = self._tensor(canvas.generated)
        self.stops = self._tensor(self.lengths)
        self.origin = self.starts
        self.block_length = self._tensor([config.block_length or max(window, 1) for window in canvas.windows])
        self.steps = None
        self._select(None if index == self.index else index)
        if blocks is not None and not config.block_length:
            self.block_length = self._tensor(blocks)
            self.origin = self.stops - self.block_length
        if config.num_inference_steps is not None:
            whole = max(config.max_new_tokens, 1)  # steps of a block are its share of those of max_new_tokens
            lengths = self.block_length if config.max_new_tokens else torch.ones_like(self.block_length)
            self.steps = ((2 * config.num_inference_steps * lengths + whole) // (2 * whole)).clamp(min=1)
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
        return None if len(set(self.lengths)) == 1 else self.used

    def keep(self, kept: list[int]) -> tuple[Tensor, int]:
        """Goes on with these rows alone; returns their places in what was, int64 `[a]`, and the new width."""
        self.write_back()
        return self._select(kept), self.width

    def _select(self, kept: list[int] | None) -> Tensor | None:
        """Takes these rows, and no more columns than they have."""
        if kept is not None:
            self.index = [self.index[row] for row in kept]
            self.lengths = [self.lengths[row] for row in kept]
        width, rows = max(self.lengths), None if kept is None else self._tensor(kept)
        if rows is None and width == self.width:
            return rows
        for name in _OF_COLUMNS:
            whole = getattr(self, name)
            own = whole.clone() if rows is None else whole.index_select(0, rows)
            setattr(self, name, own[:, :width].contiguous())
        for name in _OF_ROWS if rows is not None else ():
            if getattr(self, name, None) is not None:
                setattr(self, name, getattr(self, name).index_select(0, rows))
        self.columns = self.columns[:width]
        return rows

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.ids.device)

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
        begin = self.origin + (first - self.origin) // length * length
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
