"""Emoji: colour pictures with their names, drawn from Debian's Noto Color Emoji (OFL) by names of PyPI's `emoji` (BSD).

Each picture is there once, without variants of skin tone. Nearly all are trained on. Held out are some whose names put
words together that training names have, each in others ("woman astronaut", "green heart"): what a model draws of them
shows whether it has understood words, not names.
"""

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff.data.captions import CaptionedData, Captions
from fastdiff.data.config import DataConfig
from fastdiff.data.images import ArrayImages
from fastdiff.errors import named
from fastdiff.files import cache_folder, make_folder_once, read_json, sha256_of
from fastdiff.reading import reading

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FONT = "NotoColorEmoji.ttf"
FONT_FOLDERS = (Path("/usr/share/fonts/truetype/noto"), Path("/usr/share/fonts/noto"))
ENTRIES = ("name", "alias", "alias", "caption", "caption")
HELD_OUT = (
    "black cat", "crying cat", "kissing cat", "green heart", "brown heart", "blue circle", "orange square",
    "purple circle", "white circle", "yellow square", "large orange diamond", "small blue diamond", "blue book",
    "white question mark", "up-left arrow", "right arrow curving down", "grinning cat with smiling eyes",
    "frowning face with open mouth", "kissing face with smiling eyes", "man astronaut", "woman firefighter",
    "man farmer", "woman mechanic", "man scientist", "woman singer", "man pilot", "woman artist", "man cook",
    "woman judge", "man vampire", "woman elf", "man fairy", "man surfing", "woman swimming", "man biking",
    "woman juggling", "man shrugging", "woman facepalming", "woman with white cane", "man red hair", "woman curly hair",
    "couple with heart woman man",
)  # fmt: skip
_VERSION = 1  # of how they are drawn
_FONT_SIZE = 109  # the only one of the font's bitmaps
_GLYPH = (136, 128)  # width and height of one, in pixels
_FULLY_QUALIFIED = 2
_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_NO_CHARACTER = "\U0010ffff"
_WITHOUT_ARTICLE = re.compile(r"(?!flag of )(.*[^sui']s|\d.*|[A-Z].*|.*[Hh]ands|.* down|.* up)")


def load_emoji(config: DataConfig) -> CaptionedData:
    """Emoji as [3, image_size, image_size] on white, each with its name, up to two aliases, and two captions.

    They are drawn once for a font and size, and kept in the cache. All are of one class.

    Raises:
        FileNotFoundError, ModuleNotFoundError: the font or the package emoji is missing; one line says how to get it.
        ValueError: a font that cannot be read, or draws other pictures. PermissionError: see `make_folder_once`.
    """
    try:
        import emoji
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{named('name')}: got 'emoji', whose names are in the package emoji, which is not installed; run: "
            "pip install emoji"
        ) from None
    font = _find_font(config)
    key = f"{sha256_of(font)[:16]}-{emoji.__version__}-{config.image_size}-v{_VERSION}"
    folder = cache_folder() / "emoji" / key
    size = config.image_size
    if not _is_complete(folder, size):
        make_folder_once(folder, lambda path: _is_complete(path, size), lambda path: _fill(path, font, size))
    pixels = torch.from_numpy(np.load(folder / "pixels.npy"))
    rows = [_texts_of(texts) for texts in _unambiguous(read_json(folder / "names.json")["names"])]
    is_held_out = torch.tensor([row[0] in HELD_OUT for row in rows])
    train, held_out = torch.nonzero(~is_held_out).flatten(), torch.nonzero(is_held_out).flatten()
    if not len(held_out):
        raise ValueError(f"{font}: got none of the emoji that are held out, such as {HELD_OUT[0]}; expected {FONT}")
    return CaptionedData(
        "emoji",
        ArrayImages(pixels[train], torch.zeros(len(train), dtype=torch.long)),
        ArrayImages(pixels[held_out], torch.zeros(len(held_out), dtype=torch.long)),
        ("emoji",),
        (3, config.image_size, config.image_size),
        Captions.of(ENTRIES, *([rows[index] for index in part.tolist()] for part in (train, held_out))),
        {},
        seen=torch.zeros(len(held_out), dtype=torch.bool),
    )


def _find_font(config: DataConfig) -> Path:
    folders = FONT_FOLDERS if config.folder is None else (Path(config.folder).expanduser(),)
    found = next((folder / FONT for folder in folders if (folder / FONT).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{FONT} is not in {' and '.join(map(str, folders))}; run `apt install fonts-noto-color-emoji` or set "
            f"{named('folder')}"
        )
    return found


def _is_complete(folder: Path, size: int) -> bool:
    try:
        names = read_json(folder / "names.json")["names"]
        return np.load(folder / "pixels.npy", mmap_mode="r").shape == (len(names), 3, size, size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fill(folder: Path, font_file: Path, size: int) -> None:
    """Writes pixels.npy, uint8 [N, 3, size, size], and names.json: N lists of names, the first one its own.

    Of emoji that look the same one picture is kept, with all of their names.
    """
    from PIL import ImageFont, features
    from tqdm import tqdm

    if not features.check("raqm"):
        raise ValueError(
            f"{named('name')}: got 'emoji' with a Pillow that has no Raqm, which joins the parts of emoji; expected "
            "one that has; run: pip install --upgrade --force-reinstall pillow"
        )
    with reading(font_file, " cannot be read as a font of colour pictures", "; install fonts-noto-color-emoji again"):
        # its content, not its name: of a file that it can't read Pillow takes another with that name from the system
        font = ImageFont.truetype(io.BytesIO(font_file.read_bytes()), _FONT_SIZE)
        missing = _drawn(_NO_CHARACTER, font).tobytes()
        names: dict[bytes, list[str]] = {}  # by picture
        pixels = []
        bar = tqdm(_all_names().items(), desc="drawing emoji", unit="", disable=None, delay=2, file=sys.stderr)
        for text, its_names in bar:
            if font.getlength(text) > 1.5 * _GLYPH[0]:  # a sequence that this font has no picture of
                continue
            picture = _drawn(text, font)
            content = picture.tobytes()
            if content == missing:
                continue
            if content in names:
                names[content] += its_names
                continue
            names[content] = its_names
            pixels.append(np.asarray(_resized(picture, size)).transpose(2, 0, 1))
        np.save(folder / "pixels.npy", np.stack(pixels))
        (folder / "names.json").write_text(json.dumps({"names": list(names.values())}, ensure_ascii=False))


def _drawn(text: str, font: "ImageFont.FreeTypeFont") -> "Image.Image":
    """An emoji on a white square, as large as the font has it."""
    from PIL import Image, ImageDraw

    width, height = _GLYPH
    picture = Image.new("RGB", (width, width), "white")
    ImageDraw.Draw(picture).text((0, (width - height) // 2), text, font=font, embedded_color=True)
    return picture


def _resized(picture: "Image.Image", size: int) -> "Image.Image":
    from PIL import Image

    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _all_names() -> dict[str, list[str]]:
    """The names of each emoji, the first one its own: {"🍎": ["red apple", "apple"], …}, in an order of their own."""
    import emoji

    found = {}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] == _FULLY_QUALIFIED and not any(ord(character) in _TONES for character in text):
            names = [_words(name) for name in (entry["en"], *entry.get("alias", []))]
            if ord(text[0]) in _FLAG_LETTERS:  # ":Japan:" is the flag
                names = [f"flag of {names[0]}", *names]
            found[text] = list(dict.fromkeys(names))
    return dict(sorted(found.items()))


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").replace("’", "'").split())


def _unambiguous(names: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each picture's own name, and of the others those that are words and no other picture's."""
    counts = Counter(name.lower() for each in names for name in dict.fromkeys(name.lower() for name in each))
    kept = []
    for own, *others in names:
        others = {name.lower(): name for name in others if _is_words(name) and counts[name.lower()] == 1}
        kept.append([own, *(name for key, name in others.items() if key != own.lower())])
    return kept


def _is_words(name: str) -> bool:
    """Not "+1", "u55b6", "clock930" or "egg2"."""
    return bool(re.search(r"[a-z]{2}", name, re.IGNORECASE)) and not re.search(r"[a-z][0-9]", name, re.IGNORECASE)


def _texts_of(names: Sequence[str]) -> list[Any]:
    """A row of `ENTRIES`."""
    name, *aliases = names
    article = "the " if name.startswith("flag of ") else "an " if name[0] in "aeiou" else "a "
    article = "" if _WITHOUT_ARTICLE.fullmatch(name) else article
    return [name, *[*aliases, None, None][:2], f"an emoji of {article}{name}", article + name if article else None]
