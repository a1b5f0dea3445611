"""CIFAR-10 from the files of its Python or binary version, with captions from a JSONL file, as LLM2DiT has them."""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.data.captions import Attribute, CaptionedData, Captions
from fastdiff.data.config import DataConfig
from fastdiff.data.images import ArrayImages
from fastdiff.data.jsonl import read_objects, text_in
from fastdiff.errors import named
from fastdiff.reading import read_text, reading

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNONYMS = {
    "airplane": ("plane", "aircraft", "jet"), "automobile": ("car", "motorcar", "sedan"),
    "bird": ("small bird", "fowl"), "cat": ("kitty", "feline"), "deer": ("stag", "doe"), "dog": ("hound", "puppy"),
    "frog": ("toad", "amphibian"), "horse": ("pony", "stallion"), "ship": ("boat", "vessel"),
    "truck": ("lorry", "pickup truck"),
}  # fmt: skip
ENTRIES = ("base", "base_syn", "caption", "caption_syn")
_TRAIN, _TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 2**27  # of a file; CIFAR-10's have 31 million
_ADVICE = "; copy it again from the CIFAR-10 archive"


def load_cifar10(config: DataConfig) -> CaptionedData:
    """CIFAR-10's 50 000 and 10 000 images; captions, where `config.captions` names a file, of the first ones.

    Raises:
        FileNotFoundError: the folder has neither version of the files, or lacks one of them; no such captions.
        ValueError: a damaged file, other classes, a pickle of anything but arrays and plain values; a caption whose
            index or label does not fit the images. One line that names the file.
    """
    folder, suffix = _find(config)
    _check_classes(folder)
    parts = []
    for names in (_TRAIN, _TEST):
        pixels, labels = zip(*(read_batch(folder / f"{name}{suffix}") for name in names), strict=True)
        parts.append(ArrayImages(torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(labels))))
    train, held_out = parts
    captions = {} if config.captions is None else _read_captions(Path(config.captions).expanduser(), train.labels)
    return CaptionedData(
        "cifar10",
        train,
        held_out,
        CIFAR10_CLASSES,
        _SHAPE,
        Captions.of(ENTRIES, _texts(train.labels, captions), _texts(held_out.labels, {})),
        {"class": Attribute(CIFAR10_CLASSES, train.labels, held_out.labels)},
    )


def _find(config: DataConfig) -> tuple[Path, str]:
    """The folder with the files, and the suffix of their names."""
    if config.folder is None:
        raise ValueError(
            f"{named('folder')}: got none; cifar10 needs the folder with data_batch_1 … data_batch_5 and test_batch "
            "(or the same with .bin)"
        )
    root = Path(config.folder).expanduser()
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"):
        for suffix in ("", ".bin"):
            if (folder / f"data_batch_1{suffix}").is_file():
                return folder, suffix
    raise FileNotFoundError(
        f"{named('folder')}: got {config.folder!r}, which has no data_batch_1 or data_batch_1.bin; expected the files "
        "of CIFAR-10's Python or binary version"
    )


def _check_classes(folder: Path) -> None:
    """Raises ValueError where the files name other classes, in a text (binary version) or a pickle."""
    text, pickled = folder / "batches.meta.txt", folder / "batches.meta"
    if text.is_file():
        found, file = read_text(text).split(), text
    elif pickled.is_file():
        found, file = _read_plain_pickle(pickled).get(b"label_names"), pickled
        found = [_text(name) for name in found] if isinstance(found, list) else found
    else:
        return
    if found != list(CIFAR10_CLASSES):
        raise ValueError(f"{file}: got the classes {str(found)[:200]!r}; expected {', '.join(CIFAR10_CLASSES)}")


def _text(value: Any) -> Any:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 3, 32, 32] and labels int64 [n] of a file of the binary version (.bin) or the Python one.

    Raises FileNotFoundError where it is missing, ValueError for anything but images and labels; one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected {', '.join((*_TRAIN, *_TEST))} beside each other")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes; expected at most {_MOST_BYTES}")
    if path.suffix == ".bin":  # records of a label and 3 072 bytes
        content = np.fromfile(path, np.uint8)
        if not len(content) or len(content) % (1 + _PIXELS):
            raise ValueError(f"{path}: got {len(content)} bytes; expected records of {1 + _PIXELS}{_ADVICE}")
        records = content.reshape(-1, 1 + _PIXELS)
        return _checked(path, records[:, 1:], records[:, 0].astype(np.int64))
    batch = _read_plain_pickle(path)
    data, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(data, np.ndarray) or not isinstance(labels, list) or {type(label) for label in labels} - {int}:
        there = ", ".join(repr(_text(key)) for key in batch)[:200] or "nothing"
        raise ValueError(f"{path}: got {there}; expected the array data and the list labels{_ADVICE}")
    with reading(path, ": its labels are no numbers of classes", _ADVICE):
        labels = np.array(labels, np.int64)
    return _checked(path, data, labels)


def _checked(path: Path, data: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if data.shape != (len(labels), _PIXELS) or not len(labels):
        raise ValueError(
            f"{path}: got data of shape {list(data.shape)} and {len(labels)} labels; expected [N, {_PIXELS}] and "
            f"N{_ADVICE}"
        )
    if not 0 <= labels.min() <= labels.max() < len(CIFAR10_CLASSES):
        raise ValueError(f"{path}: got labels {labels.min()} … {labels.max()}; expected 0 … 9{_ADVICE}")
    return data.reshape(-1, *_SHAPE), labels


# ------------------------------------------------------------------------------------------------ pickles


def _read_plain_pickle(path: Path) -> dict[Any, Any]:
    """The dict in a pickle of arrays of bytes, texts, numbers, lists and dicts; keys as bytes.

    Nothing that the file names is imported or called. The three names of NumPy that CIFAR-10's files have stand for
    classes of ours that know one thing, to hold an array's bytes.

    Raises ValueError for anything else; one line that names the file and what it asks for.
    """
    with reading(path, " is not a pickle of CIFAR-10's Python version", _ADVICE), path.open("rb") as file:
        content = _unpickler(file).load()
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, not a dict")
        plain = {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
        return {
            key: value.array() if hasattr(value, "array") else _checked_plain(value) for key, value in plain.items()
        }


def _checked_plain(value: Any) -> Any:
    """The value: an array, bytes, a text, a number or a list of these. Raises ValueError where it is anything else."""
    for each in value if isinstance(value, list) else [value]:
        if type(each) not in (np.ndarray, bytes, str, int):
            raise ValueError(f"it holds {type(each).__name__} among arrays, bytes, texts, numbers and lists")
    return value


def _unpickler(file: Any) -> pickle._Unpickler:
    """Made anew for each file, with its classes: what a file sets on them ends with it.

    It is Python's own, which the compiled one would be faster than, but that takes memory for any index a file names.
    """

    class Dtype:
        def __init__(self, code: Any, *_: Any):
            self.code = _text(code)

        def __setstate__(self, state: Any) -> None:
            pass  # byte order and alignment, which a byte has not

    class Array:
        def __setstate__(self, state: Any) -> None:
            _, self.shape, self.dtype, self.by_columns, self.content = state

        def array(self) -> np.ndarray:
            if not isinstance(self.dtype, Dtype) or self.dtype.code != "u1" or self.by_columns:
                raise ValueError("it has an array that is not one of bytes, row by row")
            content = self.content.encode("latin-1") if isinstance(self.content, str) else self.content
            return np.frombuffer(content, np.uint8).reshape(self.shape).copy()

    def reconstruct(*_: Any) -> Array:
        return Array()

    def encode(text: Any, encoding: Any) -> bytes:  # how Python 3 writes bytes for Python 2
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError("it has bytes that are not written as Python does")
        return text.encode("latin-1")

    admitted = {"numpy.ndarray": Array, "numpy.dtype": Dtype, "_codecs.encode": encode}
    admitted |= {
        f"{module}._reconstruct": reconstruct for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    }

    def refuse_bytearray(_: Any) -> None:
        raise ValueError("it asks for a bytearray; expected arrays, bytes, texts, numbers, lists and dicts alone")

    class Unpickler(pickle._Unpickler):
        # but for the one instruction that fills memory of any size that a file names, before it reads a byte of it
        dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: refuse_bytearray}

        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" not in admitted:
                raise ValueError(
                    f"it asks for {module}.{name}; expected arrays, bytes, texts, numbers, lists and dicts alone; "
                    "nothing was executed"
                )
            return admitted[f"{module}.{name}"]

    return Unpickler(file, encoding="bytes")


# ------------------------------------------------------------------------------------------------ texts


def _read_captions(path: Path, labels: torch.Tensor) -> dict[int, str]:
    """Captions by the image's index, from lines {"index": 0, "label_index": 6, "caption": "…"}."""
    if not path.is_file():
        raise FileNotFoundError(
            f'{named("captions")}: got {str(path)!r}, which is not a file; expected JSONL with "index", "label_index" '
            'and "caption"'
        )
    found: dict[int, str] = {}
    for where, row in read_objects(path):
        for field in ("index", "label_index"):
            if type(row.get(field)) is not int:
                raise ValueError(f"{where}: {field}: got {row.get(field)!r}; expected a whole number")
        index, caption = row["index"], text_in(row, "caption", where).strip()
        if not 0 <= index < len(labels):
            raise ValueError(f"{where}: index: got {index}; expected 0 … {len(labels) - 1}, the images to train on")
        if row["label_index"] != (label := int(labels[index])):
            raise ValueError(
                f"{where}: label_index: got {row['label_index']}; image {index} has {label} ({CIFAR10_CLASSES[label]})"
            )
        if not caption:
            raise ValueError(f"{where}: caption: got an empty one; expected words, or leave the line out")
        if index in found:
            raise ValueError(f"{where}: index: got {index} a second time; expected one caption an image")
        found[index] = caption
    return found


def _texts(labels: torch.Tensor, captions: dict[int, str]) -> list[list[str | None]]:
    """A row of `ENTRIES` for each image. Image i has the i-th synonym of its class, in turn."""
    rows: list[list[str | None]] = []
    for index, label in enumerate(labels.tolist()):
        name, caption = CIFAR10_CLASSES[label], captions.get(index)
        synonym = SYNONYMS[name][index % len(SYNONYMS[name])]
        rows.append([name, synonym, caption, None if caption is None else with_synonym(caption, name, index)])
    return rows


def with_synonym(caption: str, name: str, turn: int) -> str | None:
    """A caption in which another word stands for the class, articles too; None where no word for it is in it."""
    words: Sequence[str] = (name, *SYNONYMS[name])
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    found = re.search(rf"(?:\b(an?) )?\b({pattern})\b", caption, re.IGNORECASE)
    if found is None:
        return None
    others = [word for word in words if word != found[2].lower()]
    word = others[turn % len(others)]
    article = "" if found[1] is None else ("an " if word[0] in "aeiou" else "a ")
    said = article + word
    if found[0][0].isupper() and (found[1] is not None or found.start() == 0):
        said = said[0].upper() + said[1:]
    return caption[: found.start()] + said + caption[found.end() :]
