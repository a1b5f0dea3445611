"""Forward passes of a decoding call: whole sequences, or with a cache the columns that a step recomputes.

Caches (approximate): a whole pass where a row begins a block fills the keys and values; within the block the prefix
cache recomputes from the block to the row's end, the dual cache the block alone (Fast-dLLM, Wu et al. 2025); a whole
pass every r steps refreshes them (as dKV-Cache and dInfer do). Each row counts for itself, so that a step may need a
whole pass of some rows and a short one of others.

Without caches this changes no state: the last block of the model computes only those that are asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.generation.canvas import as_seen
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.rows import ActiveRows, Turn
from fastdiff.nn import KeyValueCache


def on_cpu(device: torch.device) -> bool:
    """Whether asking for a number costs nothing: then positions are packed, and errors raised where they arise."""
    return device.type == "cpu"


class Predicting(NamedTuple):
    """Flat positions a·W + l that are predicted (-1: none), and the states before the head that predict them."""

    positions: Tensor  # int64 [R]
    states: Tensor  # [R, D]
    unconditional: Tensor | None  # [R, D]: with the condition hidden, under guidance


def probed(rows: ActiveRows, masked: Tensor, states: Tensor) -> Predicting:
    """What a pass over every row's whole window, states `[B, N, D]`, says of the masked positions (bool `[A, W]`)."""
    places = masked.nonzero()
    row, column = places.unbind(1)
    offsets = column - rows.window_start[row]
    probed_row = torch.tensor(rows.canvas_rows, device=row.device)[row]
    return Predicting(row * rows.width + column, states[probed_row, offsets], None)


class Passes:
    """The model and its cache. `count` passes were made (guided ones of twice the rows), `short` of a few columns."""

    def __init__(self, model: torch.nn.Module, config: MaskedDiffusionGenerationConfig) -> None:
        self.model, self.config = model, config
        self.guided = config.guidance_scale != 1
        self.shift = int(model.config.logit_shift)  # state i predicts token i + 1, and state 0 token 0
        self.cache = KeyValueCache() if config.prefix_cache or config.dual_cache else None
        schedule = dict(schedule=model.config.mask_schedule, exponent=model.config.mask_schedule_exponent)
        self.process = MaskedDiffusion(MaskedDiffusionConfig(**schedule), model.config.mask_token_id)
        self.count = self.short = 0

    def keep(self, before: int, rows: Tensor, width: int) -> None:
        """Goes on with these of `before` rows, of this width."""
        if self.cache is not None:
            self.cache.keep(self._halves(rows, before), width)

    def __call__(self, rows: ActiveRows, masked: Tensor, turns: list[Turn]) -> Predicting:
        """Predicts what is masked (bool `[A, W]`)."""
        if self.cache is None:
            return self._run(rows, masked, turns, None, short=False)
        whole = [self._refreshes(turn) for turn in turns]
        if len(set(whole)) == 1:
            return self._run(rows, masked, turns, None, short=not whole[0])
        parts = []
        for short in (False, True):
            members = [row for row, refreshes in enumerate(whole) if refreshes != short]
            parts.append(self._run(rows, masked, turns, members, short))
        return Predicting(*(None if pair[0] is None else torch.cat(pair) for pair in zip(*parts, strict=True)))

    def _refreshes(self, turn: Turn) -> bool:
        interval = self.config.cache_refresh_interval
        return turn.step_in_block == 0 if interval is None else turn.step_in_block % interval == 0

    def _halves(self, rows: Tensor, total: int) -> Tensor:
        """Places in the batch that the model sees: the unconditional half follows the other."""
        return torch.cat([rows, rows + total]) if self.guided else rows

    def _run(
        self, rows: ActiveRows, masked: Tensor, turns: list[Turn], members: list[int] | None, short: bool
    ) -> Predicting:
        """One pass of the rows `members`; None is all, for which nothing is copied."""
        device, total, width = rows.ids.device, len(turns), rows.width
        number = torch.arange(total, device=device) if members is None else torch.tensor(members, device=device)

        def of(t: Tensor | None) -> Tensor | None:
            return t if t is None or members is None else t.index_select(0, number)

        turns = turns if members is None else [turns[row] for row in members]
        ids, inputs = of(rows.ids), {}
        if self.model.config.timestep_embedding:
            inputs["timesteps"] = self.process.time_of((ids == rows.mask_token_id).sum(1) / of(rows.generated))
        most = max(turn.masks_left for turn in turns)
        places = torch.where(of(masked), rows.columns, width).sort(1).values[:, :most]
        wanted = (places - self.shift).clamp(min=0)
        given = of(rows.given) if self.guided else None
        if short:
            columns, first = self._columns(rows, turns, members, of)
            wanted = wanted - first
            ids, given = ids.gather(1, columns), given if given is None else given.gather(1, columns)
            inputs["cache_columns"] = columns
        inputs["output_columns"] = wanted.clamp(max=ids.shape[1] - 1)
        if self.cache is not None:
            inputs["cache"] = self.cache
        inputs |= self._context(of(rows.attention_mask), of(rows.encoder_states), of(rows.encoder_mask))
        if self.guided:
            doubled = ("timesteps", "cache_columns", "output_columns")
            inputs |= {name: torch.cat([inputs[name]] * 2) for name in doubled if name in inputs}
            ids = torch.cat([ids, ids.masked_fill(given, rows.mask_token_id)])
        if members is not None:
            inputs["cache_rows"] = self._halves(number, total)
        self.count, self.short = self.count + 1, self.short + short
        states = self.model.hidden_states(as_seen(ids, rows.mask_token_id), **inputs)
        return self._packed(torch.where(places < width, number[:, None] * width + places, -1).flatten(), states)

    def _columns(self, rows: ActiveRows, turns: list[Turn], members: list[int] | None, of) -> tuple[Tensor, Tensor]:
        """The columns `[a, l]` that a short pass recomputes, and each row's first `[a, 1]`.

        Under logit shift that is the one before the block. Rows of fewer than l columns repeat their last one: it is
        computed twice and written with the same values.
        """
        first = (of(rows.block_start) - self.shift).clamp(min=0)[:, None]
        last, ends = of(rows.block_end)[:, None], [turn.block_end for turn in turns]
        if self.config.prefix_cache:
            last = of(rows.window_end)[:, None]
            ends = rows.lengths if members is None else [rows.lengths[row] for row in members]
        longest = max(end - max(turn.block_start - self.shift, 0) for turn, end in zip(turns, ends, strict=True))
        return torch.minimum(first + torch.arange(longest, device=first.device), last - 1), first

    def _context(self, mask: Tensor | None, states: Tensor | None, states_mask: Tensor | None) -> dict[str, Tensor]:
        """Attention masks, and the encoder's states, which the unconditional half does not see."""
        if self.guided and mask is not None:
            mask = torch.cat([mask, mask])
        inputs = {"attention_mask": mask}
        if states is None:
            return inputs
        if self.guided:
            seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            seen = seen if states_mask is None else states_mask
            states, states_mask = torch.cat([states, states]), torch.cat([seen, torch.zeros_like(seen)])
        return inputs | {"encoder_hidden_states": states, "encoder_attention_mask": states_mask}

    def _packed(self, positions: Tensor, states: Tensor) -> Predicting:
        halves = [half.flatten(0, 1) for half in (states.chunk(2) if self.guided else (states,))]
        if on_cpu(positions.device):
            real = positions >= 0
            positions, halves = positions[real], [half[real] for half in halves]
        return Predicting(positions, halves[0], halves[1] if self.guided else None)
