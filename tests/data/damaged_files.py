"""Files of every kind that a stranger may send: seeds, ways to damage them, and the readers that they are given to.

`make fuzz-files` runs it alone: each reader gives a value or a one-line error that names the file, within a time and a
memory bound.
"""

import argparse
import copy
import dataclasses
import gzip
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from file_seeds import (
    SCHEMA,
    STATE,
    TABLE,
    TENSORS,
    bombs,
    caption_files,
    cifar_batch,
    idx_file,
    pictures,
    recipe_yaml,
    saved_folder,
    sounds,
    svgs,
    token_file,
    tokenizer_json,
    torch_file,
)
from safetensors.torch import save

MOST_SECONDS = 10.0  # for one file; the machine may be busy
MOST_MEMORY = 2**31  # bytes that one file may add to the peak
_USER_ERRORS = (ValueError, TypeError, OSError)  # those that commands print as one line
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, float("inf"), float("nan"), "", "x"),
    *("/etc/passwd", "../../x", "\ud800", "\n", [], [[]], [1] * 50, {}, {"a": None}),
)
_JSON_KINDS = ("json", "captions", "schema", "state", "tokenizer", "yaml", "safetensors", "folder")
_LINES = ("jsonl", "csv", "token")  # of these kinds, files that are no JSON
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


# ------------------------------------------------------------------------------------------------ damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content cut short, with other bits, bytes and numbers, with parts twice or left out."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(64, len(data)) + 1)
        how = rng.randrange(7)
        if how == 0:
            del data[place:]
        elif how == 1 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(_EXTREMES))
        elif how == 3:
            data[place : place + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(_EXTREMES) % 2**16)
        elif how == 4:
            del data[place : place + rng.randrange(1, 40)]
        elif how == 5:
            data[place:place] = data[place : place + rng.randrange(1, 200)] * rng.choice((1, 3, 20))
        else:
            data[place:place] = rng.choice(
                (rng.randbytes(8), b"\0" * 16, b"\xff" * 8, b"[" * 9, b'"', b"-1", b"1e400", b",")
            )
    return bytes(data)


def misshapen(content: bytes, kind: str, rng: random.Random) -> bytes:
    """A JSON or YAML text, or the header of a safetensors file, with other values in some places."""
    if kind == "safetensors":
        (size,) = struct.unpack("<Q", content[:8])
        header = misshapen(content[8 : 8 + size], "json", rng)
        return struct.pack("<Q", len(header)) + header + content[8 + size :]
    tree = yaml.safe_load(content) if kind == "yaml" else json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change(tree, rng)
    return yaml.safe_dump(tree).encode() if kind == "yaml" else json.dumps(tree).encode()


def _change(tree: Any, rng: random.Random) -> None:
    """Replaces, removes or adds a value somewhere in a tree of lists and dicts."""
    places: list[tuple[Any, Any]] = []
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        places += [(node, key) for key in keys]
        nodes += [node[key] for key in keys]
    if not places:
        return
    node, key = rng.choice(places)
    how = rng.randrange(7)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[rng.choice(("", "unknown", "a.b", "__class__"))] = node[key]
    else:
        node[key] = copy.deepcopy(rng.choice(_VALUES))


# ------------------------------------------------------------------------------------------------ readers


@dataclasses.dataclass(frozen=True)
class Kind:
    """Whole files by name, and what reads them: (file) -> value."""

    seeds: dict[str, bytes]
    read: Callable[[Path], object]


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file and its reader. `folder` is for what lies beside the files."""

    from fastdiff.data import DataConfig, TabularDataConfig, TextDataConfig, TokenFile, load_tabular_data
    from fastdiff.data.caption_files import coco_source, flickr30k_source
    from fastdiff.data.cifar10 import read_batch
    from fastdiff.data.clipart import clipart_source
    from fastdiff.data.corpora import open_corpus
    from fastdiff.data.fashion_mnist import read_idx
    from fastdiff.data.pictures import check_picture, picture_size, read_picture
    from fastdiff.data.svg import read_svg
    from fastdiff.data.table_schema import TableSchema
    from fastdiff.data.tokenization import load_saved_tokenizer
    from fastdiff.data.waveforms import read_wav, resample, trimmed
    from fastdiff.files import read_json
    from fastdiff.models.weights import read_tensors
    from fastdiff.recipes import load_recipe
    from fastdiff.tasks.dit.recipe import DiTRecipe
    from fastdiff.tasks.kinds import load, recipe_kind
    from fastdiff.training.checkpoint import read_state
    from fastdiff.training.run_folder import read_metrics

    def picture(path: Path) -> None:
        picture_size(path)
        read_picture(path, 1)
        check_picture(path)

    def sound(path: Path) -> None:
        rate, waveform = read_wav(path)
        try:
            trimmed(resample(waveform, rate, 8000), 8000)
        except ValueError as error:  # who calls it has the file's name
            raise ValueError(f"{path}: {error}") from None

    def table(path: Path) -> None:
        load_tabular_data(TabularDataConfig("csv", path=str(path), categories=["kind"]))

    def run_json(path: Path) -> None:
        read_json(path)
        read_metrics(path)

    def schema(path: Path) -> None:
        TableSchema.from_pretrained(_only(folder / "schema", path, "table_schema.json"))

    def state(path: Path) -> None:
        read_state(_only(folder / "step_3", path, "trainer_state.json", {"model.safetensors": bytes(8)}))

    def recipe(path: Path) -> None:
        recipe_kind(path)
        load_recipe(DiTRecipe, path)

    def tokenizer(path: Path) -> None:
        kept = {"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}'}
        load_saved_tokenizer(_only(folder / "tokenizer", path, "tokenizer.json", kept))

    def tokens(path: Path) -> None:
        file = TokenFile.open(path)
        assert len(file) < 1 or file.document(0).ndim == 1

    def idx(path: Path) -> None:
        name = "images" + path.suffix
        read_idx(_only(folder / "idx", path, name), "images", dimensions=3)

    def documents(path: Path) -> None:
        list(open_corpus(TextDataConfig("jsonl", path=str(path))).read())

    def drawing(path: Path) -> None:
        alone = _only(folder / "svg", path, "a.svg")
        clipart_source(DataConfig("clipart", folder=str(alone))).listing()
        read_svg(path, 16)

    def photo_captions(path: Path) -> None:
        source = coco_source if path.suffix == ".json" else flickr30k_source
        source(DataConfig("coco", folder=str(folder), captions=str(path))).listing()

    saved = saved_folder(folder / "saved")

    def saved_file(path: Path) -> None:
        name = path.name.partition("-")[2]
        load(_only(folder / "model", path, name, {n: c for n, c in saved.items() if n != name}), device="cpu")

    images = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    state_seeds = {"state.json": json.dumps(STATE).encode()}
    metrics = "".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(5)).encode()
    return {
        "picture": Kind(pictures(), picture),
        "wav": Kind(sounds(), sound),
        "csv": Kind({"table.csv": TABLE}, table),
        "json": Kind({"a.json": b'{"step": 3, "b": [1, 2.5, null, "x"]}', "metrics.jsonl": metrics}, run_json),
        "schema": Kind({"schema.json": json.dumps(SCHEMA).encode()}, schema),
        "state": Kind(state_seeds, state),
        "yaml": Kind({"recipe.yaml": recipe_yaml()}, recipe),
        "safetensors": Kind({"a.safetensors": save(TENSORS)}, read_tensors),
        "tokens": Kind({"a.tokens": token_file(folder)}, tokens),
        "idx": Kind({"a": idx_file(), "a.gz": gzip.compress(idx_file(), mtime=0)}, idx),
        "cifar": Kind({"data_batch": cifar_batch(images, [3, 9]), "data_batch.bin": b"\3" + bytes(3072)}, read_batch),
        "jsonl": Kind({"a.jsonl": b'{"text": "a b c"}\n' * 9}, documents),
        "torch": Kind({"a.pt": torch_file()}, read_tensors),
        "tokenizer": Kind({"t.json": tokenizer_json()}, tokenizer),
        "svg": Kind(svgs(), drawing),
        "captions": Kind(caption_files(), photo_captions),
        "folder": Kind({f"saved-{name}": content for name, content in saved.items()}, saved_file),
    }


def _only(folder: Path, path: Path, name: str, beside: dict[str, bytes] | None = None) -> Path:
    """A folder that has a file under a name, and what lies beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for each, content in (beside or {}).items():
        (folder / each).write_bytes(content)
    os.link(path, folder / name)
    return folder


# ------------------------------------------------------------------------------------------------ the run


@dataclasses.dataclass
class Tally:
    """What became of the files."""

    values: Counter = dataclasses.field(default_factory=Counter)
    errors: Counter = dataclasses.field(default_factory=Counter)
    failures: list[str] = dataclasses.field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    most_memory: tuple[int, str] = (0, "")


def run(count: int, seed: int, folder: Path, keep: Path | None = None) -> Tally:
    """Gives all bombs and `count` damaged files to their readers. Files that fail are kept in `keep`."""
    tally, each = Tally(), kinds(folder)
    for number, (name, file, content) in enumerate(_files(each, count, seed)):
        path = folder / f"{number}-{file}" if name != "folder" else folder / file
        path.write_bytes(content)
        before, start = _peak(), time.perf_counter()
        problem = _read(each[name], path, folder, name, tally)
        seconds, memory = time.perf_counter() - start, _peak() - before
        label = f"{name} {path.name}"
        tally.slowest, tally.most_memory = max(tally.slowest, (seconds, label)), max(tally.most_memory, (memory, label))
        if seconds > MOST_SECONDS:
            problem = problem or f"took {seconds:.1f} s"
        if memory > MOST_MEMORY:
            problem = problem or f"took {memory / 2**20:.0f} MiB"
        if problem:
            tally.failures.append(f"{label}: {problem}")
            if keep is not None:
                keep.mkdir(exist_ok=True)
                (keep / f"{name}-{path.name}").write_bytes(content)
        path.unlink()
    return tally


def _files(each: dict[str, Kind], count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    for name, kind in each.items():
        yield from ((name, file, content) for file, content in kind.seeds.items())
    for name, contents in bombs().items():
        file = next(iter(each[name].seeds))
        yield from ((name, file, content) for content in contents)
    rng, names = random.Random(seed), list(each)
    for number in range(count):
        name = names[number % len(names)]
        file, content = rng.choice(list(each[name].seeds.items()))
        shaped = name in _JSON_KINDS and not file.endswith(_LINES) and rng.random() < 0.6
        shape = "safetensors" if file.endswith("safetensors") else name
        yield name, file, misshapen(content, shape, rng) if shaped else damaged(content, rng)


def _read(kind: Kind, path: Path, folder: Path, name: str, tally: Tally) -> str | None:
    """What is wrong with what a reader did of a file; None where nothing is."""
    try:
        kind.read(path)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.errors[name] += 1
        text = str(error)
        from jsonargparse import ArgumentError

        if isinstance(error, ArgumentError):  # the command prints it as one line
            text, error = f"{path}: {' '.join(text.split())}", ValueError()
        if not isinstance(error, _USER_ERRORS):
            return f"raised {type(error).__name__}: {text[:200]}"
        if isinstance(error, OSError) and error.filename is not None:
            return None
        if "\n" in text or len(text) > 1500 or not text.isprintable():
            return f"said {text[:300]!r}"
        return None if str(folder) in text else f"named no file: {text[:300]}"
    tally.values[name] += 1
    return None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Gives damaged files to every reader.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTDIFF_CACHE"] = str(Path(folder) / "cache")
        tally = run(arguments.count, arguments.seed, Path(folder), arguments.keep)
    for name in tally.values | tally.errors:
        print(f"{name}: {tally.values[name]} values, {tally.errors[name]} errors of one line")
    seconds, memory = tally.slowest, tally.most_memory
    print(f"slowest {seconds[0]:.2f} s ({seconds[1]}); most memory {memory[0] / 2**20:.0f} MiB ({memory[1]})")
    print(f"{len(tally.failures)} failures", *tally.failures, sep="\n")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
