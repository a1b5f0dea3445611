"""Token sampling and unmasking in plain PyTorch, in float64: the truth for tests, and the fallback. See README.md."""

import torch
from torch import Tensor

BLOCK = 1024
DRAW_TOKEN, DRAW_ORDER, DRAW_ANCESTRAL = 0, 1, 2
_LOW = 0xFFFFFFFF


def _mulhilo(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of two 32-bit words, both held in int64."""
    low, high = constant * (value & 0xFFFF), constant * (value >> 16)  # below 2^48
    return (high + (low >> 16)) >> 16, (low + (high << 16)) & _LOW


def philox(seed: Tensor, sequence_ids: Tensor, positions: Tensor, step: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """The first two words (int64 tensors below 2^32) of Philox4x32-10; all arguments are int64 and broadcast."""
    shape = torch.broadcast_shapes(sequence_ids.shape, positions.shape)
    c = [t.expand(shape) & _LOW for t in (sequence_ids, positions, step)]
    c.append(torch.full_like(c[0], draw))
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        (h0, l0), (h1, l1) = _mulhilo(0xD2511F53, c[0]), _mulhilo(0xCD9E8D57, c[2])
        c = [h1 ^ c[1] ^ k0, l1, h0 ^ c[3] ^ k1, l0]
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c[0], c[1]


def uniform53(words: tuple[Tensor, Tensor]) -> Tensor:
    """53 bits in [0, 1), float64."""
    return ((words[0] >> 5).double() * 2.0**26 + (words[1] >> 6).double()) * 2.0**-53


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
    take |= candidate & (rank == 0) & ~take.any(-1, keepdim=True)
    return torch.where(take, token, token_ids), take.sum(-1)
