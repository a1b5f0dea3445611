"""Generated text as a picture: what was given, and each new token in the colour of the step that chose it."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from fastdiff.visualization.figures import any_names, monospace, save_figure, width_of

_COLUMNS, _LINE, _CHARACTER = (
    110,
    0.19,
    0.0753,
)  # characters per line; inches per line and per character of 9-point monospace
_MOST_LINES = 14  # of a text; what follows is left out
NOTHING = "(nothing but end tokens)"
_SHADES = colormaps["viridis"]


@dataclass(frozen=True)
class TextSample:
    """One generated text.

    Attributes:
        prompt: what was given.
        pieces: the new text, a piece per token.
        steps: the step that chose each piece, from 0.
    """

    prompt: str
    pieces: Sequence[str]
    steps: Sequence[int]


@any_names()
def save_text_samples(samples: Sequence[TextSample], path: str | Path, *, title: str | None = None) -> Path:
    """Writes a PNG of texts, one below the other: prompts grey, new tokens from dark (first step) to light (last).

    Blank lines are left out, and what goes beyond 14 lines.

    Raises:
        ValueError: no samples, or a sample without a step for each piece.
    """
    if not samples or any(len(sample.pieces) != len(sample.steps) for sample in samples):
        raise ValueError(f"samples: got {len(samples)}; expected at least one, each with a step for each piece")
    blocks = [_lines(sample) for sample in samples]
    rows = sum(len(lines) + 1 for lines in blocks) + 2
    height = rows * _LINE
    figure = Figure(figsize=(_COLUMNS * _CHARACTER + 0.4, height))
    if title:
        figure.text(0.2 / figure.get_figwidth(), 1 - 0.8 * _LINE / height, title, fontsize=10, va="center")
    row = 1.6
    for lines in blocks:
        for line in lines:
            _draw(figure, line, 1 - (row + 0.5) * _LINE / height)
            row += 1
        row += 1
    return save_figure(figure, path, dpi=130)


def step_colour(step: int, last: int) -> tuple[float, ...]:
    """The colour of what a step chose, from dark (step 0) to light (step `last`)."""
    return _SHADES(0.85 * step / (last or 1))  # 0.85: the lightest yellow cannot be read on white


def coloured_lines(
    runs: Sequence[tuple[str, object]], columns: int, *, whole_words: bool = False
) -> list[list[tuple[int, str, object]]]:
    """Texts with their colours, one after the other, as lines of so many columns: (column, text, colour).

    `whole_words` breaks a line at its last space, where it has one. Wide letters take two columns.
    """
    lines: list[list[tuple[str, object]]] = [[]]
    for text, colour in runs:
        for character in text.replace("\t", "    "):
            if character == "\n":
                lines.append([])
                continue
            if width_of("".join(c for c, _ in lines[-1]) + character) > columns:
                lines.append(_carried(lines[-1], character) if whole_words else [])
            if character != " " or lines[-1] or not whole_words:
                lines[-1].append((character, colour))
    return [_joined(line) for line in lines]


def _carried(line: list[tuple[str, object]], following: str) -> list[tuple[str, object]]:
    """Takes the word that a line ends in off it, where another word comes before and it goes on."""
    spaces = [index for index, (character, _) in enumerate(line) if character == " "]
    if following == " " or not spaces:
        return []
    word = line[spaces[-1] + 1 :]
    del line[spaces[-1] :]
    return word


def _joined(line: list[tuple[str, object]]) -> list[tuple[int, str, object]]:
    """Neighbours of one colour as one text, with the column at which it begins."""
    found, column = [], 0
    for colour, group in itertools.groupby(line, key=operator.itemgetter(1)):
        text = "".join(character for character, _ in group)
        found.append((column, text, colour))
        column += width_of(text)
    return found


def _lines(sample: TextSample) -> list[list[tuple[int, str, object]]]:
    """Runs of one colour, (column, text, colour), line by line."""
    last = max(sample.steps, default=0)
    coloured = [(piece, step_colour(step, last)) for piece, step in zip(sample.pieces, sample.steps, strict=True)]
    runs = [(sample.prompt, "#808080"), *(coloured or [(NOTHING, "#c1542d")])]
    lines = [line for line in coloured_lines(runs, _COLUMNS) if any(text.strip() for _, text, _ in line)]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], [(0, "…", "#808080")]]
    return lines


def _draw(figure: Figure, line: list[tuple[int, str, object]], y: float) -> None:
    for column, text, colour in line:
        x = (0.2 + column * _CHARACTER) / figure.get_figwidth()
        drawn = "".join(c if c.isprintable() else "·" for c in text)
        figure.text(x, y, drawn, color=colour, family=monospace(), fontsize=9, va="center")
