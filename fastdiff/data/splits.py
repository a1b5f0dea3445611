"""How data sets without a split of their own are split, once and for all."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SPLIT_SEED = 20260601  # fixed, so that every run and every evaluation holds out the same images


def stratified_split(labels: Tensor, held_out_fraction: float) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices held out, both sorted: the same fraction of each class, by `SPLIT_SEED`.

    Each class keeps at least one image on either side.
    """
    generator = np.random.default_rng(SPLIT_SEED)
    held_out = []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten().numpy()
        count = min(max(round(len(members) * held_out_fraction), 1), len(members) - 1)
        held_out.append(generator.permutation(members)[:count])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.from_numpy(np.concatenate(held_out))] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()


def grouped_split(groups: Sequence[str], held_out_fraction: float) -> list[bool]:
    """Which examples are held out, by `SPLIT_SEED`: whole groups, of about this fraction of all examples.

    Each side has at least one group, where there are two.
    """
    members: dict[str, int] = {}
    for group in groups:
        members[group] = members.get(group, 0) + 1
    names = list(members)
    wanted, held_out = held_out_fraction * len(groups), set[str]()
    for index in np.random.default_rng(SPLIT_SEED).permutation(len(names))[:-1].tolist():
        if wanted <= 0:
            break
        held_out.add(names[index])
        wanted -= members[names[index]]
    return [group in held_out for group in groups]
