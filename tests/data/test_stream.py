"""The order of samples is a pure function of seed and step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.data import EpochStream, share

sizes = st.integers(1, 60)


@given(size=sizes, batch=sizes, seed=st.integers(0, 1000), steps=st.integers(1, 12))
def test_every_epoch_reads_each_sample_once(size, batch, seed, steps):
    stream = EpochStream(size, batch, seed)
    read = torch.cat([stream.indices(step) for step in range(steps)])
    for start in range(0, len(read) - size + 1, size):
        assert sorted(read[start : start + size].tolist()) == list(range(size))


@given(size=sizes, batch=sizes, seed=st.integers(0, 1000), step=st.integers(0, 10**6))
def test_a_step_needs_no_history(size, batch, seed, step):
    used = EpochStream(size, batch, seed)
    used.indices(step // 2)
    assert torch.equal(used.indices(step), EpochStream(size, batch, seed).indices(step))


def test_epochs_and_seeds_differ():
    stream = EpochStream(50, 50, seed=3)
    assert not torch.equal(stream.indices(0), stream.indices(1))
    assert not torch.equal(stream.indices(0), EpochStream(50, 50, seed=4).indices(0))


@given(count=st.integers(0, 100), parts=st.integers(1, 9))
def test_shares_cover_everything_evenly(count, parts):
    shares = [range(count)[share(count, parts, part)] for part in range(parts)]
    assert [i for part in shares for i in part] == list(range(count))
    lengths = [len(part) for part in shares]
    assert max(lengths) - min(lengths) <= 1


def test_bad_sizes():
    with pytest.raises(ValueError, match="size: got 0, and batch_size"):
        EpochStream(0, 4, 0)
