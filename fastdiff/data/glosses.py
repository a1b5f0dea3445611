"""Words and their glosses from Debian's dict-wn (WordNet): real text whose length its prompt hardly tells."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from fastdiff.reading import reading

GLOSSES_FILE = Path("/usr/share/dictd/wn.dict.dz")
_MOST_BYTES = 2**28  # dict-wn has 35 million
# "    n 1: the gloss; "an example" [syn: {word}]", indented, going on in lines indented further
_SENSE = re.compile(r"^ {2,8}(?P<kind>n|v|adj|adv)(?: \d+)?: |^ {2,8}\d+: ")
_BEHIND = re.compile(r'; "|\s\[(?:syn|ant|also): ')  # examples and cross references


def read_glosses(path: Path) -> Iterator[tuple[str, str]]:
    """("10-membered (adj)", "having ten members"), …: a gloss once, with the first of its words.

    Raises ValueError where the file is not dict-wn's.
    """
    with reading(path, " cannot be read", "; expected wn.dict.dz of Debian's dict-wn"), gzip.open(path) as file:
        content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it stands for more than {_MOST_BYTES} bytes")
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    seen: set[str] = set()
    for word, kind, text in _senses(lines):
        gloss = _BEHIND.split(text, maxsplit=1)[0].strip().rstrip(";")
        if gloss and gloss not in seen:
            seen.add(gloss)
            yield f"{word} ({kind})", gloss


def _senses(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Word, part of speech and text of each sense."""
    word, kind, text = "", "", ""
    for line in lines:
        sense = _SENSE.match(line)
        if text and (sense or not line.startswith(" ")):
            yield word, kind, text
            text = ""
        if sense:
            kind, text = sense["kind"] or kind, line[sense.end() :]
        elif text and line.strip():
            text += ("" if text.endswith("-") else " ") + line.strip()
        elif line and not line.startswith(" "):
            word = "" if line.startswith("00-database") else line
    if text:
        yield word, kind, text
