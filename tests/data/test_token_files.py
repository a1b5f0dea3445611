"""Token files: what is written is read back, and what is not whole is refused."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data import TokenFile, write_token_file
from fastdiff.data.token_files import pack_header

DOCUMENTS = [[5, 6, 7], [], [65535], [1, 2, 3, 4, 0]]


@pytest.fixture
def token_file(tmp_path):
    write_token_file(tmp_path / "a.tokens", DOCUMENTS, 65536)
    return tmp_path / "a.tokens"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 69_999), max_size=9), max_size=9), st.sampled_from([70_000, 2**32]))
def test_documents_come_back(documents, vocab_size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tokens"
        write_token_file(path, (document for document in documents), vocab_size)
        file = TokenFile.open(path)
        assert [file.document(i).tolist() for i in range(len(file))] == documents
        flat = [token for document in documents for token in document]
        assert file.num_tokens == len(flat) and file.vocab_size == vocab_size
        assert file.document_lengths.tolist() == [len(document) for document in documents]
        for start in range(len(flat) + 1):
            assert file.window(start, len(flat) - start).tolist() == flat[start:]


def test_two_bytes_a_token_where_the_vocabulary_allows(tmp_path):
    for vocab_size, dtype in ((65536, np.uint16), (65537, np.uint32)):
        write_token_file(tmp_path / "x", [[vocab_size - 1]], vocab_size)
        file = TokenFile.open(tmp_path / "x")
        assert file.tokens.dtype == dtype and file.document(0).tolist() == [vocab_size - 1]
        assert file.document(0).dtype == torch.int64


def test_documents_may_be_tensors_and_arrays(tmp_path):
    write_token_file(tmp_path / "x", [torch.tensor([1, 2]), np.array([3], dtype=np.uint16), (4,)], 5)
    assert TokenFile.open(tmp_path / "x").window(0, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("document", [[0, 10], [-1], [2**40]])
def test_ids_outside_the_vocabulary(tmp_path, document):
    with pytest.raises(ValueError, match=r"document 1 of x has token ids .*expected 0 … 9"):
        write_token_file(tmp_path / "x", [[1], document], 10)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(token_file):
    def documents():
        yield [1] * 100_000
        raise KeyboardInterrupt

    before = token_file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_token_file(token_file, documents(), 10)
    assert list(token_file.parent.iterdir()) == [token_file] and token_file.read_bytes() == before


def test_a_file_cut_short_anywhere_is_refused(token_file):
    content = token_file.read_bytes()
    for size in range(len(content)):
        token_file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="delete it, and it is made again") as error:
            TokenFile.open(token_file)
        assert str(token_file) in str(error.value) and f"{size} bytes" in str(error.value)
        assert "\n" not in str(error.value)
    token_file.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=f"holds {len(content) + 1} bytes.*9 tokens and 4 documents"):
        TokenFile.open(token_file)


@pytest.mark.parametrize(
    ("position", "message"),
    [(0, "does not begin as a token file"), (8, "version 254; expected version 1"), (17, "its header is damaged")],
)
def test_a_damaged_header_is_refused(token_file, position, message):
    content = bytearray(token_file.read_bytes())
    content[position] ^= 0xFF
    token_file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenFile.open(token_file)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        TokenFile.open(tmp_path / "none")


def test_nothing_beyond_the_ends(token_file):
    file = TokenFile.open(token_file)
    for index in (-1, 4):
        with pytest.raises(IndexError, match="which has 4"):
            file.document(index)
    for start, length in ((-1, 1), (9, 1), (0, 10), (3, -1)):
        with pytest.raises(IndexError, match="which has 9"):
            file.window(start, length)


def test_the_fingerprint_is_that_of_the_documents(tmp_path):
    def fingerprint(documents):
        write_token_file(tmp_path / "x", documents, 10)
        return TokenFile.open(tmp_path / "x").fingerprint

    first = fingerprint([[1, 2], [3]])
    assert first == fingerprint([[1, 2], [3]])
    assert len({first, fingerprint([[1], [2, 3]]), fingerprint([[1, 2], [4]]), fingerprint([[1, 2, 3]])}) == 4


def test_more_than_4_gib(tmp_path):
    """A sparse file: its middle is a hole, so that it takes no room on the disk."""
    tokens, end = 2**31 + 1001, 128 + 2 * (2**31 + 1001)
    limits = np.array([0, 2**31, tokens], dtype="<i8")
    with open(tmp_path / "x", "wb") as file:
        file.write(pack_header(2, tokens, 2, 65536, bytes(32)))
        file.seek(end - 6)
        file.write(np.array([7, 8, 9], dtype="<u2").tobytes() + bytes(-end % 8) + limits.tobytes())
    file = TokenFile.open(tmp_path / "x")
    assert file.num_tokens == tokens and file.window(tokens - 4, 4).tolist() == [0, 7, 8, 9]
    assert file.document(1)[-3:].tolist() == [7, 8, 9] and file.document_lengths.tolist() == [2**31, 1001]
