"""The rows of a batch that are still being decoded: their tokens, and where each is in its blocks."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.generation.canvas import Canvas
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.schedule import chance_steps, transfer_counts
from fastdiff.kernels.common.philox import DRAW_ANCESTRAL, philox, uniform53


class Turn(NamedTuple):
    """Where a row is before a step, as Python numbers."""

    masks_left: int  # in its current block
    step_in_block: int  # passes that it has had there
    block_start: int
    block_end: int
    count: int  # tokens that the step commits under the rule "count"


@dataclass(eq=False)
class ActiveRows:
    """The `A` rows of a canvas that are still being decoded, as wide as the longest of them: `W` columns.

    Every row advances by itself, from block to block: the prompt's own masks, then the blocks of new tokens.
    """

    canvas: Canvas
    config: MaskedDiffusionGenerationConfig
    canvas_rows: list[int]  # the place of each row in the canvas
    lengths: list[int]  # tokens of each row: its prompt and its window; filling follows
    steps_per_block: list[int | None]  # of each row; None: as many as the block has masks
    columns: Tensor  # int64 [W]: 0, 1, …
    # what each column of each row has
    ids: Tensor  # int64 [A, W]: token ids
    used: Tensor  # bool [A, W]: prompt or window, not filling
    given: Tensor  # bool [A, W]: tokens that the prompt gave, which guidance hides
    chance_step: Tensor | None  # int64 [A, W]: under "ancestral" the step of its block that commits it
    # what each row has
    sequence_ids: Tensor  # int64 [A]: what its random numbers belong to
    generated: Tensor  # int64 [A]: positions that are or were masked
    window_start: Tensor  # int64 [A]: the column of its first new token
    window_end: Tensor  # int64 [A]: the column after its last one
    first_block: Tensor  # int64 [A]: the column from which its blocks of new tokens are counted
    block_length: Tensor  # int64 [A]
    encoder_states: Tensor | None  # [A, M, D]
    encoder_mask: Tensor | None  # bool [A, M]
    # where each row is
    block_start: Tensor  # int64 [A]: the current block's first column; -1 before the first step
    block_end: Tensor  # int64 [A]: the column after its last one
    step_in_block: Tensor  # int64 [A]: passes that it has had in the block
    block_masks: Tensor  # int64 [A]: masks that the block had when the row began it

    @classmethod
    def begin(
        cls,
        canvas: Canvas,
        config: MaskedDiffusionGenerationConfig,
        encoder_states: Tensor | None,  # [B, M, D]
        encoder_mask: Tensor | None,  # bool [B, M]
        seed: int,
        canvas_rows: list[int] | None = None,
        blocks: list[int] | None = None,
    ) -> "ActiveRows":
        """Rows of a canvas of `B` before their first step.

        Args:
            seed: of what is drawn before the first step, under "ancestral".
            canvas_rows: which rows; None is all.
            blocks: length of each row's blocks where config.block_length is None, counted from its end: a window, or
                what it grew by.
        """
        every = list(range(len(canvas.ids)))
        lengths = [prompt + window for prompt, window in zip(canvas.prompt_lengths, canvas.windows, strict=True)]

        def tensor(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=canvas.ids.device)

        nowhere, zeros = torch.full_like(canvas.window_start, -1), torch.zeros_like(canvas.window_start)
        rows = cls(
            canvas=canvas,
            config=config,
            canvas_rows=every,
            lengths=lengths,
            steps_per_block=[None] * len(every),
            columns=canvas.columns,
            ids=canvas.ids,
            used=canvas.used,
            given=canvas.given,
            chance_step=None,
            sequence_ids=canvas.sequence_ids,
            generated=tensor(canvas.generated),
            window_start=canvas.window_start,
            window_end=tensor(lengths),
            first_block=canvas.window_start,
            block_length=tensor([config.block_length or max(window, 1) for window in canvas.windows]),
            encoder_states=encoder_states,
            encoder_mask=encoder_mask,
            block_start=nowhere,
            block_end=nowhere,
            step_in_block=zeros,
            block_masks=zeros,
        )
        rows.select(None if canvas_rows == every else canvas_rows)
        if blocks is not None and not config.block_length:
            rows.block_length = tensor(blocks)
            rows.first_block = rows.window_end - rows.block_length
        new = [canvas.windows[row] for row in rows.canvas_rows] if blocks is None else blocks
        lengths = [config.block_length or max(length, 1) for length in new]
        rows.steps_per_block = [_steps_of_block(config, length) for length in lengths]
        if config.unmasking_rule == "ancestral":
            steps = [steps or length for steps, length in zip(rows.steps_per_block, lengths, strict=True)]
            rows.chance_step = rows._draw_steps(steps, seed)
        return rows

    def _draw_steps(self, steps: list[int], seed: int) -> Tensor:  # int64 [A, W]
        """The step of its block at which each column is committed, drawn for a row that has so many steps a block."""
        words = philox(torch.tensor(seed, device=self.ids.device), self.sequence_ids[:, None], self.columns,
                       torch.zeros_like(self.columns), DRAW_ANCESTRAL)  # fmt: skip
        uniform, chosen = uniform53(words), torch.empty_like(self.ids)
        of_row = torch.tensor(steps, device=self.ids.device)
        for number in set(steps):
            members = of_row == number
            chosen[members] = chance_steps(
                uniform[members], number, self.config.unmasking_schedule, self.config.first_time
            )
        return chosen

    @property
    def mask_token_id(self) -> int:
        """The canvas's mask token."""
        return self.canvas.mask_token_id

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
        return self.select(kept), self.width

    def select(self, kept: list[int] | None) -> Tensor | None:
        """Takes these rows (None: all), and no more columns than they have; returns `kept` as a tensor."""
        if kept is not None:
            self.canvas_rows = [self.canvas_rows[row] for row in kept]
            self.lengths = [self.lengths[row] for row in kept]
            self.steps_per_block = [self.steps_per_block[row] for row in kept]
        width = max(self.lengths)
        if kept is None and width == self.width:
            return None
        rows = None if kept is None else torch.tensor(kept, device=self.ids.device)

        def of_rows(t: Tensor | None) -> Tensor | None:
            return t if t is None or rows is None else t.index_select(0, rows)

        def of_columns(t: Tensor) -> Tensor:
            return (t.clone() if rows is None else of_rows(t))[:, :width].contiguous()

        self.columns = self.columns[:width]
        self.ids, self.used, self.given = of_columns(self.ids), of_columns(self.used), of_columns(self.given)
        self.chance_step = None if self.chance_step is None else of_columns(self.chance_step)
        self.sequence_ids, self.generated = of_rows(self.sequence_ids), of_rows(self.generated)
        self.window_start, self.window_end = of_rows(self.window_start), of_rows(self.window_end)
        self.first_block, self.block_length = of_rows(self.first_block), of_rows(self.block_length)
        self.encoder_states, self.encoder_mask = of_rows(self.encoder_states), of_rows(self.encoder_mask)
        self.block_start, self.block_end = of_rows(self.block_start), of_rows(self.block_end)
        self.step_in_block, self.block_masks = of_rows(self.step_in_block), of_rows(self.block_masks)
        return rows

    def write_back(self) -> None:
        """Puts the tokens onto the canvas; while all rows are under way they lie there."""
        if self.ids is not self.canvas.ids:
            self.canvas.ids[torch.tensor(self.canvas_rows, device=self.ids.device), : self.width] = self.ids

    def begin_step(self) -> Tensor:  # bool [A, W]
        """The positions that may be chosen in this step; notes which rows begin a block.

        Under "ancestral" these are the ones that chance commits next: steps in which it commits none are passed over.
        """
        masked = self.ids == self.mask_token_id
        start, end = self._current_block(masked)
        masked &= (self.columns >= start[:, None]) & (self.columns < end[:, None])
        begins = start != self.block_start
        self.step_in_block = torch.where(begins, 0, self.step_in_block + 1)
        self.block_masks = torch.where(begins, masked.sum(1), self.block_masks)
        self.block_start, self.block_end = start, end
        if self.chance_step is not None:
            later = self.chance_step.masked_fill(~masked, torch.iinfo(torch.int64).max)
            masked &= later == later.amin(1, keepdim=True)
        return masked

    def turns(self, masked: Tensor) -> list[Turn]:
        """Where the rows are, asked of the device."""
        numbers = [masked.sum(1), self.step_in_block, self.block_start, self.block_end, self.block_masks]
        turns = []
        for steps, (*place, masks) in zip(self.steps_per_block, torch.stack(numbers, 1).tolist(), strict=True):
            counted = self.config.unmasking_rule == "count" and masks > 0
            counts = block_counts(masks, self.config, steps) if counted else (0,)
            turns.append(Turn(*place, counts[min(place[1], len(counts) - 1)]))
        return turns

    def _current_block(self, masked: Tensor) -> tuple[Tensor, Tensor]:
        """First column, and the one after the last, of the block of each row's first masked position.

        The prompt is such a block, before those of new tokens.
        """
        first, length = masked.to(torch.int8).argmax(1), self.block_length
        start = self.first_block + (first - self.first_block) // length * length
        in_prompt, end = first < self.window_start, torch.minimum(start + length, self.window_end)
        return torch.where(in_prompt, 0, start), torch.where(in_prompt, self.window_start, end)


def _steps_of_block(config: MaskedDiffusionGenerationConfig, length: int) -> int | None:
    """Steps of a row's blocks of `length` tokens; under length="auto" they are its share of those of max_new_tokens."""
    steps, whole = config.num_inference_steps, config.max_new_tokens
    if steps is None or config.block_length or config.length == "fixed":
        return config.steps_per_block
    return max((2 * steps * length + whole) // (2 * whole), 1)  # rounded to nearest


def block_counts(masks: int, config: MaskedDiffusionGenerationConfig, steps: int | None) -> tuple[int, ...]:
    """Tokens that each pass of a block of `masks` masks commits under the rule "count"; steps None: one per mask."""
    return transfer_counts(masks, steps or max(masks, 1), config.unmasking_schedule, config.first_time)


def planned_turns(prompt_masks: int, prompt_length: int, config: MaskedDiffusionGenerationConfig) -> list[Turn]:
    """All turns of a row under the rule "count", which are known before: nothing is asked of the device.

    `prompt_masks` are the mask tokens that the prompt has.
    """
    blocks, end = [(prompt_masks, 0, prompt_length)], prompt_length + config.max_new_tokens
    length = config.block_length or max(config.max_new_tokens, 1)
    for start in range(prompt_length, end, length):
        stop = min(start + length, end)
        blocks.append((stop - start, start, stop))
    turns = []
    for left, start, stop in blocks:
        for step, count in enumerate(block_counts(left, config, config.steps_per_block)):
            turns.append(Turn(left, step, start, stop, count))
            left -= count
    return turns
