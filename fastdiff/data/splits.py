"""How data sets without a split of their own are split, once and for all."""

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
