"""SVG drawings as pictures (resvg), and pictures of any shape on a white square."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff.data.pictures import flattened
from fastdiff.reading import reading

if TYPE_CHECKING:
    from PIL import Image

_DPI = 96.0  # CSS's: without it resvg refuses sizes in millimetres and points
_LARGEST = 4096  # edge in pixels of what is drawn at most
_DEEPEST = 200  # elements in one another
_ADVICE = "; remove it or replace it"
_NEARLY_WHITE = 250  # from where on, of 255, a pixel counts as empty paper
_BORDER = 0.04  # of the edge, left free each way


def read_svg(path: Path, image_size: int) -> "Image.Image | None":
    """What an SVG draws, as large as fits on a white square of `image_size` pixels: mode "RGB". None: nothing is seen.

    A small drawing on a large page is drawn larger, and the page cut off. Texts are not drawn: fonts differ from
    machine to machine.

    Raises:
        ValueError: it cannot be parsed; one line that names the file. OSError.
        ModuleNotFoundError: the package resvg-py is missing.
    """
    content = path.read_bytes()
    _check_depth(content, path)
    picture = _rendered(content, path, 2 * image_size)
    box = _drawn_box(picture)
    if box is None:
        return None
    largest = max(box[2] - box[0], box[3] - box[1])
    if largest < image_size:  # too few pixels of it
        edge = min(math.ceil(2 * image_size * 2 * image_size / largest), _LARGEST)
        picture = _rendered(content, path, edge)
    return on_white_square(picture, image_size)


def on_white_square(picture: "Image.Image", image_size: int) -> "Image.Image":
    """A picture (mode "RGB") without its white border, as large as fits into the middle of a white square."""
    from PIL import Image

    picture = picture.crop(_drawn_box(picture))
    inner = image_size - 2 * round(_BORDER * image_size)
    scale = inner / max(picture.size)
    size = [max(round(scale * edge), 1) for edge in picture.size]
    square = Image.new("RGB", (image_size, image_size), "white")
    place = [(image_size - edge) // 2 for edge in size]
    square.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return square


def _check_depth(content: bytes, path: Path) -> None:
    """Raises ValueError for what is no XML, or nested so deep that resvg, which calls itself, would end the process."""
    from xml.parsers import expat

    depth = 0

    def started(*_: object) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")

    def ended(_: str) -> None:
        nonlocal depth
        depth -= 1

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = started, ended
    with reading(path, " cannot be drawn as an SVG", _ADVICE):
        parser.Parse(content, True)


def _rendered(content: bytes, path: Path, edge: int) -> "Image.Image":
    import resvg_py
    from PIL import Image

    with reading(path, " cannot be drawn as an SVG", _ADVICE):
        text = content.decode("utf-8", errors="replace")  # what is replaced are letters of texts or comments
        drawn = resvg_py.svg_to_bytes(svg_string=text, width=edge, height=edge, dpi=_DPI, skip_system_fonts=True)
        return flattened(Image.open(io.BytesIO(drawn)), 3)


def _drawn_box(picture: "Image.Image") -> tuple[int, int, int, int] | None:
    """The box around all that is not white; None where nothing is."""
    return picture.convert("L").point(lambda value: 255 * (value < _NEARLY_WHITE)).getbbox()
