"""Files of token ids, documents one after the other, read through memory maps: a corpus never lies in memory whole.

Layout, little endian: a header of 128 bytes, the token ids of all documents (uint16 where the vocabulary allows, else
uint32), zeros to a multiple of 8 bytes, and the documents' limits as int64 [documents + 1].
"""

import hashlib
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

VERSION = 1
_MAGIC = b"fdtokens"
_HEADER = struct.Struct("<8sIIqqq32s")  # magic, version, bytes per token, tokens, documents, vocabulary, SHA-256
_HEADER_SIZE = 128  # the rest is zeros, and a CRC-32 of what is before it in the last four bytes


class TokenFileWriter:
    """Writes a token file document by document; nothing of that name is there until `close`, or leaving a `with` block.

    A block left by an exception leaves no file behind.

    Args:
        path: the file, replaced where it exists.
        vocab_size: all ids are below it.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int):
        if not 1 <= vocab_size <= 2**32:
            raise ValueError(f"vocab_size: got {vocab_size}; expected 1 … 2^32")
        self.path, self.vocab_size = Path(path), vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.num_tokens = self.num_documents = 0
        self._digest = hashlib.sha256()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._limits = tempfile.TemporaryFile(dir=self.path.parent)  # put behind the tokens at the end
        self._file = open(self._temporary, "wb")
        self._file.write(bytes(_HEADER_SIZE))
        self._add_limit()

    def add(self, document: Sequence[int] | np.ndarray | Tensor) -> None:
        """Appends a document, which may be empty. Raises ValueError for ids outside 0 … vocab_size - 1."""
        ids = np.asarray(document, dtype=np.int64).reshape(-1)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(
                f"document {self.num_documents} of {self.path.name} has token ids {ids.min()} … {ids.max()}; "
                f"expected 0 … {self.vocab_size - 1}, the vocabulary of the tokenizer"
            )
        content = ids.astype(self.dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.num_tokens += len(ids)
        self.num_documents += 1
        self._add_limit()

    def _add_limit(self) -> None:
        limit = struct.pack("<q", self.num_tokens)
        self._limits.write(limit)
        self._digest.update(limit)

    def close(self) -> None:
        """Completes the file, brings it to disk and gives it its name."""
        try:
            self._file.write(bytes(-self._file.tell() % 8))
            self._limits.seek(0)
            shutil.copyfileobj(self._limits, self._file)
            self._file.seek(0)
            self._file.write(
                pack_header(
                    self.dtype.itemsize, self.num_tokens, self.num_documents, self.vocab_size, self._digest.digest()
                )
            )
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self.path)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Removes what was written so far, unless it is complete."""
        self._file.close()
        self._limits.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close() if kind is None else self.abandon()


def write_token_file(
    path: str | os.PathLike, documents: Iterable[Sequence[int] | np.ndarray | Tensor], vocab_size: int
) -> None:
    """Writes documents, one held in memory at a time. An interrupted call leaves `path` as it was.

    Raises:
        ValueError: a token id outside 0 … vocab_size - 1.
        OSError: the folder cannot be written, or the disk is full.
    """
    with TokenFileWriter(path, vocab_size) as writer:
        for document in documents:
            writer.add(document)


def pack_header(item_size: int, num_tokens: int, num_documents: int, vocab_size: int, digest: bytes) -> bytes:
    """The first 128 bytes of a token file."""
    fields = _HEADER.pack(_MAGIC, VERSION, item_size, num_tokens, num_documents, vocab_size, digest)
    fields = fields.ljust(_HEADER_SIZE - 4, b"\0")
    return fields + struct.pack("<I", zlib.crc32(fields))


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A token file, open for reading through a memory map. len() is the number of documents.

    Attributes:
        path: the file.
        tokens: uint16 or uint32 [num_tokens]: all documents, one after the other.
        limits: int64 [documents + 1]: document i is tokens[limits[i]:limits[i + 1]].
        vocab_size: all ids are below it.
        fingerprint: a hash of the documents.
    """

    path: Path
    tokens: np.ndarray
    limits: np.ndarray
    vocab_size: int
    fingerprint: str

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenFile":
        """Opens a file that `write_token_file` wrote. Its tokens are not read.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is cut short, of another version or no token file; one line.
        """
        path = Path(path)
        size = path.stat().st_size
        advice = "delete it, and it is made again"
        with open(path, "rb") as file:
            header = file.read(_HEADER_SIZE)
        if len(header) < _HEADER_SIZE or not header.startswith(_MAGIC):
            raise ValueError(f"{path} ({size} bytes) does not begin as a token file of fastdiff; {advice}")
        _, version, item_size, tokens, documents, vocab_size, digest = _HEADER.unpack(header[: _HEADER.size])
        if version != VERSION:
            raise ValueError(f"{path} is a token file of version {version}; expected version {VERSION}; {advice}")
        if struct.unpack("<I", header[-4:])[0] != zlib.crc32(header[:-4]):
            raise ValueError(f"{path}: its header is damaged (the checksum differs); {advice}")
        if item_size not in (2, 4) or tokens < 0 or documents < 0:
            raise ValueError(f"{path}: its header has impossible sizes; {advice}")
        end = _HEADER_SIZE + tokens * item_size
        limits_start = end + -end % 8
        expected = limits_start + 8 * (documents + 1)
        if size != expected:
            raise ValueError(
                f"{path} holds {size} bytes; its header says {tokens} tokens and {documents} documents, which are "
                f"{expected} bytes; {advice}"
            )
        content = np.memmap(path, dtype=np.uint8, mode="r")
        return cls(
            path,
            content[_HEADER_SIZE:end].view(f"<u{item_size}"),
            content[limits_start:].view("<i8"),
            vocab_size,
            digest.hex(),
        )

    def __len__(self) -> int:
        return len(self.limits) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def document_lengths(self) -> Tensor:
        """Tokens of each document: int64 [documents]."""
        return torch.from_numpy(np.diff(self.limits))

    def document(self, index: int) -> Tensor:
        """The token ids of a document: int64 [length]. Raises IndexError where there is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {self.path}, which has {len(self)}")
        return self._read(int(self.limits[index]), int(self.limits[index + 1]))

    def window(self, start: int, length: int) -> Tensor:
        """`length` token ids from `start` on, across documents: int64 [length]. IndexError beyond the file's ends."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start} … {start + length} of {self.path}, which has {self.num_tokens}")
        return self._read(start, start + length)

    def _read(self, start: int, end: int) -> Tensor:
        return torch.from_numpy(self.tokens[start:end].astype(np.int64))
