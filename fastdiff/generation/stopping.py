"""Rows that end before their last block: at an end token, or at a string. Approximate, and off by default."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.tokenization import decode_ids
from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.generation.rows import ActiveRows


class Stopping:
    """Ends rows whose block is full and has an end token or a stop string in it.

    With `at_once`, the end tokens of a model's length format, a row ends as soon as one is chosen: nothing behind it is
    decoded any more, what is before it is.

    Raises ValueError where an end token, or the tokenizer that stop strings need, is missing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: MaskedDiffusionGenerationConfig,
        tokenizer: Any,
        at_once: Sequence[int] | None = None,
    ) -> None:
        own = model.config
        ends = config.eos_token_id if config.eos_token_id is not None else own.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        if config.early_stop and not ends:
            raise ValueError("early_stop: neither the generation config nor the model has an eos_token_id; set it")
        device, self.at_once = model.head_weight.device, at_once is not None
        ends = ends if at_once is None else list(at_once)
        self.end_tokens = torch.tensor(ends, device=device) if config.early_stop or self.at_once else None
        self.strings, self.tokenizer = config.stop_strings, tokenizer
        pad = config.pad_token_id if config.pad_token_id is not None else own.pad_token_id
        self.filling = ends[0] if ends else pad
        if self.strings and tokenizer is None:
            raise ValueError("stop_strings: they are looked for in decoded text; pass tokenizer= too")
        if self.strings and self.filling is None:
            raise ValueError("stop_strings: no eos_token_id or pad_token_id to fill an ended row with; set one")
        self.filled: Tensor | int = 0  # positions that were filled instead of chosen

    @property
    def active(self) -> bool:
        """Whether rows may end early."""
        return self.end_tokens is not None or bool(self.strings)

    def __call__(self, rows: ActiveRows) -> None:
        """After a step: fills what is left of rows that end here."""
        masked = rows.ids == rows.mask_token_id
        inside = (rows.columns >= rows.block_start[:, None]) & (rows.columns < rows.block_end[:, None])
        in_window = rows.block_start >= rows.window_start  # nothing that the prompt has ends a row
        full = ~(inside & masked).any(1) & in_window
        if self.strings:
            self._at_strings(rows, full)
        if self.at_once:
            ends = self.ends(rows.ids, rows.columns >= rows.window_start[:, None])
            token = rows.ids.gather(1, ends.to(torch.int8).argmax(1, keepdim=True))
            behind = ends.cumsum(1) > 0
            rows.ids.copy_(torch.where(masked & behind, token, rows.ids))
        elif self.end_tokens is not None:
            ends = self.ends(rows.ids, inside)
            ended = ends.any(1) & full
            token = rows.ids.gather(1, ends.to(torch.int8).argmax(1, keepdim=True))
            rows.ids.copy_(torch.where((rows.ids == rows.mask_token_id) & ended[:, None], token, rows.ids))
        self.filled = self.filled + (masked & (rows.ids != rows.mask_token_id)).sum()

    def ends(self, ids: Tensor, inside: Tensor) -> Tensor:  # int64, bool [A, W] -> bool [A, W]
        """Where end tokens are."""
        return inside & torch.isin(ids, self.end_tokens)

    def _at_strings(self, rows: ActiveRows, full: Tensor) -> None:
        """Tokens after the one that completes a stop string are replaced, in the block and after it."""
        places = torch.stack([rows.window_start, rows.block_start, rows.block_end], 1).tolist()
        for row in full.nonzero()[:, 0].tolist():
            start, block, end = places[row]
            tokens = rows.ids[row, start:end].tolist()
            if not self._has_string(tokens):
                continue
            needed = next(n for n in range(block - start + 1, len(tokens) + 1) if self._has_string(tokens[:n]))
            rows.ids[row, start + needed : rows.lengths[row]] = self.filling

    def _has_string(self, tokens: list[int]) -> bool:
        text = decode_ids(self.tokenizer, tokens, special_tokens=True)
        return any(string in text for string in self.strings)
