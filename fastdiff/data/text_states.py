"""Hidden states of prompts, computed once: memory-mapped files in the cache, which training reads batches from.

A part file holds some prompts, little endian: a header of 128 bytes, the prompts' indices as int64 [n], their numbers
of tokens as int64 [n], and the states of all their tokens as float16 or float32 [T, K, C]. Parts have prompts of about
one length, so that little is computed on padding. Each part is written whole or not at all: a process that is killed
while it caches leaves the parts that it made, and the next one goes on with the others.
"""

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.files import cache_folder, make_folder_once, read_json, write_atomically

VERSION = 1
_INDEX = "index.json"
_MAGIC = b"fdstates"
_HEADER = struct.Struct("<8sIIqqqqI")  # magic, version, bytes a number, prompts, tokens, K, C, CRC-32 of what follows
_HEADER_SIZE = 128  # the rest is zeros, and a CRC-32 of what is before it in the last four bytes
_PART = 128  # prompts: some seconds of a small text model's work, which a kill costs at most
_MOST_PARTS = 1024  # of many prompts: larger parts, not more files
_CONTENT_READ = 2**28  # bytes: states that are fewer are compared with their checksums when they are opened

Encode = Callable[[list[str]], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class _Part:
    indices: np.ndarray  # int64 [n]
    lengths: np.ndarray  # int64 [n]
    states: np.ndarray  # float16 or float32 [T, K, C]


class TextStates:
    """The states of a list of prompts, read through memory maps. `len()` is the number of prompts.

    Attributes:
        num_states: K, how many hidden states of the text model there are for a token.
        hidden_size: C, the width of a state.
        lengths: int64 [prompts], the tokens of each.
        dtype: what the files hold: float16, or float32 where a state lies beyond float16's range (65 504).
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        """Use `cached_text_states`, or `TextStates.open`."""
        self._parts = [part.states for part in parts]
        count = sum(len(part.indices) for part in parts)
        self.lengths = torch.zeros(count, dtype=torch.int64)
        self._place = np.zeros((count, 2), np.int64)  # part, first row in it
        for number, part in enumerate(parts):
            self.lengths[torch.tensor(part.indices)] = torch.tensor(part.lengths)
            self._place[part.indices, 0] = number
            self._place[part.indices, 1] = np.cumsum(part.lengths) - part.lengths
        self.num_states, self.hidden_size = self._parts[0].shape[1:]
        wide = any(part.dtype == np.float32 for part in self._parts)
        self.dtype = torch.float32 if wide else torch.float16

    @classmethod
    def open(cls, folder: Path) -> "TextStates":
        """Opens what `cached_text_states` wrote.

        Raises:
            FileNotFoundError: there is nothing, or a part is missing.
            ValueError: a file is cut short, damaged or of another version; one line that names it.
        """
        advice = f"; delete the folder {folder}, and it is made again"
        try:
            index = read_json(folder / _INDEX)
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder / _INDEX}: no such file{advice}") from None
        except ValueError as error:
            raise ValueError(f"{error}{advice}") from None
        if index.get("version") != VERSION or not isinstance(index.get("parts"), int):
            raise ValueError(f"{folder / _INDEX}: not of version {VERSION} of text states{advice}")
        paths = [_path(folder, number) for number in range(index["parts"])]
        if absent := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"{absent[0]}: no such file{advice}")
        whole = sum(path.stat().st_size for path in paths) <= _CONTENT_READ
        parts = [_read(path, advice, check_content=whole) for path in paths]
        found = np.sort(np.concatenate([part.indices for part in parts])) if parts else np.zeros(0)
        if not parts or not np.array_equal(found, np.arange(index.get("texts", -1))):
            raise ValueError(f"{folder}: its parts are not those of one list of prompts{advice}")
        return cls(parts)

    def __len__(self) -> int:
        return len(self.lengths)

    def states(self, index: int) -> Tensor:  # float32 [s, K, C]
        """The states of one prompt. Raises IndexError where there is none."""
        return torch.from_numpy(self._rows(index).astype(np.float32))

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """The states of prompts as `pad` gives them.

        Raises ValueError for no indices, IndexError for one beyond 0 … len() - 1.
        """
        wanted = torch.as_tensor(indices).tolist()
        if not wanted:
            raise ValueError("indices: got none; expected at least one")
        return _padded([self._rows(index) for index in wanted])

    @staticmethod
    def pad(states: Sequence[Tensor]) -> dict[str, Tensor]:
        """Prompts of a text encoder as one batch, zeros behind the shorter ones.

        Args:
            states: [s, K, C] of each prompt, as `TextEncoder.encode` gives them.

        Returns:
            {"text_states": float32 [B, S, K, C] ([B, S, C] where K is 1), "text_mask": bool [B, S], True = a token}.
            S is the longest of the batch.

        Raises ValueError for no prompts, or states of different K or C.
        """
        if not states or len({tuple(each.shape[1:]) for each in states}) > 1 or states[0].ndim != 3:
            shapes = [list(each.shape) for each in states[:3]]
            raise ValueError(
                f"states: got {len(states)} of shapes {shapes}; expected one or more [s, K, C], one K and C"
            )
        return _padded([each.detach().float().cpu().numpy() for each in states])

    def _rows(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"indices: got {index}; expected 0 … {len(self) - 1}, one of the prompts")
        part, start = self._place[index]
        return self._parts[part][start : start + int(self.lengths[index])]


def _padded(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    longest, (num_states, hidden_size) = max(map(len, rows)), rows[0].shape[1:]
    states = np.zeros((len(rows), longest, num_states, hidden_size), np.float32)
    mask = np.zeros((len(rows), longest), bool)
    for row, of_prompt in enumerate(rows):
        states[row, : len(of_prompt)] = of_prompt
        mask[row, : len(of_prompt)] = True
    states = torch.from_numpy(states)
    return {"text_states": states.squeeze(2) if num_states == 1 else states, "text_mask": torch.from_numpy(mask)}


def cached_text_states(texts: Sequence[str], encode: Encode, key: str, *, progress: bool = True) -> TextStates:
    """The states of prompts from cache_folder()/text_states, where they are computed once.

    A process that is killed on the way goes on where it was; of two at once, one waits for the other. States are kept
    as float16, those of a part with values beyond its range as float32.

    Args:
        texts: prompts.
        encode: gives the states of some prompts, [s, K, C] each, such as `TextEncoder.encode`. It is not called where
            all are there.
        key: a hash of all that decides what `encode` gives, such as `TextEncoder.fingerprint`.
        progress: shows a bar while states are computed.

    Raises:
        ValueError: no prompts; states that are not finite or do not fit each other; damaged files (their names).
        PermissionError: the cache cannot be written. OSError: the disk is full; what was done is kept.
        And what `encode` raises.
    """
    if not texts:
        raise ValueError("texts: got none; expected at least one prompt")
    digest = hashlib.sha256(json.dumps([VERSION, key, list(texts)]).encode()).hexdigest()[:32]
    folder = cache_folder() / "text_states" / digest
    if not folder.is_dir():
        unfinished = folder.with_name(f"{digest}.parts")
        make_folder_once(folder, Path.is_dir, lambda into: _fill(into, unfinished, texts, encode, progress))
        shutil.rmtree(unfinished, ignore_errors=True)
    return TextStates.open(folder)


def _fill(into: Path, unfinished: Path, texts: Sequence[str], encode: Encode, progress: bool) -> None:
    """Computes the parts that are not in the folder `unfinished`, and puts all of them and an index into another."""
    unfinished.mkdir(exist_ok=True)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    size = max(_PART, -(-len(texts) // _MOST_PARTS))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    shape = None
    with tqdm(total=len(texts), desc="text states", unit="prompt", disable=not progress, dynamic_ncols=True) as bar:
        for number, chunk in enumerate(chunks):
            part = _known(_path(unfinished, number), chunk)
            if part is None:
                states = encode([texts[index] for index in chunk])
                write_atomically(_path(unfinished, number), _pack(chunk, states, [texts[index] for index in chunk]))
                part = _read(_path(unfinished, number), "", check_content=False)
            shape = shape or part.states.shape[1:]
            if part.states.shape[1:] != shape:
                raise ValueError(
                    f"encode: got states of shape [s, {', '.join(map(str, part.states.shape[1:]))}] after "
                    f"[s, {', '.join(map(str, shape))}]; expected one shape for all prompts"
                )
            bar.update(len(chunk))
    for number in range(len(chunks)):
        source, target = _path(unfinished, number), _path(into, number)
        try:
            os.link(source, target)  # a second name, so that no byte is written twice
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
    write_atomically(into / _INDEX, json.dumps({"version": VERSION, "texts": len(texts), "parts": len(chunks)}) + "\n")


def _path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.bin"


def _known(path: Path, chunk: Sequence[int]) -> _Part | None:
    """A part that another process wrote before it was killed; None where it is not there, or not whole."""
    try:
        part = _read(path, "", check_content=True)
    except (FileNotFoundError, ValueError):
        return None
    return part if np.array_equal(part.indices, chunk) else None


# ------------------------------------------------------------------------------------------------ files


def _pack(indices: Sequence[int], states: Sequence[Tensor], texts: Sequence[str]) -> bytes:
    """A part file's content. Raises ValueError for states that are not finite, or do not fit each other."""
    shapes = {tuple(each.shape[1:]) for each in states}
    if len(states) != len(indices) or len(shapes) != 1 or any(each.ndim != 3 or not len(each) for each in states):
        found = [list(each.shape) for each in states[:3]]
        raise ValueError(
            f"encode: got {len(states)} states of shapes {found} … for {len(indices)} prompts; expected [s, K, C] for "
            "each, of one K and C, s >= 1"
        )
    for text, each in zip(texts, states, strict=True):
        if not torch.isfinite(each).all():
            raise ValueError(f"encode: got states of {text[:60]!r} that are not finite; expected numbers")
    joined = torch.cat([each.detach().cpu() for each in states]).float()
    fits = joined.abs().max() <= torch.finfo(torch.float16).max
    values = joined.numpy().astype("<f2" if fits else "<f4")
    lengths = [len(each) for each in states]
    content = np.array([*indices, *lengths], "<i8").tobytes() + values.tobytes()
    sizes = (values.itemsize, len(indices), *values.shape)
    header = _HEADER.pack(_MAGIC, VERSION, *sizes, zlib.crc32(content)).ljust(_HEADER_SIZE - 4, b"\0")
    return header + struct.pack("<I", zlib.crc32(header)) + content


def _read(path: Path, advice: str, *, check_content: bool) -> _Part:
    """Opens a part file. Raises FileNotFoundError, and ValueError for a damaged one; one line that names it."""
    with open(path, "rb") as file:
        header = file.read(_HEADER_SIZE)
    if len(header) < _HEADER_SIZE or not header.startswith(_MAGIC):
        raise ValueError(f"{path}: does not begin as a file of text states{advice}")
    _, version, item_size, prompts, tokens, num_states, hidden_size, checksum = _HEADER.unpack(header[: _HEADER.size])
    if struct.unpack("<I", header[-4:])[0] != zlib.crc32(header[:-4]) or version != VERSION:
        raise ValueError(f"{path}: its header is damaged, or of another version than {VERSION}{advice}")
    expected = _HEADER_SIZE + 16 * prompts + item_size * tokens * num_states * hidden_size
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: holds {path.stat().st_size} bytes; expected {expected}, as its header says{advice}")
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))[_HEADER_SIZE:]
    if check_content and zlib.crc32(content) != checksum:
        raise ValueError(f"{path}: its content is damaged (the checksum differs){advice}")
    numbers = content[: 16 * prompts].view("<i8")
    states = content[16 * prompts :].view(f"<f{item_size}").reshape(tokens, num_states, hidden_size)
    return _Part(numbers[:prompts], numbers[prompts:], states)
