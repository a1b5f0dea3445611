"""Text that a model wrote, for a terminal: what a terminal would obey is shown instead of sent."""

import unicodedata
from typing import TextIO

# Marks that change the order in which letters are shown: embeddings, overrides, isolates, and single marks.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text with control characters (but tab and line feed), bidi marks and surrogates written as escapes."""
    return "".join(_escaped(char) if is_obeyed(char) else char for char in text)


def is_obeyed(char: str) -> bool:
    """Whether a terminal would do something at a character, or order what is around it, instead of showing it."""
    return char not in "\n\t" and (char in _BIDI or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"))


def _escaped(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def in_encoding(text: str, stream: TextIO) -> str:
    """The text as a stream can take it: characters that its encoding lacks as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def cell_width(character: str) -> int:
    """Cells that a character takes on a terminal: 0, 1 or 2; -1 for a control character."""
    category = unicodedata.category(character)
    if category == "Cc":
        return -1
    if category in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
