"""Scores by which drawn tokens are ordered, where they are not those of the model's own distribution."""

import torch
from torch import Tensor

from fastdiff.generation.config import MaskedDiffusionGenerationConfig
from fastdiff.kernels.common.philox import DRAW_ORDER, philox, uniform53
from fastdiff.ops import TokenSample, sample_tokens


def needs_logits(config: MaskedDiffusionGenerationConfig) -> bool:
    """Whether the scores need logits in memory: those of the rows that are predicted."""
    return config.score_distribution == "sampling" or bool(config.begin_suppress_tokens)


def draw_and_score(
    logits: Tensor,  # [R, V]
    config: MaskedDiffusionGenerationConfig,
    suppressed: tuple[int, ...],
    **options: Tensor | int | str,  # seed, step, sequence_ids, positions, invalid
) -> TokenSample:
    """Tokens drawn from the logits, with the scores of config.score_distribution and without begin_suppress_tokens."""
    drawing = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    if config.score_distribution == "sampling":
        logits = filtered(logits, suppressed, **drawing)
        drawing = dict(temperature=float(config.temperature > 0))
    sample = sample_tokens(logits, **drawing, suppress_tokens=suppressed, **options)
    return without_last(sample, logits, suppressed, config.begin_suppress_tokens or ())


def filtered(
    logits: Tensor, suppressed: tuple[int, ...], temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """The logits of what is drawn from: after temperature, top-k and top-p, by the rules of `sample_tokens`."""
    work = logits.double() if logits.dtype == torch.float64 else logits.float()
    work = work.index_fill(-1, torch.tensor(suppressed, device=logits.device), -torch.inf)
    if temperature > 0:
        work = (work - work.amax(-1, keepdim=True)) / temperature  # no temperature is so low that it overflows
    if top_k and top_k < work.shape[-1]:
        work = work.masked_fill(work < work.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        falling = work.sort(dim=-1, descending=True).values
        before = falling.softmax(-1, torch.float64).cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        least = falling.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
        work = work.masked_fill(work < least, -torch.inf)
    return work


def without_last(
    sample: TokenSample, logits: Tensor, suppressed: tuple[int, ...], last: tuple[int, ...]
) -> TokenSample:
    """Scores of the distribution without the ids `last`; a drawn one of these comes after every other token."""
    if not last:
        return sample
    both = tuple({*suppressed, *last})
    scores = sample_tokens(logits, suppress_tokens=both, invalid="flag")
    others = logits.double().index_fill(-1, torch.tensor(both, device=logits.device), -torch.inf)
    log_prob = others.log_softmax(-1).gather(-1, sample.token.clamp(min=0)[..., None])[..., 0].to(scores.log_prob.dtype)
    # the likeliest token's is accurate near 0
    log_prob = torch.where(scores.token == sample.token, scores.log_prob, log_prob)
    late = torch.isin(sample.token, torch.tensor(last, device=logits.device))
    return sample._replace(
        log_prob=log_prob.masked_fill(late, -torch.inf),
        entropy=scores.entropy.masked_fill(late, torch.inf),
        margin=scores.margin.masked_fill(late, -torch.inf),
    )


def with_noise(
    sample: TokenSample, order: str, alg_temp: float, seed: int, step: int, sequence_ids: Tensor, positions: Tensor
) -> TokenSample:
    """A sample whose log_prob is score / alg_temp + Gumbel noise.

    The n highest are n draws without replacement from softmax(score / alg_temp): Dream's `alg_temp`. The score is the
    probability, the margin or minus the entropy, as Dream has them.
    """
    score = {"confidence": sample.log_prob.exp(), "margin": sample.margin, "entropy": -sample.entropy}[order].double()
    score = score.masked_fill(sample.log_prob == -torch.inf, -torch.inf)  # of begin_suppress_tokens: last, all the same
    seeds, steps = (torch.tensor(n, device=score.device) for n in (seed, step))
    uniform = uniform53(philox(seeds, sequence_ids, positions, steps, DRAW_ORDER))
    noise = -torch.log(-torch.log1p(-uniform))
    return sample._replace(log_prob=(score / alg_temp + noise).to(sample.log_prob.dtype))
