"""Fréchet distances in an encoder's space, of samples and of real examples, over as many of each."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.data import ExampleSet
from fastdiff.evaluation.metrics import frechet_distance

Encode = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class FrechetComparison:
    """Fréchet distances to real training examples; each is a mean over random draws.

    Attributes:
        count: examples on either side of every distance; distances of other counts can't be compared with these.
        features: width of the space.
        draws: how often the sets were drawn.
        samples: distance of the samples.
        held_out: distance of real examples that were held out of training.
        floor: distance of other real training examples, which is what a perfect model would get at this count.
        samples_range, held_out_range, floor_range: lowest and highest of the draws.
        space: whose features; None where that is not said.
    """

    count: int
    features: int
    draws: int
    samples: float
    held_out: float
    floor: float
    samples_range: tuple[float, float]
    held_out_range: tuple[float, float]
    floor_range: tuple[float, float]
    space: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """As a table."""
        of_space = f" in {self.space}" if self.space else ""
        lines = [
            f"| Fréchet distance to training examples{of_space} ({self.count} of each, {self.features} features) "
            f"| mean of {self.draws} draws | lowest … highest |",
            "| --- | ---: | ---: |",
        ]
        for name, label in (("samples", "samples"), ("held_out", "real held-out"), ("floor", "real, the other half")):
            low, high = getattr(self, f"{name}_range")
            lines.append(f"| {label} | {getattr(self, name):.4g} | {low:.4g} … {high:.4g} |")
        return "\n".join(lines)


@torch.inference_mode()
def encode_batches(encode: Encode, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """An encoder's states of each example, averaged over its tokens.

    Args:
        encode: takes a batch to states [B, L, D] and a mask bool [B, L] (True = a token) or None for all.
        batches: batches of examples.

    Returns:
        float32 [N, D], on the CPU.

    Raises:
        ValueError: no batches, states of another shape, an example without tokens, states that are not finite.
    """
    features = []
    for batch in batches:
        states, mask = encode(batch)
        if states.ndim != 3 or (mask is not None and mask.shape != states.shape[:2]):
            shape = None if mask is None else tuple(mask.shape)
            raise ValueError(
                f"encode: gave states of shape {tuple(states.shape)} and a mask of {shape}; expected [B, L, D] and "
                "[B, L] or None"
            )
        weight = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
        if not bool((weight.sum(1) > 0).all()):
            raise ValueError("encode: gave a mask with a row of False alone; expected a token in every example")
        kept = states.float().masked_fill(weight[..., None] == 0, 0)  # padding may be anything, NaN too
        features.append((kept.sum(1) / weight.sum(1, keepdim=True)).cpu())
    if not features:
        raise ValueError("batches: got none; expected at least one")
    features = torch.cat(features)
    if not bool(features.isfinite().all()):
        raise ValueError("encode: gave states that are not finite; the samples or the encoder have diverged")
    return features


def batches_of(examples: ExampleSet, count: int | None = None, batch_size: int = 64) -> Iterable[dict[str, Tensor]]:
    """Batches of `count` examples, spread evenly over the set (of all of them if None, or where there are fewer)."""
    total = len(examples)
    count = total if count is None else min(count, total)
    for part in (torch.arange(count) * total // max(count, 1)).split(batch_size):
        yield examples.batch(part)


def compare_with_real(
    samples: Tensor,
    train: Tensor,
    held_out: Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
    space: str | None = None,
) -> FrechetComparison:
    """Fréchet distances of samples, held-out and other training examples to training examples, as many of each.

    The Fréchet distance of finite sets is biased upward, the more the fewer they are; so every set is cut to the same
    count, n = min(samples, held out, half of train), and the distance of two disjoint draws of n training examples
    stands beside the others as what is left for a perfect model. Take n well above the width of the features, where
    the covariances would be singular.

    Args:
        samples, train, held_out: [S, D], [M, D], [K, D], as `encode_batches` gives them.
        draws: how often the sets are drawn at random.
        seed: seed of the draws.
        space: the name of the features, for the table.

    Raises:
        ValueError: shapes that do not fit, or fewer than 2 (of train, 4) examples.
    """
    count = min(len(samples), len(held_out), len(train) // 2)
    if count < 2 or draws < 1:
        raise ValueError(
            f"samples: got {len(samples)} of them, {len(train)} training and {len(held_out)} held-out examples, "
            f"{draws} draws; expected at least 2, 4, 2 and 1"
        )
    generator = np.random.default_rng(seed)
    distances: dict[str, list[float]] = {"samples": [], "held_out": [], "floor": []}
    for _ in range(draws):
        order = torch.from_numpy(generator.permutation(len(train)))
        reference, other = train[order[:count]], train[order[count : 2 * count]]
        of_samples = samples[torch.from_numpy(generator.permutation(len(samples))[:count])]
        of_held_out = held_out[torch.from_numpy(generator.permutation(len(held_out))[:count])]
        for name, features in (("samples", of_samples), ("held_out", of_held_out), ("floor", other)):
            distances[name].append(frechet_distance(features, reference))
    means = {name: float(np.mean(values)) for name, values in distances.items()}
    ranges = {f"{name}_range": (min(values), max(values)) for name, values in distances.items()}
    return FrechetComparison(count, train.shape[1], draws, **means, **ranges, space=space)
