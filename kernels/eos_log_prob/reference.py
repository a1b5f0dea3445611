"""The log-probability that a position holds an end token, in plain PyTorch and float64: the truth for tests, and the
fallback. See README.md."""

import torch
from torch import Tensor
from torch.nn import functional


def eos_log_prob_from_logits(
    logits: Tensor,  # [..., V]
    end_token_ids: Tensor,  # int64 [E]
    excluded_ids: Tensor,  # int64 [X]: end_token_ids and the suppressed ids
) -> Tensor:  # [...]
    """log P(one of end_token_ids) over the ids that are not suppressed; NaN for rows without a distribution."""
    z = logits.double()
    ends = z[..., end_token_ids].logsumexp(-1)
    others = z.index_fill(-1, excluded_ids, -torch.inf).logsumexp(-1)
    log_prob = 0.0 - torch.logaddexp(torch.zeros_like(ends), others - ends)
    infinite = (ends == torch.inf) | (others == torch.inf)
    return torch.where(infinite, torch.nan, log_prob).to(z.dtype if logits.dtype == z.dtype else torch.float32)


def eos_log_prob(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    end_token_ids: Tensor,
    excluded_ids: Tensor,
) -> Tensor:  # [...]
    """The same from hidden states: logits are rounded to their dtype, as the model's own head rounds them."""
    return eos_log_prob_from_logits(functional.linear(hidden, weight, bias), end_token_ids, excluded_ids)
