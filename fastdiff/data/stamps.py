"""Stamps: the pictures of Tux Paint (Debian's tuxpaint-stamps-default), each with an English sentence beside it.

They are under the GPL, version 2: read where they are installed, never copied into what is made of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff.data.config import DataConfig
from fastdiff.data.file_checks import key_of_files
from fastdiff.data.jsonl import decode_utf8
from fastdiff.data.pictures import read_picture
from fastdiff.data.prepared import Listing, Source
from fastdiff.data.splits import grouped_split
from fastdiff.data.svg import on_white_square, read_svg
from fastdiff.errors import named

if TYPE_CHECKING:
    from PIL import Image

FOLDER = Path("/usr/share/tuxpaint/stamps")
_VERSION = 1  # of how texts are read
_HELD_OUT = 0.1
_SUFFIXES = (".svg", ".png")  # Tux Paint takes the first, too, where there are both


def stamps_source(config: DataConfig) -> Source:
    """The pictures below `config.folder`, else where Debian has them.

    Raises FileNotFoundError, where there are none, and ModuleNotFoundError, where what draws SVGs is not installed.
    """
    root = FOLDER if config.folder is None else Path(config.folder).expanduser()
    found = sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES) if root.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"{named('folder')}: got {str(root)!r}, which has no pictures; run `apt install tuxpaint-stamps-default` "
            "(161 MB), or set it to a folder that has its stamps"
        )
    import resvg_py  # before any work

    texts = [path.with_suffix(".txt") for path in found if path.with_suffix(".txt").is_file()]
    key = f"{_VERSION} {resvg_py.__version__} {key_of_files([*found, *texts])}"
    return Source("stamps", root, key, lambda: _listing(root, found), _read, distinct=True)


def _listing(root: Path, found: Sequence[Path]) -> Listing:
    listing = Listing(["caption"], [], [], [])
    silent, by_stem = 0, {}
    for path in sorted(found, key=lambda path: _SUFFIXES.index(path.suffix)):
        by_stem.setdefault(path.with_suffix(""), path)
    for stem, path in sorted(by_stem.items()):
        sentence = _sentence(stem.with_name(f"{stem.name}.txt"))
        if sentence is None:
            silent += 1
            continue
        listing.files.append(path.relative_to(root).as_posix())
        listing.texts.append([sentence])
        listing.licenses.append("GPL-2")
    if silent:
        listing.left_out["without a sentence"] = silent
    # pictures of one sentence are on one side
    listing.held_out.extend(grouped_split([text.lower() for (text,) in listing.texts if text], _HELD_OUT))
    return listing


def _sentence(path: Path) -> str | None:
    """The first line, which is English; the others are translations. None where there is no file, or an empty line."""
    if not path.is_file():
        return None
    first = path.read_bytes().partition(b"\n")[0]
    return " ".join(decode_utf8(first, path).split()) or None


def _read(path: Path, image_size: int) -> "Image.Image | None":
    return read_svg(path, image_size) if path.suffix == ".svg" else on_white_square(read_picture(path, 3), image_size)
