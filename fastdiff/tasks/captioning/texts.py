"""Captions of a data set: which belong to which image, and their tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.data.captions import Captions
from fastdiff.data.text_batches import PairBatch, answer_windows
from fastdiff.data.tokenization import encode_texts
from fastdiff.models.masked_lm_config import MaskedDiffusionLMConfig
from fastdiff.tasks.captioning.recipe import CaptionsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def selected(captions: Captions, entries: Sequence[str]) -> Captions:
    """The captions of these entries alone (of all where none is named). Raises ValueError for one that there is not."""
    if not entries:
        return captions
    parts = (captions.rows(part, entries) for part in ("train", "held_out"))
    return Captions(captions.texts, tuple(name for name in captions.entries if name in entries), *parts)


def references(captions: Captions, part: str) -> list[list[str]]:
    """The captions of each image of a part, "train" or "held_out"; [] where it has none."""
    return [[captions.texts[index] for index in dict.fromkeys(row) if index >= 0]
            for row in captions.rows(part).tolist()]  # fmt: skip


class CaptionTokens:
    """Texts as tokens, each by its number.

    Args:
        texts: the texts.
        tokenizer: makes ids of them; nothing is added.
    """

    def __init__(self, texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> None:
        rows = encode_texts(tokenizer, list(texts))
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        self._ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        self._ends = self.lengths.cumsum(0)

    def windows(
        self, indices: Tensor, length: int, captions: CaptionsConfig, config: MaskedDiffusionLMConfig, start: int
    ) -> PairBatch:
        """Texts `indices` behind the token `start`, in windows of `length` tokens (`answer_windows`)."""
        eos = config.eos_token_id
        answers = [self._ids[self._ends[i] - self.lengths[i] : self._ends[i]].long() for i in indices.tolist()]
        return answer_windows(
            [torch.tensor([start])] * len(answers),
            answers,
            length,
            captions.length_format,
            eos_token_id=eos if isinstance(eos, int) else eos[0],
            pad_token_id=config.pad_token_id,
            mask_token_id=config.mask_token_id,
        )
