"""Samples made from a corpus, documents or pairs, and their split into a part to train on and a held-out part."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from fastdiff.data.corpora import Corpus, Pair

SPLIT_BY_DOCUMENT = 100  # with fewer documents, the end of each is held out
SENTENCES_BETWEEN = "\n...\n"  # stands for the middle in the prompt of "first_and_last"

Sample = str | Pair

# Closing quotes and brackets belong to the sentence before, opening ones to the next.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]]*(?=\s+(["'“‘(\[]*)(\w))""")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Sr|Jr|vs|etc|e\.g|i\.e)\.$")
_JOINERS = "\u200c\u200d"  # between letters of Persian and Indian scripts
_BLANK_LINE = re.compile(r"\n[ \t\r]*(?:\n[ \t\r]*)+")


class Samples:
    """Documents or pairs of a corpus, read anew at each pass.

    Left out, and counted in `left_out` by the reason after a whole pass: documents of white space alone, pairs with an
    empty side, documents with too few sentences.
    """

    def __init__(self, corpus: Corpus, kind: str):
        self.corpus, self.kind = corpus, kind
        self.left_out: dict[str, int] = {}

    @property
    def pairs(self) -> bool:
        """Whether samples are pairs."""
        return self.kind != "documents"

    def __iter__(self) -> Iterator[Sample]:
        self.left_out = {}
        if self.kind == "documents":
            yield from self._kept(self.corpus.read(), str.strip, "empty documents")
        elif self.kind == "pairs":
            yield from self._kept(self.corpus.read(), _both_sides, "pairs with an empty prompt or answer")
        elif self.kind == "plain_line":
            lines = (line.strip() for document in self.corpus.read() for line in document.splitlines())
            seen: set[str] = set()
            lines = self._kept(lines, lambda line: not (line in seen or seen.add(line)), "repeated lines")
            pairs = (Pair(plain_line(line), line) for line in lines)
            yield from self._kept(pairs, _both_sides, "lines without a letter or digit")
        else:
            documents = self._kept(self.corpus.read(), str.strip, "empty documents")
            if self.corpus.long_documents:
                documents = (part for text in documents for part in paragraphs(text))
            needed = 2 if self.kind == "first_sentence" else 3
            cut = (sentence_pair(document, last=self.kind == "first_and_last") for document in documents)
            yield from self._kept(cut, bool, f"texts of fewer than {needed} sentences")

    def _kept(self, records: Iterable, wanted, reason: str) -> Iterator:
        for record in records:
            if wanted(record):
                yield record
            else:
                self.left_out[reason] = self.left_out.get(reason, 0) + 1


def _both_sides(pair: Pair) -> bool:
    return bool(pair.prompt.strip() and pair.answer.strip())


def plain_line(line: str) -> str:
    """The words of a line in lower case, one space between them, without punctuation: "o'er-run" is "oer run".

    What letters are made of is kept: combining marks (vowel signs, accents of their own) and joiners.
    """
    spaced = re.sub(r"[-–—_]", " ", line.lower())
    return " ".join("".join(char for char in spaced if _is_of_a_word(char) or char.isspace()).split())


def _is_of_a_word(char: str) -> bool:
    return char.isalnum() or char in _JOINERS or unicodedata.category(char).startswith("M")


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, without the blank ones at the ends."""
    return [part.strip() for part in _BLANK_LINE.split(text) if part.strip()]


def sentence_ends(text: str) -> list[int]:
    """Where sentences end but the last: behind . ! ? … and closing quotes, where white space and a capital letter or an
    opening quote follow. Plain rules: a handful of abbreviations (Mr., Dr., …) are known, others end a sentence.
    """
    ends = []
    for match in _SENTENCE_END.finditer(text):
        opening, letter = match.groups()
        if (opening or letter.isupper()) and not _ABBREVIATION.search(text, max(0, match.start() - 8), match.end()):
            ends.append(match.end())
    return ends


def sentence_pair(document: str, last: bool) -> Pair | None:
    """(first sentence, the rest), or with `last` (first and last sentence, the middle); None with too few sentences.

    Answers keep the white space around them: first sentence + answer (+ last sentence) is the document.
    """
    document = document.strip()
    ends = sentence_ends(document)
    if len(ends) < (2 if last else 1):
        return None
    first = document[: ends[0]]
    if not last:
        return Pair(first, document[ends[0] :])
    start = ends[-1] + len(document[ends[-1] :]) - len(document[ends[-1] :].lstrip())
    return Pair(first + SENTENCES_BETWEEN + document[start:], document[ends[0] : start])


class Piece(NamedTuple):
    """A sample, or the head or the tail of a document, and the part that it belongs to."""

    held_out: bool
    sample: Sample


class Split:
    """A fixed split by pair or document, equal ones on the same side; of fewer than 100 documents, the end of each.

    A sample is held out when a keyed hash of its text is among the smallest, so that the split depends neither on the
    order of the corpus nor on the run. Making one reads the corpus once.

    Raises:
        ValueError: the corpus has no text, or too little to hold some out.
    """

    def __init__(self, samples: Samples, held_out_fraction: float):
        self.samples, self.fraction = samples, held_out_fraction
        digests = np.fromiter((_digest(sample) for sample in samples), dtype=np.uint64)
        self.size = len(digests)
        self.left_out = dict(samples.left_out)
        where = samples.corpus.where
        if not self.size:
            found = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items()) or "nothing"
            raise ValueError(f"{where} has no text to train on; found {found}")
        different = np.unique(digests)  # sorted
        self.by_sample = samples.pairs or (self.size >= SPLIT_BY_DOCUMENT and len(different) > 1)
        if self.by_sample:
            if len(different) < 2:
                raise ValueError(f"{where} has 1 pair; expected at least 2, one of them to hold out")
            count = min(max(round(len(different) * held_out_fraction), 1), len(different) - 1)
            self._last_held_out = different[count - 1]

    def __iter__(self) -> Iterator[Piece]:
        """A pass over both parts."""
        for sample in self.samples:
            if self.by_sample:
                yield Piece(bool(_digest(sample) <= self._last_held_out), sample)
                continue
            cut = tail_start(sample, self.fraction)
            for held_out, text in ((False, sample[:cut]), (True, sample[cut:])):
                if text.strip():
                    yield Piece(held_out, text)

    def training_texts(self) -> Iterator[str]:
        """All strings of the part to train on: of a tokenizer."""
        for held_out, sample in self:
            if not held_out:
                yield from (sample if isinstance(sample, Pair) else (sample,))


def tail_start(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins: at a line's beginning, or a word's where there is but one line.

    A line without spaces (Chinese, DNA) is cut between characters; len(text) where there is but one.
    """
    end = len(text.rstrip())
    wanted = end - max(round(end * fraction), 1)
    for separator in ("\n", " "):
        after = text.find(separator, wanted, end)
        cut = (text.rfind(separator, 0, wanted) + 1) or after + 1
        if text[:cut].strip() and text[cut:].strip():
            return cut
    # a mark belongs to the letter before it
    cuts = (cut for cut in range(max(wanted, 1), end) if not unicodedata.category(text[cut]).startswith("M"))
    return next((cut for cut in cuts if text[:cut].strip()), len(text))


def _digest(sample: Sample) -> np.uint64:
    digest = hashlib.blake2b(digest_size=8, key=b"fastdiff held out 20260601")
    for text in sample if isinstance(sample, Pair) else (sample,):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return np.uint64(int.from_bytes(digest.digest(), "little"))
