"""A tokenized corpus: its part to train on and its held-out part."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdiff.data.token_files import TokenFile
from fastdiff.data.tokenization import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextPart:
    """Documents or pairs as tokens.

    Attributes:
        targets: documents, each followed by EoS, or the answers of pairs, without EoS.
        conditions: the prompts of pairs, as many and in the same order; None for documents.
    """

    targets: TokenFile
    conditions: TokenFile | None = None

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class TextData:
    """A corpus ready to train on.

    Attributes:
        name, sample: those of the `TextDataConfig`.
        train, held_out: its two parts; no document or pair is in both.
        tokenizer: has pad, bos, eos and mask tokens.
        fingerprint: a hash of both parts' tokens and of the tokenizer.
    """

    name: str
    sample: str
    train: TextPart
    held_out: TextPart
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str

    def record(self) -> dict[str, Any]:
        """What a run keeps of its data, as plain values: `fastdiff.training.provenance` compares it later."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "examples": {"train": len(self.train), "held_out": len(self.held_out)},
        }
