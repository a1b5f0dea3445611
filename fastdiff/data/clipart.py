"""Clip art: the drawings of Debian's openclipart-svg with the titles, keywords and descriptions that people gave them.

They lie in each SVG's metadata (Dublin Core). Many titles are no title of the picture: whole collections bear one name.
A title or a description that many files share is left out, and a picture that has neither of its own, too. File names
are not used. The drawings are dedicated to the public domain; those under the GPL are left out.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from fastdiff.data.config import DataConfig
from fastdiff.data.file_checks import key_of_files
from fastdiff.data.prepared import Listing, Source
from fastdiff.data.splits import grouped_split
from fastdiff.data.svg import read_svg
from fastdiff.errors import named

FOLDER = Path("/usr/share/openclipart/svg")
ENTRIES = ["title", "keywords", "caption"]
_VERSION = 1  # of how texts are cleaned
_HELD_OUT = 0.1
_MOST_SHARED = 12  # pictures that may have the same title or description; more are a collection's
_MOST_KEYWORDS, _LONGEST_KEYWORD = 8, 24
_LONGEST_CAPTION = 30  # words
_DEEPEST = 30  # elements of metadata in one another
_BY = re.compile(r"(?:clip ?art|drawing) by .*? - ", re.IGNORECASE)
_NUMBER_AT_END = re.compile(r"(?:[\s#-]*\d+|\s+(?:svg|bw))+$", re.IGNORECASE)
_IN_BRACKETS = re.compile(r"\s*\(([^()]*[a-z][^()]*)\)$")
_A_NUMBER = re.compile(r"(?:0x)?[0-9a-f]*[0-9][0-9a-f]*")
_ABOUT_THE_FILE = re.compile(
    r"@|https?:|www\.|\.com\b|\.svg\b|\b(?:svg|eps|inkscape|sodipodi|vectorized|vectorization|clip ?art|converted|"
    r"collection|copyright|public domain|contact)\b",
    re.IGNORECASE,
)
_BOOKKEEPING = frozenset(
    ("hash", "unsorted", "special", "magick", "mapsym", "clipart", "clip art", "clip", "art", "svg", "image", "picture",
     "misc", "miscellany", "various", "other", "signs and symbols", "openclipart", "ocal")
)  # fmt: skip
_NO_TITLE = frozenset(("untitled", "unnamed", "no name", "drawing", "new document", "clipart", "image", "icon", "test"))


@dataclass(frozen=True)
class _Metadata:
    """What a file says of itself; texts without line breaks, "" where there is none."""

    title: str = ""
    description: str = ""
    keywords: tuple[str, ...] = ()
    creators: tuple[str, ...] = ()
    license: str = ""
    readable: bool = True


def clipart_source(config: DataConfig) -> Source:
    """The SVGs below `config.folder`, else Debian's.

    Raises FileNotFoundError, where there are none, and ModuleNotFoundError, where what draws them is not installed; one
    line says what to install.
    """
    root = FOLDER if config.folder is None else Path(config.folder).expanduser()
    files = sorted(path for path in root.rglob("*.svg") if not path.is_symlink()) if root.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{named('folder')}: got {str(root)!r}, which has no .svg files; run `apt install openclipart-svg`, or set "
            "it to a folder that has them"
        )
    import resvg_py  # before any work

    key = f"{_VERSION} {resvg_py.__version__} {key_of_files(files)}"
    return Source("clipart", root, key, lambda: _listing(root, files), read_svg, distinct=True)


def _listing(root: Path, files: Sequence[Path]) -> Listing:
    found = [_metadata(path) for path in files]
    titles = Counter(each.title.lower() for each in found)
    descriptions = Counter(each.description.lower() for each in found)
    listing = Listing(list(ENTRIES), [], [], [])
    left_out: Counter[str] = Counter()
    for path, each in zip(files, found, strict=True):
        row = [
            _title(each.title, titles[each.title.lower()], each.creators),
            _keywords(each.keywords, each.creators),
            _caption(each.description, descriptions[each.description.lower()]),
        ]
        if "gpl" in each.license.lower():
            left_out["under the GPL"] += 1
        elif each.readable and row[0] is None and row[2] is None:
            left_out["without a title or description of their own"] += 1
        else:
            listing.files.append(path.relative_to(root).as_posix())
            listing.texts.append(row)
            listing.licenses.append(each.license)
    listing.left_out.update(left_out)
    # a series ("dog 1", "dog 2") is on one side
    groups = [title or caption or "" for title, _, caption in listing.texts]
    listing.held_out.extend(grouped_split(groups, _HELD_OUT))
    return listing


def _metadata(path: Path) -> _Metadata:
    """Dublin Core's fields of an SVG. One that is no XML has none, and is found to be broken when it is drawn."""
    fields: dict[str, list[str]] = {"title": [], "description": [], "li": [], "license": []}
    creators: list[str] = []
    around: list[str] = []  # names of the elements from "metadata" on
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            name = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
            if event == "start":
                if around or name == "metadata":
                    around.append(name)
                if len(around) > _DEEPEST:
                    return _Metadata(readable=False)
                continue
            if not around:
                continue
            around.pop()
            if not around:
                break
            text = " ".join((element.text or "").split())
            if name.lower() == "license":
                fields["license"] += [value for value in element.attrib.values() if value]
            elif name == "title" and "creator" in around:
                creators.append(text)
            elif name == "li" and "subject" in around or name in ("title", "description") and around[-1] == "Work":
                fields[name].append(text)
    except (ElementTree.ParseError, ValueError, LookupError):
        return _Metadata(readable=False)
    return _Metadata(
        next(filter(None, fields["title"]), ""),
        next(filter(None, fields["description"]), ""),
        tuple(fields["li"]),
        tuple(creators),
        " ".join(dict.fromkeys(fields["license"])),
    )


def _title(title: str, pictures: int, creators: Iterable[str]) -> str | None:
    """In lower case, without numbers at its end and without its author; None where it is not of the picture."""
    names = {name.lower() for name in creators}
    without_author = _BY.sub("", title)
    if pictures > (1 if without_author != title else _MOST_SHARED):  # an author's name shows that a title was copied
        return None
    text = " ".join(without_author.replace("_", " ").lower().split())
    text = text if " " in text else text.replace("-", " ")
    text = _IN_BRACKETS.sub(r", \1", _NUMBER_AT_END.sub("", text)).strip(" -.,;:")
    if text in _NO_TITLE or text in names or _ABOUT_THE_FILE.search(text) or not re.search(r"[^\W\d_]{3}", text):
        return None
    return text


def _keywords(keywords: Iterable[str], creators: Iterable[str]) -> str | None:
    """ "animal, cat": in lower case, without those that say nothing of the picture."""
    words = (" ".join(each.replace("_", " ").lower().split()) for each in keywords)
    names = {name.lower() for name in creators}
    kept = [
        word for word in dict.fromkeys(words)
        if word and word not in _BOOKKEEPING and len(max(word.split(), key=len)) <= _LONGEST_KEYWORD
        and not _A_NUMBER.fullmatch(word) and not any(word in name or name in word for name in names if name)
        and not _ABOUT_THE_FILE.search(word)
    ]  # fmt: skip
    return ", ".join(kept[:_MOST_KEYWORDS]) or None


def _caption(description: str, pictures: int) -> str | None:
    """The first sentence of a description; None where it is about the file, shared by many, or no sentence."""
    sentence = re.split(r"(?<=[.!?])\s", description, maxsplit=1)[0].strip()
    count = len(sentence.split())
    if pictures > _MOST_SHARED or _ABOUT_THE_FILE.search(sentence) or not 3 <= count <= _LONGEST_CAPTION:
        return None
    return sentence
