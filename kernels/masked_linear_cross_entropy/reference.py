"""The masked diffusion loss in plain PyTorch: the truth for tests, and the fallback. See README.md."""

import torch
import torch.nn.functional as F
from torch import Tensor


def row_losses(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # int64 [N]
    suppress_tokens: Tensor | None,  # int64 [S]
    label_smoothing: float,
) -> Tensor:  # [N]: NaN where the target is not an allowed id
    """Cross entropy of each row under the softmax over the ids that are not suppressed."""
    allowed = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    if suppress_tokens is not None:
        allowed[suppress_tokens] = False
        logits = logits.masked_fill(~allowed, -torch.inf)
    log_p = F.log_softmax(logits, dim=-1)
    valid = (targets >= 0) & (targets < logits.shape[1])
    targets = torch.where(valid, targets, 0)
    valid = valid & allowed[targets]
    loss = -log_p.gather(-1, targets[:, None])[:, 0]
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p[:, allowed].mean(-1)
    return torch.where(valid, loss, torch.nan)


def masked_linear_cross_entropy(
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [R]
    mask: Tensor,  # bool [R]
    row_weight: Tensor | None,  # [R]
    suppress_tokens: Tensor | None,  # int64 [S]
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:  # [], [R]
    """(sum over masked rows of row_weight · loss, the loss of each row without gradient, 0 where it isn't masked)."""
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = mask.nonzero()[:, 0]
    logits = F.linear(hidden[rows], weight, bias).to(compute)
    losses = row_losses(logits, targets[rows], suppress_tokens, label_smoothing)
    weighted = losses if row_weight is None else losses * row_weight[rows].to(compute)
    per_row = torch.zeros(mask.shape, dtype=compute, device=hidden.device)
    return weighted.sum(), per_row.index_put((rows,), losses.detach())
