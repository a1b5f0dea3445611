"""The token ids of a batch while they are decoded: prompts of different lengths, laid out alike."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdiff.data.text_codec import MASK_WORD


def padding_last(ids: Tensor, real: Tensor) -> Tensor:  # int64 [B, P], bool [B, P] -> int64 [B, P]
    """The real tokens of each row at its beginning, in their order, so that they have the positions they have alone."""
    return ids.gather(1, (~real).to(torch.int8).argsort(dim=1, stable=True))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:  # int64, bool [B, P]
    """Rows of ids, padded on the right, and where they are not padding."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def as_seen(ids: Tensor, mask_token_id: int) -> Tensor:
    """Ids as the model sees them: the mask token where MASK_WORD stands for it as a word of the prompt."""
    return ids.masked_fill(ids == MASK_WORD, mask_token_id)


class Canvas:
    """The token ids of a batch while they are decoded, laid out so that each row is what it is alone.

    Row b has its prompt's P_b tokens first, then its window of N_b mask tokens, then filling up to W columns: wherever
    the prompt's padding was, a row has the positions, and the random numbers, that it has alone. Windows are
    `max_new_tokens` wide, or as `windows` says, with room to grow; what a row has less is `end_token_id` in the result.

    Attributes:
        ids: int64 `[B, W]`; MASK_WORD where the prompt has it.
        used: bool `[B, W]`, the prompt and the window, not filling.
        given: bool `[B, W]`, tokens that the prompt gave, which guidance hides; none of `keep_tokens`.
        columns: int64 `[W]`, 0, 1, …
        window_start: int64 `[B]`, the column of the first new token.
        sequence_ids: int64 `[B]`, what random numbers belong to: prompt, condition and copy.
        prompt_lengths, prompt_masks, windows: per row, tokens of the prompt, mask tokens among them, and new tokens.
    """

    def __init__(
        self,
        input_ids: Tensor,  # int64 [B, P]
        attention_mask: Tensor | None,  # bool [B, P]
        max_new_tokens: int,
        mask_token_id: int,
        pad_token_id: int | None,
        conditions: list[bytes] | None = None,  # what else rows differ in
        copies: Sequence[int] | None = None,
        windows: Sequence[int] | None = None,
        end_token_id: int | None = None,
        keep_tokens: Sequence[int] = (),
    ) -> None:
        batch, prompt = input_ids.shape
        device = input_ids.device
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask
        filling = pad_token_id if pad_token_id is not None else int(mask_token_id == 0)
        lengths = real.sum(1)
        host = torch.cat([lengths, (real & (input_ids == mask_token_id)).sum(1)]).tolist()  # waits for the device
        self.prompt_lengths, self.prompt_masks = host[:batch], host[batch:]
        self.windows = [max_new_tokens] * batch if windows is None else list(windows)
        self.max_new_tokens, self.mask_token_id, self.end_token_id = max_new_tokens, mask_token_id, end_token_id
        self.width = max(self.prompt_lengths) + max_new_tokens
        self.columns = torch.arange(self.width, device=device)
        self.window_start = lengths

        # Column of the canvas that each column of the result comes from; padding keeps what the caller passed.
        new = lengths[:, None] + self.columns[:max_new_tokens]
        self._source = torch.cat([(real.cumsum(1) - 1).clamp(min=0), new], dim=1)  # [B, P + N]
        self._kept = torch.cat([~real, torch.zeros_like(new, dtype=torch.bool)], dim=1)
        self._input = torch.cat([input_ids, torch.full_like(new, filling)], dim=1)

        compact = torch.full((batch, self.width), filling, dtype=torch.int64, device=device)
        used = min(prompt, self.width)
        compact[:, :used] = padding_last(input_ids, real)[:, :used]
        ends = lengths + torch.tensor(self.windows, device=device)
        is_new = (self.columns >= lengths[:, None]) & (self.columns < ends[:, None])
        self.used = self.columns < ends[:, None]
        self.ids = torch.where(is_new, mask_token_id, torch.where(self.used, compact, filling))
        self.given = self.used & (self.ids != mask_token_id)
        if keep_tokens:
            self.given &= ~torch.isin(self.ids, torch.tensor(keep_tokens, device=device))
        self.sequence_ids = torch.tensor(self._names(conditions or [b""] * batch, copies), device=device)

    @property
    def generated(self) -> list[int]:
        """Positions of each row that are or were masked."""
        return [masks + window for masks, window in zip(self.prompt_masks, self.windows, strict=True)]

    def grow(self, rows: Sequence[int], by: int) -> list[int]:
        """Adds `by` masks to the windows of these rows, as far as there is room; returns how many each got."""
        added = []
        for row in rows:
            end = self.prompt_lengths[row] + self.windows[row]
            added.append(min(by, self.max_new_tokens - self.windows[row]))
            self.ids[row, end : end + added[-1]] = self.mask_token_id
            self.used[row, end : end + added[-1]] = True
            self.windows[row] += added[-1]
        return added

    def _names(self, conditions: list[bytes], copies: Sequence[int] | None) -> list[int]:
        """What random numbers belong to: the prompt and which of its copies a row is, not its place in the batch."""
        seen: dict[bytes, int] = {}
        names = []
        for row, ids in enumerate(self.ids.cpu()):
            prompt = ids[: self.prompt_lengths[row]].numpy().tobytes() + conditions[row]
            seen[prompt] = seen.get(prompt, -1) + 1
            copy = seen[prompt] if copies is None else copies[row]
            names.append(zlib.crc32(copy.to_bytes(8, "little"), zlib.crc32(prompt)))
        return names

    def sequences(self) -> Tensor:  # int64 [B, P + N]
        """The tokens in the columns of the input, then the new ones."""
        ids = self.ids if self.end_token_id is None else torch.where(self.used, self.ids, self.end_token_id)
        return as_seen(torch.where(self._kept, self._input, ids.gather(1, self._source)), self.mask_token_id)
