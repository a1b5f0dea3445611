"""Files of every kind that a stranger may send: seeds, ways to damage them, and the readers that they are given to.

`make fuzz-files` runs it alone: each reader gives a value or a one-line error that names the file, within a time and a
memory bound.
"""

import argparse
import copy
import dataclasses
import gzip
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

MOST_SECONDS = 10.0  # for one file; the machine may be busy
MOST_MEMORY = 2**31  # bytes that one file may add to the peak
_USER_ERRORS = (ValueError, TypeError, OSError)  # those that commands print as one line
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, float("inf"), float("nan"), "", "x"),
    *("/etc/passwd", "../../x", "\ud800", "\n", [], [[]], [1] * 50, {}, {"a": None}),
)
_JSON_KINDS = ("json", "schema", "state", "tokenizer", "yaml", "safetensors", "folder")
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


# ------------------------------------------------------------------------------------------------ seeds


def pictures() -> dict[str, bytes]:
    """Pictures of every format and of many modes; the suffix begins their names."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (9, 7), dtype=np.uint16))
    made: list[tuple[str, Image.Image, dict]] = [
        ("png", rgb, {}), ("png", rgb.convert("RGBA"), {}), ("png", rgb.convert("P"), {"transparency": 3}),
        ("png", grey16, {}), ("png", rgb.convert("1"), {}), ("jpg", rgb, {}), ("jpg", rgb.convert("CMYK"), {}),
        ("jpg", rgb, {"progressive": True, "exif": _exif()}), ("gif", rgb.convert("P"), {}),
        ("gif", rgb.convert("P"), {"save_all": True, "append_images": [rgb.convert("P").rotate(90)] * 2}),
        ("tif", rgb, {}), ("tif", rgb, {"compression": "tiff_lzw"}), ("tif", grey16, {}), ("webp", rgb, {}),
        ("tif", Image.fromarray(rng.random((5, 6), np.float32)), {}), ("bmp", rgb, {}),
        ("tif", rgb, {"compression": "tiff_deflate", "exif": _exif()}),
        ("tif", rgb.convert("1"), {"compression": "group4"}),
    ]  # fmt: skip
    files = {}
    for number, (suffix, image, options) in enumerate(made):
        content = io.BytesIO()
        image.save(content, format={"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
        files[f"{number}.{suffix}"] = content.getvalue()
    return files


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


def sounds() -> dict[str, bytes]:
    """WAV files of several formats."""
    files = {}
    for number, (kind, width, channels) in enumerate(
        ((1, 1, 1), (1, 2, 2), (1, 3, 1), (1, 4, 2), (3, 4, 1), (3, 8, 2))
    ):
        rng = np.random.default_rng(number)
        samples = rng.bytes(200 * width * channels)
        if kind == 3:
            samples = rng.uniform(-1, 1, 200 * channels).astype(f"<f{width}").tobytes()
        files[f"{number}.wav"] = wav(samples, kind, channels, 8000, width)
    return files


def wav(samples: bytes, kind: int = 1, channels: int = 1, rate: int = 8000, width: int = 2, **sizes: int) -> bytes:
    """A WAV file; `riff` and `data` are sizes that its headers say instead of the right ones."""
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * channels * width % 2**32, channels * width, 8 * width)
    body = (
        b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", sizes.get("data", len(samples))) + samples
    )
    return b"RIFF" + struct.pack("<I", sizes.get("riff", 4 + len(body))) + b"WAVE" + body


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one byte a pixel, whose header says a size that its data need not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in parts
    )


TABLE = b"size,colour,kind\n" + b"".join(b"%d.5,%s,%s\n" % (i, (b"red", b"blue")[i % 2], b"abc"[i % 3 : i % 3 + 1])
                                         for i in range(12))  # fmt: skip
SCHEMA = {
    "numbers": [{"name": "x", "mean": 1.0, "deviation": 2.0, "decimals": 1}],
    "categories": [{"name": "k", "values": ["a", "b"]}],
    "names": ["x", "k"],
    "target": "k",
}
STATE = {"step": 3, "task": {"class_names": ["a"]}, "files": {"model.safetensors": 8}}
TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}


def tokenizer_json() -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = "abcdefgh"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *letters, "ab", "abc"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    return tokenizer.to_str().encode()


def recipe_yaml() -> bytes:
    from fastdiff.tasks.dit.recipe import DiTRecipe

    return yaml.safe_dump(DiTRecipe().to_dict()).encode()


def idx_file() -> bytes:
    return bytes((0, 0, 8, 3)) + struct.pack(">3I", 5, 4, 3) + bytes(range(60))


def token_file(folder: Path) -> bytes:
    from fastdiff.data import write_token_file

    write_token_file(folder / "tokens", [[1, 2, 3], [], [4, 5]], 100)
    return (folder / "tokens").read_bytes()


def torch_file() -> bytes:
    content = io.BytesIO()
    torch.save(TENSORS, content)
    return content.getvalue()


def bombs() -> dict[str, list[bytes]]:
    """Whole files that ask for much more than they are, by the kind of file."""
    text = zlib.compress(bytes(80 * 2**20), 9)
    alias = b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        alias += f"{after}: &{after} [{','.join([f'*{before}'] * 9)}]\n".encode()
    deep = b"[" * 100_000
    nested_json, json_object = deep + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    return {
        "picture": [png(60_000, 60_000), png(2**31 - 1, 2**31 - 1), png(0, 0), png(20_000, 4_000),
                    png(10, 10, (b"zTXt", b"a\0\0" + text)), png(10, 10, (b"iTXt", b"a\0\1\0\0\0" + text))],
        "wav": [wav(bytes(400), rate=2**31 - 1), wav(bytes(400), riff=0), wav(bytes(400), channels=0, width=2),
                wav(bytes(400), data=2**32 - 1, riff=2**32 - 1), wav(bytes(400), rate=0), wav(bytes(401)), wav(b""),
                wav(struct.pack("<50d", *[1e200] * 50), kind=3, width=8), wav(bytes(400), rate=1), b"", b"RIFF"],
        "csv": [TABLE.replace(b"3.5", b"1e200"), TABLE.replace(b"3.5", b"1e999"), b'a,b\n"' + b"x" * 10**6,
                b"\0" * 1000, b"," * 10**5 + b"\n", TABLE + b"1,2\n", TABLE.replace(b"3.5", b"9" * 5000),
                b"a,b\n" * 10_000],
        "json": [nested_json, json_object, b'{"step": ' + b"9" * 5000 + b"}", b'{"step": 1e999}', b'"\\ud800"'],
        "yaml": [alias, alias + b"model: *i\n", deep, b"&a [*a]", b"{" * 5000,
                 b"a: !!python/object/apply:os.system [ls]",
                 b"<<: &a {b: 1, <<: *a}", b"model: {hidden_size: 1" + b"0" * 5000 + b"}", b"2001-13-45", b"!!int ''",
                 b"? {a: b}\n: c", b"!!binary =", b"\xff\xfe", b"a: " + b"x" * 2**20],
        "safetensors": [struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 0), struct.pack("<Q", 100_000) + deep,
                        _safetensors({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}),
                        _safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}})],
        "tokenizer": [nested_json, json_object, b"{}", b"null",
                      tokenizer_json().replace(b'"abc": 11', b'"abc": 4294967295')],
        "torch": [],
        "state": [nested_json],
        "folder": [nested_json, json_object],
    }  # fmt: skip


def _safetensors(header: dict) -> bytes:
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + bytes(8)


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

    from fastdiff.data import TabularDataConfig, TextDataConfig, TokenFile, load_tabular_data
    from fastdiff.data.corpora import open_corpus
    from fastdiff.data.datasets import read_idx
    from fastdiff.data.pictures import check_picture, picture_size, read_picture
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

    saved = saved_folder(folder / "saved")

    def saved_file(path: Path) -> None:
        name = path.name.partition("-")[2]
        load(_only(folder / "model", path, name, {n: c for n, c in saved.items() if n != name}), device="cpu")

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
        "jsonl": Kind({"a.jsonl": b'{"text": "a b c"}\n' * 9}, documents),
        "torch": Kind({"a.pt": torch_file()}, read_tensors),
        "tokenizer": Kind({"t.json": tokenizer_json()}, tokenizer),
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


def saved_folder(folder: Path) -> dict[str, bytes]:
    """The files of a saved model."""
    from fastdiff.models import DiT, DiTConfig

    model = DiT(
        DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=2)
    )
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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
        shaped = name in _JSON_KINDS and not file.endswith("jsonl") and rng.random() < 0.6
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
