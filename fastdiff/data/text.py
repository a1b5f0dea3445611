"""Text ready to train on: a corpus, split, tokenized once and kept as token files in the cache."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.data.corpora import Corpus, Pair, open_corpus
from fastdiff.data.samples import Piece, Samples, Split
from fastdiff.data.text_config import TextDataConfig, TokenizerConfig
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.data.token_files import TokenFile, TokenFileWriter
from fastdiff.data.tokenization import (
    TRAINED_TOKENIZERS,
    encode_texts,
    load_saved_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from fastdiff.errors import named, section
from fastdiff.files import cache_folder, make_folder_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 2  # of the cached folder; a change of splitting or tokenizing makes old folders strangers
_META, _TOKENIZER = "meta.json", "tokenizer"
_PARTS = ("train", "held_out")
_BATCH_TEXTS, _BATCH_CHARACTERS = 512, 4_000_000  # tokenized at once: enough for the tokenizer's threads


def load_text_data(data: TextDataConfig, tokenizer: "TokenizerConfig | PreTrainedTokenizerBase") -> TextData:
    """Loads the text that a recipe names, tokenized.

    Token files lie in cache_folder()/tokens/<name>-<hash of source, tokenizer and options>, made the first time and
    opened afterwards without reading the texts (of files, names, sizes and times tell whether they changed). Processes
    that ask for the same at once wait for the one that makes it; what an interrupted one leaves is not taken for whole.

    Args:
        tokenizer: the recipe's, or one that is there already, such as a finished run's: it needs an eos token.

    Raises:
        OSError, ModuleNotFoundError, ValueError: a source or tokenizer is missing or unusable, a cached file damaged,
            the corpus empty or too small for `data.max_length`; one line.
    """
    corpus = open_corpus(data)
    if isinstance(tokenizer, TokenizerConfig):
        trained = tokenizer.name in TRAINED_TOKENIZERS
        with section("tokenizer"):
            ready = None if trained else load_tokenizer(tokenizer, ())
    else:
        trained, ready = False, tokenizer
        _expect_special_tokens(tokenizer)
    tokenizer_key = json.dumps(asdict(tokenizer)) if trained else tokenizer_fingerprint(ready)
    folder = _cached_folder(data, corpus, tokenizer_key)
    if not _is_complete(folder):
        make_folder_once(folder, _is_complete, lambda new: _fill(new, data, corpus, tokenizer, ready))
    if ready is None:
        ready = load_saved_tokenizer(folder / _TOKENIZER)
    return _open(folder, data, ready)


def _expect_special_tokens(tokenizer: "PreTrainedTokenizerBase") -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no EoS token, which closes documents; choose one that has")


def _cached_folder(data: TextDataConfig, corpus: Corpus, tokenizer_key: str) -> Path:
    from tokenizers import __version__ as tokenizers_version

    options: dict[str, Any] = {"sample": data.sample, "held_out_fraction": data.held_out_fraction}
    if data.sample != "documents":
        options["max_prompt_length"] = data.max_prompt_length
    parts = [_FORMAT, data.name, corpus.key, options, tokenizer_key, tokenizers_version]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "tokens" / f"{data.name}-{digest[:16]}"


def _is_complete(folder: Path) -> bool:
    """Whether all files of a cached folder are there; what is in them is looked at when they are opened."""
    try:
        meta = json.loads((folder / _META).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        raise ValueError(f"{folder / _META} is damaged; delete {folder}, and it is made again") from None
    return (folder / _TOKENIZER).is_dir() and all((folder / name).is_file() for name in meta["files"])


def _fill(
    folder: Path,
    data: TextDataConfig,
    corpus: Corpus,
    tokenizer: "TokenizerConfig | PreTrainedTokenizerBase",
    ready: "PreTrainedTokenizerBase | None",
) -> None:
    split = Split(Samples(corpus, data.sample), data.held_out_fraction)
    if ready is None:
        with section("tokenizer"):
            ready = load_tokenizer(tokenizer, split.training_texts())
    _write(folder, data, split, ready)


def _write(folder: Path, data: TextDataConfig, split: Split, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Fills a folder with token files, tokenizer and meta.json."""
    where, kinds = split.samples.corpus.where, ("targets", "conditions") if split.samples.pairs else ("targets",)
    names = [f"{part}_{kind}.tokens" for part in _PARTS for kind in kinds]
    left_out = split.left_out | _write_tokens(folder, names, data, split, tokenizer)
    counted = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    if counted:
        print(f"data {data.name}: of {where}, left out: {counted}", file=sys.stderr)
    tokenizer.save_pretrained(str(folder / _TOKENIZER))
    files = {name: TokenFile.open(folder / name) for name in names}
    for part in _PARTS:
        if not len(files[f"{part}_targets.tokens"]):
            raise ValueError(
                f"{where} leaves nothing in the part {part!r} (left out: {counted or 'nothing'}); add text"
            )
    digest = hashlib.sha256(tokenizer_fingerprint(tokenizer).encode())
    for name, file in files.items():
        digest.update(f"{name} {file.fingerprint} {file.vocab_size}\n".encode())
    meta = {
        "corpus": where,
        "sample": data.sample,
        "left_out": left_out,
        "files": {name: file.fingerprint for name, file in files.items()},
        "fingerprint": digest.hexdigest(),
    }
    (folder / _META).write_text(json.dumps(meta, indent=2) + "\n")


def _write_tokens(
    folder: Path, names: list[str], data: TextDataConfig, split: Split, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, int]:
    """Writes the token files; what was left out, by reason."""
    too_long, empty, size = 0, 0, vocabulary_size(tokenizer)
    with ExitStack() as stack:
        writers = {name: stack.enter_context(TokenFileWriter(folder / name, size)) for name in names}
        for held_out, target, condition in _tokenized(split, tokenizer, data.name):
            part = _PARTS[held_out]
            if condition is None:
                writers[f"{part}_targets.tokens"].add([*target, tokenizer.eos_token_id])
            elif len(condition) > data.max_prompt_length:
                too_long += 1
            elif not condition or not target:
                empty += 1
            else:
                writers[f"{part}_targets.tokens"].add(target)
                writers[f"{part}_conditions.tokens"].add(condition)
    return {
        f"pairs with prompts of more than {data.max_prompt_length} tokens ({named('max_prompt_length')})": too_long,
        "pairs with a side that has no tokens": empty,
    }


def _tokenized(
    split: Split, tokenizer: "PreTrainedTokenizerBase", name: str
) -> Iterator[tuple[bool, list[int], list[int] | None]]:
    """Whether a sample is held out, the tokens of its document or answer, and those of its prompt."""
    from tqdm import tqdm

    progress = tqdm(total=split.size, desc=f"tokenizing {name}", unit=" texts", disable=None)  # on a terminal alone
    with progress:
        for batch in _batches(split):
            targets = [piece.sample.answer if split.samples.pairs else piece.sample for piece in batch]
            encoded = encode_texts(tokenizer, targets)
            conditions: list[list[int] | None] = [None] * len(batch)
            if split.samples.pairs:
                conditions = encode_texts(tokenizer, [piece.sample.prompt for piece in batch])
            for piece, target, condition in zip(batch, encoded, conditions, strict=True):
                yield piece.held_out, target, condition
            progress.update(len(batch))


def _batches(split: Split) -> Iterator[list[Piece]]:
    batch, characters = [], 0
    for piece in split:
        batch.append(piece)
        characters += sum(map(len, piece.sample)) if isinstance(piece.sample, Pair) else len(piece.sample)
        if len(batch) >= _BATCH_TEXTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _open(folder: Path, data: TextDataConfig, tokenizer: "PreTrainedTokenizerBase") -> TextData:
    meta = json.loads((folder / _META).read_text())
    files = {name: TokenFile.open(folder / name) for name in meta["files"]}
    for name, file in files.items():
        if file.fingerprint != meta["files"][name]:
            raise ValueError(f"{file.path} is not the file that was made with {folder / _META}; delete {folder}")
    train, held_out = (
        TextPart(files[f"{part}_targets.tokens"], files.get(f"{part}_conditions.tokens")) for part in _PARTS
    )
    for name, part in (("train", train), ("held_out", held_out)):
        if part.conditions is None and part.targets.num_tokens < data.max_length:
            raise ValueError(
                f"the part {name!r} of {meta['corpus']} has {part.targets.num_tokens} tokens; expected at least one "
                f"window of {named('max_length')} = {data.max_length}: lower it, or give more text"
            )
    return TextData(data.name, data.sample, train, held_out, tokenizer, meta["fingerprint"])
