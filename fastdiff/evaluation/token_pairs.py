"""Do generated texts put tokens in an order that real text has? Shares of neighbouring tokens seen in training text."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.text_examples import TextExamples


@dataclass(frozen=True)
class KnownPairs:
    """Shares of pairs of neighbouring tokens that are neighbours somewhere in the text to train on.

    Attributes:
        samples: share in the samples.
        held_out: share in as many held-out windows, which is what a perfect model would get.
        shuffled: share after all of the samples' tokens were put in random order, which is what a model would get that
            knows the tokens' frequencies alone.
    """

    samples: float
    held_out: float
    shuffled: float

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        rows = (("samples", self.samples), ("real held-out", self.held_out), ("samples, shuffled", self.shuffled))
        lines = ["| pairs of neighbouring tokens that the training text has | share |", "| --- | ---: |"]
        return "\n".join(lines + [f"| {name} | {share:.1%} |" for name, share in rows])


def known_pairs(samples: Tensor, data: TextExamples, *, seed: int = 0) -> KnownPairs:
    """Measures samples, int64 [N, L] with L of 2 or more, of the data's vocabulary.

    Raises ValueError for fewer tokens per sample.
    """
    if samples.ndim != 2 or samples.shape[1] < 2:
        raise ValueError(f"samples: got shape {list(samples.shape)}; expected [N, L] with 2 tokens or more each")
    vocabulary = data.train.part.targets.vocab_size
    tokens = np.asarray(data.train.part.targets.tokens).astype(np.int64)
    known = np.unique(tokens[:-1] * vocabulary + tokens[1:])
    count = min(len(samples), len(data.held_out))
    chosen = torch.arange(count) * len(data.held_out) // count
    held_out = data.held_out.batch(chosen)["input_ids"]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(samples.numel()))
    shuffled = samples.flatten()[order].view_as(samples)
    return KnownPairs(*(_share(rows.numpy(), known, vocabulary) for rows in (samples, held_out, shuffled)))


def _share(rows: np.ndarray, known: np.ndarray, vocabulary: int) -> float:
    return float(np.isin(rows[:, :-1] * vocabulary + rows[:, 1:], known).mean())
