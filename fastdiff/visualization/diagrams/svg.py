"""A drawing as SVG: boxes, texts, lines with arrowheads, in one visual language.

Coordinates are pixels from the upper left corner. Texts are texts, in fonts that a reader has; widths are those of
DejaVu Sans, which is wider than the others.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from html import escape

from matplotlib import font_manager

from fastdiff.visualization.figures import drawable

FONTS = "'Segoe UI','Helvetica Neue',Helvetica,Arial,'DejaVu Sans',sans-serif"
INK, MUTED, FAINT, PAPER, LINE = "#1f2933", "#5f6c7b", "#9aa5b1", "#ffffff", "#7b8794"
# What a part does → its fill and its stroke.
ROLES = {
    "embed": ("#e3f4ea", "#2f855a"),
    "condition": ("#fff1e0", "#c05621"),
    "norm": ("#fdf6d8", "#b7860b"),
    "attention": ("#e4eefc", "#2b6cb0"),
    "cross": ("#fde6d6", "#c2410c"),
    "mlp": ("#ede7fb", "#6b46c1"),
    "modulation": ("#fde6f1", "#b83280"),
    "conv": ("#def5f3", "#0f766e"),
    "head": ("#e2f3fb", "#0e7490"),
    "plain": ("#eef1f5", "#52606d"),
}
_SCALE = 100  # pixels at which advances are measured
_Point = tuple[float, float]


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Pixels of a text in a font size, at most."""
    return sum(_advance(character, bold) for character in text) * size


@functools.cache
def _advance(character: str, bold: bool) -> float:
    font = _font(bold)
    if not font.get_char_index(ord(character)):  # from another font, where letters may be as wide as high
        return 1.0
    return font.load_char(ord(character)).linearHoriAdvance / 65536 / _SCALE


@functools.cache
def _font(bold: bool):
    wanted = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    font = font_manager.get_font(font_manager.findfont(wanted))
    font.set_size(_SCALE, 72)
    return font


def fitted(text: str, width: float, size: float, bold: bool = False) -> str:
    """A text cut, with "…", so that it is at most so wide."""
    while text and text_width(text, size, bold) > width:
        text = text[: -2 if text.endswith("…") else -1].rstrip() + "…"
        if text == "…":
            break
    return text


def wrapped(text: str, width: float, size: float) -> list[str]:
    """A text in lines of at most such a width, broken at " · " where that is enough, else at spaces."""
    lines: list[str] = []
    for part in text.split(" · "):
        if lines and text_width(f"{lines[-1]} · {part}", size) <= width:
            lines[-1] += f" · {part}"
        elif text_width(part, size) <= width:
            lines.append(part)
        else:
            lines += _by_words(part, width, size)
    return lines


def _by_words(text: str, width: float, size: float) -> list[str]:
    lines: list[str] = []
    for word in text.split(" "):
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [fitted(line, width, size) for line in lines]


class Drawing:
    """Elements in the order in which they are drawn; `svg` gives them as one document of the size that they need."""

    def __init__(self, title: str, description: str) -> None:
        self.title, self.description = drawable(title), drawable(description)
        self._elements: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = PAPER,
        stroke: str = "none",
        radius: float = 8,
        line: float = 1.3,
        dashes: str = "",
        opacity: float = 1,
    ) -> None:
        extra = f' stroke-dasharray="{dashes}"' if dashes else ""
        extra += f' opacity="{_number(opacity)}"' if opacity != 1 else ""
        border = f' stroke="{stroke}" stroke-width="{_number(line)}"' if stroke != "none" else ""
        self._elements.append(
            f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}" '
            f'rx="{_number(radius)}" fill="{fill}"{border}{extra}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        color: str = INK,
        bold: bool = False,
        anchor: str = "start",
        italic: bool = False,
    ) -> None:
        """`y` is the middle of the small letters' height; `anchor` is "start", "middle" or "end"."""
        if not text:
            return
        style = ' font-weight="600"' if bold else ""
        style += ' font-style="italic"' if italic else ""
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self._elements.append(
            f'<text x="{_number(x)}" y="{_number(y + 0.35 * size)}" font-size="{_number(size)}" fill="{color}"{style}>'
            f"{escape(drawable(text), quote=False)}</text>"
        )

    def line(
        self,
        points: Sequence[_Point],
        *,
        color: str = LINE,
        width: float = 1.4,
        arrow: bool = False,
        dashes: str = "",
        radius: float = 7,
    ) -> None:
        """A line through points, its corners rounded by `radius`, with an arrowhead at its end."""
        path = f"M{_pair(points[0])}"
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            if radius:
                path += f"L{_pair(_towards(corner, before, radius))}Q{_pair(corner)} "
                path += _pair(_towards(corner, after, radius))
            else:
                path += f"L{_pair(corner)}"
        path += f"L{_pair(points[-1])}"
        extra = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._elements.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{_number(width)}"{extra}/>')
        if arrow:
            self._arrowhead(points[-2], points[-1], color)

    def _arrowhead(self, start: _Point, end: _Point, color: str) -> None:
        (x0, y0), (x, y) = start, end
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5 or 1
        dx, dy = (x - x0) / length, (y - y0) / length
        back = (x - 7 * dx, y - 7 * dy)
        left, right = (back[0] - 3.5 * dy, back[1] + 3.5 * dx), (back[0] + 3.5 * dy, back[1] - 3.5 * dx)
        self.area([left, end, right], fill=color)

    def area(self, points: Sequence[_Point], *, fill: str, opacity: float = 1) -> None:
        """A filled polygon."""
        extra = f' opacity="{_number(opacity)}"' if opacity != 1 else ""
        self._elements.append(f'<path d="M{"L".join(map(_pair, points))}Z" fill="{fill}"{extra}/>')

    def squares(self, corners: Sequence[_Point], side: float, *, fill: str) -> None:
        """Filled squares of one colour, by their upper left corners."""
        step = _number(side + 0.15)  # a little over the edge: no seams between neighbours
        path = "".join(f"M{_pair(corner)}h{step}v{step}h-{step}z" for corner in corners)
        self._elements.append(f'<path d="{path}" fill="{fill}"/>')

    def circle(self, x: float, y: float, radius: float, *, fill: str = PAPER, stroke: str = INK) -> None:
        self._elements.append(
            f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}" fill="{fill}" stroke="{stroke}" '
            'stroke-width="1.3"/>'
        )

    def mark(self) -> int:
        """A place for `behind`."""
        return len(self._elements)

    @contextlib.contextmanager
    def behind(self, place: int) -> Iterator[None]:
        """A block that draws behind what was drawn since `mark` gave `place`."""
        front, self._elements = self._elements[place:], self._elements[:place]
        yield
        self._elements += front

    def begin(self, title: str) -> None:
        """Opens a group whose title a browser shows under the mouse; `end` closes it."""
        self._elements.append(f"<g><title>{escape(drawable(title), quote=False)}</title>")

    def end(self) -> None:
        self._elements.append("</g>")

    def svg(self, width: float, height: float) -> str:
        """The document."""
        title, description = (escape(text, quote=False) for text in (self.title, self.description))
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{_number(width)}" height="{_number(height)}" '
                f'viewBox="0 0 {_number(width)} {_number(height)}" role="img" aria-labelledby="title desc" '
                f'font-family="{FONTS}">',
                f'<title id="title">{title}</title>',
                f'<desc id="desc">{description}</desc>',
                f'<rect x="0.5" y="0.5" width="{_number(width - 1)}" height="{_number(height - 1)}" rx="12" '
                f'fill="{PAPER}" stroke="#d9dfe6"/>',
                *self._elements,
                "</svg>\n",
            )
        )


def _towards(corner: _Point, other: _Point, radius: float) -> _Point:
    """The point on the way from a corner to another, `radius` away or in the middle."""
    length = ((other[0] - corner[0]) ** 2 + (other[1] - corner[1]) ** 2) ** 0.5 or 1
    share = min(radius / length, 0.5)
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _pair(point: _Point) -> str:
    return f"{_number(point[0])} {_number(point[1])}"
