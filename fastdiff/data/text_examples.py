"""Text as examples of one length, for models that take it as they take images and sounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.labelled import LabelledData
from fastdiff.data.text_batches import document_windows, pair_windows
from fastdiff.data.text_config import TextDataConfig
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.data.tokenization import tokenizer_fingerprint
from fastdiff.errors import named


class TextWindows:
    """Windows of documents, one from each token on, or the answers of pairs with their prompts.

    Args:
        part: documents or pairs.
        config: max_length (tokens of a window) and length_format are read.
        tokenizer: the one that made the part's tokens; it has pad, eos and, for "eos_only", mask tokens.
        fingerprint: changes when the tokens do.

    Raises ValueError for documents of fewer than max_length tokens.
    """

    def __init__(self, part: TextPart, config: TextDataConfig, tokenizer, fingerprint: str):
        self.part, self.config, self.tokenizer, self._fingerprint = part, config, tokenizer, fingerprint
        if part.conditions is None and part.targets.num_tokens < config.max_length:
            raise ValueError(
                f"{named('max_length')}: got {config.max_length}; {part.targets.path} has {part.targets.num_tokens} "
                "tokens"
            )

    def __len__(self) -> int:
        if self.part.conditions is None:
            return self.part.targets.num_tokens - self.config.max_length + 1
        return len(self.part)

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"input_ids": int64 [n, max_length]}; of pairs also "condition_ids" [n, M], right-padded, "condition_mask".

        An answer ends as `data.length_format` says. With "eos_only" the rest of its window is left out of it by
        "attention_mask".
        """
        length = self.config.max_length
        if self.part.conditions is None:
            return {"input_ids": document_windows(self.part.targets, length, indices)}
        eos = self.tokenizer.eos_token_id
        pairs = pair_windows(
            self.part, indices, length, self.config.length_format, eos, self.tokenizer.pad_token_id,
            separate_conditions=True, bos_token_id=eos, mask_token_id=self.tokenizer.mask_token_id,
        )  # fmt: skip
        # The token that decoding a row begins with is none of the answer's.
        batch = {"input_ids": pairs.input_ids[:, 1:]}
        if self.config.length_format == "eos_only":
            batch["attention_mask"] = pairs.maskable[:, 1:]
        return batch | {"condition_ids": pairs.condition_ids, "condition_mask": pairs.condition_mask}

    def token_counts(self) -> Tensor:  # int64 [tokens of the tokenizer]
        """How often each token is in the texts, or in the windows of answers (long ones counted whole)."""
        counts = torch.from_numpy(np.bincount(self.part.targets.tokens, minlength=self.part.targets.vocab_size))
        if self.part.conditions is None:
            return counts
        room = (self.config.max_length - self.part.targets.document_lengths).clamp(min=0)
        ends, eos = int((room > 0).sum()), self.tokenizer.eos_token_id
        counts[eos] += ends
        fills = {"eos_fill": eos, "pad_fill": self.tokenizer.pad_token_id}
        if self.config.length_format in fills:  # the rest of "eos_only" is not part of an answer
            counts[fills[self.config.length_format]] += int(room.sum()) - ends
        return counts

    def fingerprint(self) -> str:
        return self._fingerprint


@dataclass(frozen=True)
class TextExamples(LabelledData):
    """A corpus as windows. `class_names` is empty."""

    train: TextWindows
    held_out: TextWindows

    def record(self) -> dict[str, Any]:
        return super().record() | {"tokenizer": tokenizer_fingerprint(self.train.tokenizer)}


def text_examples(data: TextData, config: TextDataConfig) -> TextExamples:
    """The windows of both parts of a corpus. Raises ValueError where one has too few tokens for a window."""
    parts = [TextWindows(part, config, data.tokenizer, data.fingerprint) for part in (data.train, data.held_out)]
    return TextExamples(data.name, *parts, ())
