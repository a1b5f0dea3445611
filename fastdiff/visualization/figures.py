"""Figures as files, whole or not at all, with any names on them."""

import contextlib
import functools
import io
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure

from fastdiff.files import write_atomically

REAL, SYNTHETIC = "#0072B2", "#D55E00"  # Okabe & Ito's, which colour-blind readers tell apart
_LONGEST = 40  # columns of a name
# Fonts with letters that matplotlib's own lacks, taken where they are installed.
_OTHER_LETTERS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "SimHei", "Noto Sans",
    "Noto Sans Devanagari", "Noto Sans Thai", "Noto Sans Arabic", "Noto Emoji", "Arial Unicode MS", "Unifont",
)  # fmt: skip
_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MISSING = "Glyph "  # how matplotlib's warning of a character without one begins


@contextlib.contextmanager
def any_names() -> Iterator[None]:
    """Within the block, or a function that it decorates, texts of figures are drawn as they are.

    "$" begins no mathematics, and letters that the usual font lacks come from another one where there is one.
    """
    with rc_context({"text.parse_math": False, "font.family": ["sans-serif", *_fonts()]}):
        yield


@functools.cache
def _fonts() -> tuple[str, ...]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return tuple(name for name in _OTHER_LETTERS if name in installed)


def monospace() -> list[str]:
    """The families of text in columns, for `family=` of matplotlib."""
    return ["monospace", *_fonts()]


def shown(name: object) -> str:
    """A name as a picture can show it: in one line of at most 40 columns, without characters that cannot be drawn."""
    text = drawable(name)
    while width_of(text) > _LONGEST:
        text = text[: -2 if text.endswith("…") else -1] + "…"
    return text


def drawable(text: object) -> str:
    """A text in one line, with "·" for what cannot be drawn."""
    return " ".join("".join(c if _is_drawn(c) else "·" for c in str(text).replace("\n", " ")).split())


def _is_drawn(character: str) -> bool:
    """Not so: control characters, halves of surrogate pairs, and what changes the direction of writing."""
    kind = unicodedata.category(character)
    return kind not in ("Cc", "Cs") and character not in _BIDI


def width_of(text: str) -> int:
    """Columns of a text: letters of Chinese, Japanese and Korean take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Path:
    """Writes a PNG; what was there before stays until the new one is on the disk."""
    write_atomically(Path(path), png_of(figure, dpi, path))
    return Path(path)


def png_of(figure: Figure, dpi: int, path: str | Path) -> bytes:
    """The PNG of a figure that will lie at `path`.

    A line on stderr names characters for which no font is installed; boxes stand for them.
    """
    content = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(content, dpi=dpi, format="png")
    missing = [str(each.message) for each in caught if str(each.message).startswith(_MISSING)]
    if missing:
        codes = dict.fromkeys(int(text.split()[1]) for text in missing)
        letters = "".join(map(chr, list(codes)[:10])) + ("…" if len(codes) > 10 else "")
        print(f"{path}: no font here has {letters}; boxes stand for them: install fonts-noto-cjk", file=sys.stderr)
    for each in caught:
        if not str(each.message).startswith(_MISSING):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return content.getvalue()
