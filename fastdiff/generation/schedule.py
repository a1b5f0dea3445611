"""How many of a block's masks each of its steps commits: the schedules of public code, worked out on the host."""

from functools import lru_cache

import torch
from torch import Tensor

from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig

SCHEDULES = ("even", "linear", "cosine", "maskgit_cosine", "dream")
DREAM_EPS = 1e-3


def mask_rates(steps: int, schedule: str, eps: float) -> Tensor:  # [steps + 1]
    """The share of a block that is masked before each step and after the last: from 1 down to 0.

    Times fall evenly from 1 to `eps`; whatever is masked at the last step is committed by it. float32 under "dream",
    whose public code counts in it, else float64.
    """
    if schedule == "dream":
        rates = torch.linspace(1, eps, steps + 1)
    else:
        name = "linear" if schedule == "even" else schedule
        process = MaskedDiffusion(MaskedDiffusionConfig(schedule=name), 0)
        rates = process.mask_rate(1 - torch.arange(steps + 1, dtype=torch.float64) * (1 - eps) / steps)
    rates[-1] = 0
    return rates


@lru_cache(maxsize=1024)
def transfer_counts(masks: int, steps: int, schedule: str, eps: float) -> tuple[int, ...]:
    """Tokens that the steps of a block with `masks` masks commit, without the steps that commit none.

    These need no pass: nothing changes before the next step. "even" is LLaDA's (the first `masks % steps` steps get one
    more), "dream" Dream's floor(n · (1 - s/t)) of the n masks left, the others round n · (1 - r(s)/r(t)) as dllm does,
    halves to the even number.
    """
    if schedule == "even":
        counts = [masks // steps + (step < masks % steps) for step in range(min(masks, steps))]
        return tuple(counts)
    rates, left, counts = mask_rates(steps, schedule, eps), masks, []
    for step in range(steps):
        exact = (1 - rates[step + 1] / rates[step]) * left
        count = left if step == steps - 1 else int(exact) if schedule == "dream" else min(round(float(exact)), left)
        counts.append(count)
        left -= count
    return tuple(count for count in counts if count)


def chance_steps(uniform: Tensor, steps: int, schedule: str, eps: float) -> Tensor:  # float64 [...] -> int64 [...]
    """The step, from 0, at which each position is committed under "ancestral" (MDLM).

    A position stays masked through a step with probability r(s)/r(t), whatever the others do, so it is masked with
    probability r after it: it is committed by the first step after which r is not above its one uniform number.
    """
    rising = mask_rates(steps, schedule, eps)[1:].double().flip(0).to(uniform.device)
    return steps - torch.searchsorted(rising, uniform.contiguous(), right=True)
