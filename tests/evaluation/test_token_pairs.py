"""Shares of known neighbours, on texts where they can be counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdiff.evaluation.token_pairs import known_pairs


def corpus(train, held_out):
    """What `known_pairs` reads of a corpus: tokens to train on, and held-out windows."""
    targets = SimpleNamespace(tokens=np.array(train, dtype=np.uint16), vocab_size=10)
    part = SimpleNamespace(part=SimpleNamespace(targets=targets))

    class HeldOut(list):
        def batch(self, indices):
            return {"input_ids": torch.tensor([self[i] for i in indices])}

    return SimpleNamespace(train=part, held_out=HeldOut(held_out))


def test_neighbours_are_counted():
    data = corpus([1, 2, 3, 1, 4], [[1, 2, 3], [3, 2, 1]])
    pairs = known_pairs(torch.tensor([[1, 2, 3], [3, 1, 9], [4, 1, 4]]), data)
    assert pairs.samples == pytest.approx(4 / 6)  # 12 23 | 31 19 | 41 14
    assert pairs.held_out == pytest.approx(2 / 4)
    assert "| real held-out | 50.0% |" in pairs.to_markdown()


def test_shuffling_keeps_the_tokens_alone():
    cycle = list(range(10)) * 20
    data = corpus(cycle, [cycle[:10]])
    pairs = known_pairs(torch.tensor(cycle).view(20, 10), data)
    assert pairs.samples == pairs.held_out == 1 and 0 < pairs.shuffled < 0.3  # 1 in 10 by chance


def test_single_tokens_have_no_neighbours():
    with pytest.raises(ValueError, match="2 tokens or more"):
        known_pairs(torch.tensor([[1]]), corpus([1, 2], [[1]]))
