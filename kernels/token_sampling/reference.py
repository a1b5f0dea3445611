"""Token sampling in plain PyTorch, in float64: the truth for tests, and the fallback. See README.md."""

import torch
from torch import Tensor

from fastdiff.kernels.common.philox import DRAW_TOKEN, philox, uniform53

BLOCK = 1024


def keep_threshold(
    z: Tensor,  # [R, V] float64, −inf where suppressed
    weights: Tensor,  # [R, V] exp((z − max) / T)
    top_k: int,
    top_p: float,
) -> Tensor:  # [R, 1]: ids with z ≥ it are kept
    """The smallest logit that top-k, then top-p, keep."""
    order = z.sort(dim=-1, descending=True)
    threshold = torch.full_like(z[:, :1], -torch.inf)
    if 0 < top_k < z.shape[1]:
        threshold = order.values[:, top_k - 1 : top_k]
    if top_p < 1:
        kept = torch.where(order.values >= threshold, weights.gather(-1, order.indices), 0)
        mass = kept.cumsum(-1)
        enough = (mass >= top_p * mass[:, -1:]).to(torch.int8).argmax(-1, keepdim=True)
        threshold = torch.maximum(threshold, order.values.gather(-1, enough))
    return threshold


def choose(weights: Tensor, u: Tensor) -> Tensor:
    """The id that each u [R] in [0, 1) falls on; weights [R, V] ≥ 0 with a positive sum."""
    cumulative = weights.cumsum(-1)
    token = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
    ids = torch.arange(weights.shape[-1], device=weights.device)
    last = torch.where(weights > 0, ids, 0).amax(-1)
    return torch.minimum(token, last)


def sample_tokens(
    logits: Tensor,  # [R, V]
    temperature: Tensor,  # [R] or []
    top_k: int,
    top_p: float,
    suppress_tokens: Tensor | None,  # [S]
    end_token_ids: Tensor | None,  # [E]
    seed: Tensor,  # int64 []
    step: Tensor,  # int64 []
    sequence_ids: Tensor,  # int64 [R]
    positions: Tensor,  # int64 [R]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token, log_prob, entropy, margin, end_log_prob, each [R]; -1 and NaN for rows without a distribution."""
    z = logits.double()
    if suppress_tokens is not None:
        z = z.index_fill(-1, suppress_tokens, -torch.inf)
    maximum, argmax = z.max(-1, keepdim=True)  # below: the first of several maxima
    argmax = (z == maximum).to(torch.int8).argmax(-1, keepdim=True)
    valid = torch.isfinite(maximum)[:, 0] & ~torch.isnan(z).any(-1)
    z = torch.where(valid[:, None], z, 0.0)
    maximum = torch.where(valid[:, None], maximum, 0.0)

    x = z - maximum
    weights = x.exp()
    others = weights.scatter(-1, argmax, 0.0)
    sum_of_others = others.sum(-1)
    log_normaliser = torch.log1p(sum_of_others)
    weighted = (weights * x.clamp_min(-1e4)).sum(-1)  # 0 · −inf is 0 here
    second = x.scatter(-1, argmax, -torch.inf).amax(-1)
    entropy = log_normaliser - weighted / (1 + sum_of_others)
    margin = (0.0 - torch.expm1(second)) / (1 + sum_of_others)

    temperature = temperature.double().expand(valid.shape)[:, None]
    scaled = (x / torch.where(temperature > 0, temperature, 1.0)).exp()
    threshold = keep_threshold(z, scaled, top_k, top_p)
    u = uniform53(philox(seed, sequence_ids, positions, step, DRAW_TOKEN))
    drawn = choose(torch.where(z >= threshold, scaled, 0.0), u)
    token = torch.where(temperature[:, 0] > 0, drawn, argmax[:, 0])
    log_prob = x.gather(-1, token[:, None])[:, 0] - log_normaliser

    end_log_prob = torch.full_like(log_prob, torch.nan)
    if end_token_ids is not None:
        end = torch.zeros(z.shape[-1], dtype=torch.bool, device=z.device)
        end[end_token_ids] = True
        rest = torch.where(end, others, 0.0).sum(-1)
        end_log_prob = torch.where(end[argmax[:, 0]], torch.log1p(rest), torch.log(rest)) - log_normaliser

    floats = [torch.where(valid, t, torch.nan).to(_float_of(logits)) for t in (log_prob, entropy, margin, end_log_prob)]
    return (torch.where(valid, token, -1), *floats)


def _float_of(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
