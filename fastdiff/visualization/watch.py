"""Watching a masked diffusion language model decode: the text on a terminal, masks and all, redrawn at each step."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

from fastdiff.data.tokenization import decode_ids
from fastdiff.visualization.terminal import cell_width, in_encoding, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK = "░"
_NEW, _PLAIN = "\x1b[1;32m", "\x1b[0m"
_HIDE_CURSOR, _SHOW_CURSOR, _CLEAR_BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[J"

Piece = tuple[str, bool]  # text, and whether it is new since the last picture


class DenoisingView:
    """A streamer for `fastdiff.generation.generate(..., streamer=view)` that shows the text as it takes shape.

    On a terminal the text is redrawn in place, masks as "░" (where the encoding lacks it, "_"), tokens that are new
    since the last picture highlighted (not where NO_COLOR is set); elsewhere a line is printed every few steps. Control
    characters and marks of direction are written as escapes. Use it in a `with` block: at its end, and at an error or
    Ctrl-C, the terminal is as before.

    Args:
        tokenizer: turns tokens into text; special tokens are left out.
        mask_token_id: the model's mask token.
        attention_mask: bool [B, P] of the prompts, as `generate` has it: padding is left out.
        rows: how many sequences of the batch are shown.
        stream: where the text goes; None is stdout.
        every: steps between two lines where the stream is not a terminal.
        keep: whether the last picture stays on the terminal.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        mask_token_id: int,
        *,
        attention_mask: Tensor | None = None,
        rows: int = 1,
        stream: TextIO | None = None,
        every: int = 8,
        keep: bool = True,
    ) -> None:
        self.tokenizer, self.mask_token_id, self.attention_mask = tokenizer, mask_token_id, attention_mask
        self.stream = sys.stdout if stream is None else stream
        self.mask_sign = MASK if in_encoding(MASK, self.stream) == MASK else "_"
        self.rows, self.every, self.keep = rows, every, keep
        self.in_place = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.in_place and not os.environ.get("NO_COLOR")
        self._shown: list[list[int]] = []
        self._lines, self._drawn_at = 0, 0.0
        self._last: tuple[list[list[int]], int] | None = None

    def __enter__(self) -> "DenoisingView":
        if self.in_place:
            self._write(_HIDE_CURSOR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(draw=kind is None)
        if self.in_place:
            self._write(_SHOW_CURSOR)

    def begin(self, attention_mask: Tensor | None) -> "DenoisingView":
        """Makes ready for another batch, with its prompts' bool [B, P]; returns itself, to be passed as streamer."""
        self.finish()
        self.attention_mask = attention_mask
        return self

    def finish(self, draw: bool = True) -> None:
        """Ends a batch: shows its last step, if that came too soon after the one before, then keeps or erases it."""
        if self._last is not None and draw:
            self._draw(*self._last)
        if self.in_place and self._shown:
            self._write((_PLAIN if self.colour else "") + ("\n" if self.keep else self._back()))
        self._shown, self._lines, self._last = [], 0, None

    def __call__(self, token_ids: Tensor, step: int) -> None:
        """Shows int64 [B, L] after step `step` (from 0)."""
        shown = token_ids[: self.rows].cpu()
        prompt = 0 if self.attention_mask is None else self.attention_mask.shape[1]
        rows = []
        for index, row in enumerate(shown):
            tokens = row.tolist()
            if self.attention_mask is not None:
                real = self.attention_mask[index].tolist()
                tokens = [t for t, kept in zip(tokens[:prompt], real, strict=True) if kept] + tokens[prompt:]
            rows.append(tokens)
        soon = time.monotonic() - self._drawn_at < 1 / 30 if self.in_place else step % self.every
        if soon and self._shown:
            self._last = (rows, step)
        else:
            self._draw(rows, step)

    def _draw(self, rows: list[list[int]], step: int) -> None:
        left = sum(row.count(self.mask_token_id) for row in rows)
        before = self._shown if len(self._shown) == len(rows) else rows
        pieces = [self.pieces(row, old) for row, old in zip(rows, before, strict=True)]
        self._shown, self._last, self._drawn_at = rows, None, time.monotonic()
        counter = f"[step {step + 1}, {left} masked]"
        if not self.in_place:
            texts = ["".join(text for text, _ in row) for row in pieces]
            self._write("".join(f"{counter} {printable(' '.join(text.split()))}\n" for text in texts))
            return
        width, height = shutil.get_terminal_size()
        lines = [line for row in pieces for line in wrapped(row, max(width - 1, 2))]
        lines = lines[-max(height - 2, 1) :]  # what has scrolled away cannot be redrawn
        text = "\n".join("".join(self._coloured(piece) for piece in line) for line in lines)
        self._write(f"{self._back()}{text}\n{counter[: max(width - 1, 2)]}")
        self._lines = len(lines)

    def _coloured(self, piece: Piece) -> str:
        text, new = piece
        return f"{_NEW}{text}{_PLAIN}" if new and self.colour else text

    def _back(self) -> str:
        """To where the last picture began, and nothing below."""
        return "\r" + (f"\x1b[{self._lines}A" if self._lines else "") + _CLEAR_BELOW

    def _write(self, text: str) -> None:
        self.stream.write(in_encoding(text, self.stream))
        self.stream.flush()

    def pieces(self, tokens: Sequence[int], before: Sequence[int]) -> list[Piece]:
        """The row as text with a mask sign for each mask token, cut where new tokens begin and end.

        Tokens between two masks are decoded together: characters may be spread over several of them. What is half a
        character yet shows as U+FFFD.
        """
        pieces: list[Piece] = []
        start = 0
        while start < len(tokens):
            masked = tokens[start] == self.mask_token_id
            end = start
            while end < len(tokens) and (tokens[end] == self.mask_token_id) == masked:
                end += 1
            if masked:
                pieces.append((self.mask_sign * (end - start), False))
            else:
                new = [before[i] != tokens[i] for i in range(start, end)]
                pieces += self._decoded(list(tokens[start:end]), new, first=start == 0)
            start = end
        return pieces

    def _decoded(self, run: list[int], new: list[bool], first: bool) -> list[Piece]:
        def text(tokens: list[int]) -> str:
            decoded = decode_ids(self.tokenizer, tokens)
            return lead + decoded if decoded else ""

        # SentencePiece decoders drop the space before a text, which inside of a row is one between words
        piece = "" if first else str(self.tokenizer.convert_ids_to_tokens(run[0]))
        lead = " " if piece.startswith("▁") else ""
        whole, pieces, done = text(run), [], 0
        for i in range(1, len(run) + 1):
            if i < len(run) and new[i] == new[i - 1]:
                continue
            so_far = text(run[:i]) if i < len(run) else whole
            place = max(done, len(os.path.commonprefix([so_far, whole])))
            if place > done:
                pieces.append((whole[done:place], new[i - 1]))
            done = place
        return pieces


def wrapped(pieces: Sequence[Piece], width: int) -> list[list[Piece]]:
    """Pieces as lines of at most `width` cells; what a terminal would obey as escapes, tabs one space."""
    lines: list[list[Piece]] = [[]]
    used = 0
    for text, new in pieces:
        for character in printable(text.replace("\r\n", "\n").replace("\t", " ")):
            if character == "\n":
                lines.append([])
                used = 0
                continue
            cells = cell_width(character)
            if used + cells > width:
                lines.append([])
                used = 0
            line = lines[-1]
            if line and line[-1][1] == new:
                line[-1] = (line[-1][0] + character, new)
            else:
                line.append((character, new))
            used += cells
    return lines
