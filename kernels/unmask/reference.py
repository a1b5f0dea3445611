"""unmask_ in plain PyTorch, in float64: the truth for tests, and the fallback. README.md has the rules."""

import torch
from torch import Tensor

from fastdiff.kernels.common.philox import DRAW_ANCESTRAL, DRAW_ORDER, philox, uniform53


def unmask(
    token_ids: Tensor,  # int64 [B, L]
    token: Tensor,  # int64 [B, L]: the sample; -1 where there is none
    log_prob: Tensor,  # [B, L]
    entropy: Tensor,  # [B, L]
    margin: Tensor,  # [B, L]
    block_start: Tensor,  # int64 [B]
    block_end: Tensor,  # int64 [B]
    active: Tensor,  # bool [B]
    rule: str,
    order: str,
    value: Tensor,  # [B]: the rule's number
    mask_token_id: int,
    seed: Tensor,  # int64 []
    step: Tensor,  # int64 []
    sequence_ids: Tensor,  # int64 [B]
) -> tuple[Tensor, Tensor]:  # [B, L], [B]
    """The new token_ids, and how many positions of each row were committed."""
    length = token_ids.shape[1]
    positions = torch.arange(length, device=token_ids.device)
    candidate = (positions >= block_start[:, None]) & (positions < block_end[:, None]) & active[:, None]
    candidate &= (token_ids == mask_token_id) & (token != mask_token_id) & (token >= 0)

    if length == 0:
        return token_ids, torch.zeros_like(block_start)
    words = philox(seed, sequence_ids[:, None], positions, step, DRAW_ORDER)
    key = {
        "confidence": log_prob.double(),
        "margin": margin.double(),
        "entropy": -entropy.double(),
        "random": (words[0] >> 1).double() * 2.0**-31,
    }[order]
    logarithmic = order in ("confidence", "entropy")
    ranking = torch.where(key.isnan(), -2e300, key.clamp_min(-1e300))  # NaN after -inf, others than candidates last
    best_first = torch.where(candidate, ranking, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(best_first).scatter_(-1, best_first, positions.expand_as(best_first))

    number = value.double()[:, None]
    if rule == "count":
        take = rank < number
    elif rule == "threshold":
        take = key >= (number.log() if logarithmic else number)
    elif rule == "ancestral":
        take = uniform53(philox(seed, sequence_ids[:, None], positions, step, DRAW_ANCESTRAL)) < number
    else:
        if rule == "factor":
            holds = (key.exp() if logarithmic else key) > 1 - number / (rank + 2)
        else:
            cost = entropy.double().clamp_min(0).nan_to_num(nan=torch.inf, posinf=torch.inf)
            spent = torch.where(candidate, cost, 0.0).gather(-1, best_first).cumsum(-1)
            before = torch.zeros_like(spent).scatter_(-1, best_first[:, 1:], spent[:, :-1])
            holds = before <= number
        first_failure = torch.where(candidate & ~holds, rank, length).amin(-1, keepdim=True)
        take = rank < first_failure
    take &= candidate
    if rule != "ancestral":  # at least one
        take |= candidate & (rank == 0) & ~take.any(-1, keepdim=True)
    return torch.where(take, token, token_ids), take.sum(-1)
