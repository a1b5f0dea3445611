"""Windows of documents and pairs: what may be masked, what is attended to, where a row ends."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data import (
    TextDataConfig,
    TextPart,
    TokenFile,
    document_windows,
    pair_windows,
    window_length,
    write_token_file,
)

PAD, BOS, EOS, MASK = 0, 1, 2, 3
IDS = st.integers(5, 60)
PAIRS = st.lists(st.tuples(st.lists(IDS, max_size=6), st.lists(IDS, max_size=12)), min_size=1, max_size=6)
FORMATS = ["eos_fill", "pad_fill", "eos_only"]


def make_part(folder, pairs):
    for name, documents in zip(("conditions", "targets"), zip(*pairs, strict=True), strict=True):
        write_token_file(Path(folder) / name, documents, 64)
    return TextPart(TokenFile.open(Path(folder) / "targets"), TokenFile.open(Path(folder) / "conditions"))


@settings(deadline=None, max_examples=100)
@given(PAIRS, st.integers(1, 14), st.sampled_from(FORMATS), st.booleans(), st.data())
def test_pair_windows(pairs, length, length_format, separate, data):
    indices = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=5))
    with tempfile.TemporaryDirectory() as folder:
        part = make_part(folder, pairs)
        batch = pair_windows(part, torch.tensor(indices), length, length_format, EOS, PAD, separate, BOS, MASK)
    ids, attended, maskable = batch.input_ids, batch.attention_mask, batch.maskable
    assert ids.dtype == torch.int64 and attended.dtype == maskable.dtype == torch.bool
    assert ids.shape == attended.shape == maskable.shape and len(ids) == len(indices)
    assert not (maskable & ~attended).any()
    assert (ids[~attended] == PAD).all()
    widest = 0
    for row, index in enumerate(indices):
        prompt, answer = pairs[index]
        if separate:
            kept = batch.condition_mask[row]
            assert batch.condition_ids[row][kept].tolist() == prompt
            assert (batch.condition_ids[row][~kept] == PAD).all() and kept[: len(prompt)].all()
            prompt = [BOS]
        closed = answer[:length] if len(answer) >= length else [*answer, EOS]
        fill = {"eos_fill": [EOS], "pad_fill": [PAD], "eos_only": [MASK]}[length_format] * (length - len(closed))
        window = closed + fill
        end = len(prompt) + len(window)
        assert ids[row, :end].tolist() == prompt + window
        assert attended[row].tolist() == [i < end for i in range(ids.shape[1])]
        begin, last = len(prompt), len(prompt) + len(closed) if length_format == "eos_only" else end
        assert maskable[row].tolist() == [begin <= i < last for i in range(ids.shape[1])]
        assert batch.is_end[row].tolist() == [begin + min(len(answer), length) <= i < end for i in range(ids.shape[1])]
        widest = max(widest, end)
    assert ids.shape[1] == widest  # no column of padding alone
    assert (batch.condition_ids is None) == (batch.condition_mask is None) == (not separate)


def test_the_three_formats(tmp_path):
    part = make_part(tmp_path, [([10, 11], [20, 21]), ([12], [22, 23, 24, 25, 26])])

    def rows(length_format):
        batch = pair_windows(part, [0, 1], 4, length_format, EOS, PAD, mask_token_id=MASK)
        return batch.input_ids.tolist(), batch.maskable.int().tolist()

    cut = [12, 22, 23, 24, 25, 0]  # does not fit: no EoS, and a column of padding
    assert rows("eos_fill") == ([[10, 11, 20, 21, 2, 2], cut], [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert rows("pad_fill") == ([[10, 11, 20, 21, 2, 0], cut], [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])
    assert rows("eos_only") == (
        [[10, 11, 20, 21, 2, 3], cut],
        [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]],
    )


@pytest.mark.parametrize("size", [3, 4, 5])
def test_an_answer_as_long_as_the_window_has_no_eos(tmp_path, size):
    part = make_part(tmp_path, [([10], [20] * size)])
    window = pair_windows(part, [0], 4, "eos_fill", EOS, PAD).input_ids[0, 1:].tolist()
    assert window == ([20, 20, 20, EOS] if size == 3 else [20] * 4)


def test_pair_windows_refuse(tmp_path):
    part = make_part(tmp_path, [([10], [20])])
    with pytest.raises(ValueError, match="length: got 0; expected"):
        pair_windows(part, [0], 0, "eos_fill", EOS, PAD)
    with pytest.raises(ValueError, match="length_format: got 'eos'; expected 'eos_fill'"):
        pair_windows(part, [0], 4, "eos", EOS, PAD)
    with pytest.raises(ValueError, match="holds documents; expected pairs"):
        pair_windows(TextPart(part.targets), [0], 4, "eos_fill", EOS, PAD)
    with pytest.raises(ValueError, match="bos_token_id: got None; answers to separate conditions begin with BoS"):
        pair_windows(part, [0], 4, "eos_fill", EOS, PAD, separate_conditions=True)
    with pytest.raises(ValueError, match="mask_token_id: got None; windows of eos_only are filled"):
        pair_windows(part, [0], 4, "eos_only", EOS, PAD)
    with pytest.raises(IndexError, match="document 1 of"):
        pair_windows(part, [1], 4, "eos_fill", EOS, PAD)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(IDS, max_size=9), min_size=1, max_size=5), st.integers(1, 12), st.data())
def test_document_windows(documents, length, data):
    flat = [token for document in documents for token in document]
    with tempfile.TemporaryDirectory() as folder:
        write_token_file(Path(folder) / "x", documents, 64)
        tokens = TokenFile.open(Path(folder) / "x")
        if length > len(flat):
            with pytest.raises(ValueError, match=f"expected them within the {len(flat)} tokens"):
                document_windows(tokens, length, [0])
            return
        starts = data.draw(st.lists(st.integers(0, len(flat) - length), max_size=4))
        windows = document_windows(tokens, length, torch.tensor(starts, dtype=torch.int64))
        assert windows.dtype == torch.int64 and windows.shape == (len(starts), length)
        assert windows.tolist() == [flat[start : start + length] for start in starts]
        with pytest.raises(ValueError, match=f"windows of {length} tokens starting at"):
            document_windows(tokens, length, [len(flat) - length + 1])


def test_window_lengths_are_uniform():
    config, generator = TextDataConfig(min_length=3, max_length=6), torch.Generator().manual_seed(1)
    counts = Counter(window_length(config, generator) for _ in range(4000))
    assert sorted(counts) == [3, 4, 5, 6]
    # a deviation of 27 is one standard deviation; the largest seen with this seed is 30
    assert max(abs(count - 1000) for count in counts.values()) < 110
    again = torch.Generator().manual_seed(7)
    first = [window_length(config, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert first == [window_length(config, again)] * 2
    assert window_length(TextDataConfig(min_length=5, max_length=5)) == 5


def test_window_lengths_are_log_uniform():
    config = TextDataConfig(min_length=4, max_length=63, window_distribution="log_uniform")
    generator = torch.Generator().manual_seed(1)
    drawn = [window_length(config, generator) for _ in range(4000)]
    assert min(drawn) == 4 and max(drawn) == 63
    counts = [sum(low <= length < 2 * low for length in drawn) for low in (4, 8, 16, 32)]
    # a deviation of 27 is one standard deviation; the largest seen with this seed is 29
    assert max(abs(count - 1000) for count in counts) < 110
