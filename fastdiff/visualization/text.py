"""Generated text as a picture: what was given, and each new token in the colour of the step that chose it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from fastdiff.visualization.figures import any_names, monospace, save_figure

_COLUMNS, _LINE, _CHARACTER = (
    110,
    0.19,
    0.0753,
)  # characters per line; inches per line and per character of 9-point monospace
_MOST_LINES = 14  # of a text; what follows is left out
_NOTHING = "(nothing but end tokens)"
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


def _lines(sample: TextSample) -> list[list[tuple[int, str, object]]]:
    """Runs of one colour, (column, text, colour), line by line."""
    last = max(sample.steps, default=0) or 1
    # 0.85: the lightest yellow cannot be read on white
    coloured = [(piece, _SHADES(0.85 * step / last)) for piece, step in zip(sample.pieces, sample.steps, strict=True)]
    lines: list[list[tuple[int, str, object]]] = [[]]
    column = 0
    for text, colour in [(sample.prompt, "#808080"), *(coloured or [(_NOTHING, "#c1542d")])]:
        run = ""
        for character in text.replace("\t", "    "):
            if character == "\n" or column == _COLUMNS:
                lines[-1] += [(column - len(run), run, colour)] if run else []
                lines.append([])
                run, column = "", 0
            if character != "\n":
                run, column = run + character, column + 1
        lines[-1] += [(column - len(run), run, colour)] if run else []
    lines = [line for line in lines if any(text.strip() for _, text, _ in line)]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], [(0, "…", "#808080")]]
    return lines


def _draw(figure: Figure, line: list[tuple[int, str, object]], y: float) -> None:
    for column, text, colour in line:
        x = (0.2 + column * _CHARACTER) / figure.get_figwidth()
        drawn = "".join(c if c.isprintable() else "·" for c in text)
        figure.text(x, y, drawn, color=colour, family=monospace(), fontsize=9, va="center")
