"""The one reader of picture files, and what becomes of pictures of every mode."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.reading import reading

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 89_478_485  # of a picture, from where on Pillow warns; four threads then need 2 GB at most
BACKGROUND = 255  # white, as on a page, is behind what is transparent
# what the suffixes stand for; for others Pillow may run programs, such as Ghostscript for EPS
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF")
_TURNED = {5, 6, 7, 8}  # orientations that change width and height
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 262, 274  # tags of EXIF and TIFF
_WHITE_IS_ZERO = 0
_ADVICE = "; remove it or replace it"


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture in pixels, as it is looked at (EXIF's orientation applied), from its header.

    Raises ValueError where it is no picture of a known format, or has more than 89 478 485 pixels; OSError.
    """
    from PIL import Image

    with reading(path, " is not an image that PIL can read", _ADVICE), _opened(path) as image:
        size = image.size
        if image.format == "TIFF":  # some versions of Pillow have turned the size already
            size, orientation = (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]), image.tag_v2.get(_ORIENTATION)
        else:
            orientation = Image.Image.getexif(image).get(_ORIENTATION)  # not PNG's own, which decodes the picture
        return size[::-1] if orientation in _TURNED else size


def read_picture(path: Path, channels: int) -> "Image.Image":
    """A picture of one channel (mode "L") or three ("RGB"); see `flattened`. Animated ones give their first frame.

    Raises ValueError where it cannot be decoded whole, is too large (`picture_size`), or has values of unknown range;
    OSError. One line that names the file.
    """
    with reading(path, " cannot be decoded as an image", _ADVICE), _opened(path) as image:
        return flattened(image, channels)


def check_picture(path: Path) -> None:
    """Decodes a picture whole, and compares the checksums that its format has. Raises as `read_picture` does."""
    with reading(path, " cannot be decoded as an image", _ADVICE), _opened(path) as image:
        image.verify()
    read_picture(path, 3)


def flattened(image: "Image.Image", channels: int) -> "Image.Image":
    """A picture as it is looked at, in 8 bits a channel: mode "L" for one channel, "RGB" for three.

    It is turned by EXIF's orientation. Greys of 16 bits (0 … 65535, or what a TIFF's bits say) and of floats (0 … 1)
    are scaled. What is transparent is composed on white. Palettes, CMYK and other modes are converted by Pillow.

    Raises ValueError for 32-bit integers and floats outside 0 … 1, whose white is not known, and what Pillow raises.
    """
    from PIL import Image, ImageOps

    mode = "L" if channels == 1 else "RGB"
    image.load()  # which turns a TIFF
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _scaled_grey(image).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (BACKGROUND,) * 4)
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["Image.Image"]:
    """A picture whose header was read, and whose number of pixels is within bounds."""
    from PIL import Image

    # a file, not its name: of a name Pillow maps some TIFFs into memory, and forgets to turn them
    with path.open("rb") as file:
        try:
            image = Image.open(file, formats=_FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(_FORMATS)}, or damaged") from None
        with image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; expected at most {MAX_PIXELS} in all")
            yield image


def _scaled_grey(image: "Image.Image") -> "Image.Image":
    """Mode "L" of a grey picture of 16 bits or of floats."""
    from PIL import Image

    values = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        lowest, highest = float(values.min()), float(values.max())
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f"it has floats {lowest:g} … {highest:g}; expected 0 … 1, black to white")
        white = 1.0
    else:
        tags = getattr(image, "tag_v2", {})  # of TIFF
        bits = int(np.max(tags.get(_BITS, 16)))
        if image.mode == "I" and (image.format == "TIFF" or values.min() < 0 or values.max() > 65535):
            raise ValueError("it has integers of 32 bits, whose white is not known; expected 8 or 16 bits")
        white = 2.0 ** min(max(bits, 9), 16) - 1
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            values = white - values
    scaled = np.rint(np.clip(values / white, 0, 1) * 255)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):  # the value of a PNG's transparent pixels
        scaled[np.asarray(image) == hidden] = BACKGROUND
    return Image.fromarray(scaled.astype(np.uint8))
