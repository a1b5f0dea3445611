"""Whole files of every kind, the seeds of `damaged_files.py`, and small files that ask for much more than they are."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image


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


def svgs() -> dict[str, bytes]:
    """Drawings with metadata."""
    dublin_core = 'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:cc="http://web.resource.org/cc/"'
    words = "<cc:Work><dc:title>A box</dc:title><dc:subject><li>box</li></dc:subject></cc:Work>"
    shapes = '<rect width="9" height="5" fill="red"/><path d="M 1 1 L 8 2 L 3 7 z"/>'
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" {dublin_core} width="10mm" height="10mm">'
    return {"a.svg": f"{drawing}<metadata>{words}</metadata>{shapes}</svg>".encode()}


def caption_files() -> dict[str, bytes]:
    """Captions of photos in each of the published forms."""
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)]
    notes = [{"image_id": number, "id": number, "caption": f"A photo {number}."} for number in range(3)]
    split = [
        {"filename": f"{number}.jpg", "split": name, "sentences": [{"raw": "A photo."}]}
        for number, name in enumerate(("train", "val", "test"))
    ]
    lines = [(f"{number}.jpg", number % 2, "A man walks .") for number in range(4)]
    rows = "".join(f"{name}| {number}| {text}\n" for name, number, text in lines)
    return {
        "captions.json": json.dumps({"images": images, "annotations": notes}).encode(),
        "dataset.json": json.dumps({"images": split}).encode(),
        "results.csv": f"image_name| comment_number| comment\n{rows}".encode(),
        "results.token": "".join(f"{name}#{number}\t{text}\n" for name, number, text in lines).encode(),
    }


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


def cifar_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A file of CIFAR-10's Python version, as Python 2 wrote it: protocol 2, texts and pixels as strings of bytes,
    NumPy's array by its old module. Pixels uint8 [n, 3072], labels 0 … 9."""

    def text(raw: bytes) -> bytes:
        return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<I", len(raw)) + raw

    count, minus_one = len(labels), b"J" + struct.pack("<i", -1)
    shape = b"K\x01(M" + struct.pack("<H", count) + b"M" + struct.pack("<H", data.shape[1]) + b"t"
    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + 2 * minus_one + b"K\x00tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R("
    array += shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(text(b"a_s_%06d.png" % index) for index in range(count)) + b"e"
    fields = {b"data": array, b"labels": listed, b"batch_label": text(b"training batch"), b"filenames": names}
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in fields.items()) + b"u."


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
    page = b'<svg xmlns="http://www.w3.org/2000/svg" width="%s" height="9">'
    entities = b"".join(
        b'<!ENTITY %c "%s">' % (b, b"&%c;" % a * 9) for a, b in zip(b"abcdefgh", b"bcdefghi", strict=True)
    )
    return {
        "svg": [page % b"9" + b"<g>" * 100_000 + b"</g>" * 100_000 + b"</svg>", page % b"1e9" + b"</svg>",
                page % b"9" + b"<metadata>" * 10_000, b"<!DOCTYPE svg [<!ENTITY a 'aaaaaaaaa'>" + entities + b"]>"
                + page % b"9" + b"<metadata>&i;</metadata></svg>", b"", b"<svg/>"],
        "captions": [nested_json, json_object, b'{"images": [{"id": ' + b"9" * 5000 + b"}]}", b'{"images": null}'],
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


def saved_folder(folder: Path) -> dict[str, bytes]:
    """The files of a saved model."""
    from fastdiff.models import DiT, DiTConfig

    model = DiT(
        DiTConfig(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=2)
    )
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
