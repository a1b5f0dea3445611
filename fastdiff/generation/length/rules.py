"""Rules that read an answer's length off a window of masks: pure functions of what the model says there.

Offsets i = 0 … W - 1 count the window's tokens; EoS at offset i means a length of i. Two kinds of rules:

- A curve F(i) = P(length ≤ i), given as *levels* -log(1 - F), float64 `[B, W]`, which do not tie where F is near 1. The
  bound is the first offset whose level is above a threshold. The score of a length is the highest level before it, so
  that bound ≥ length exactly where score ≤ threshold.
- A predicted length, float64 `[B]`. The bound is the prediction plus a threshold; the score is length - prediction.

The two learned heads, a token classifier and a regressor, are those of the project diffusion-llms.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

CURVE_RULES = ("cdf", "crossing", "classifier")
EXPANSION_RULES = ("daedal", "rho")
LENGTH_RULES = ("cdf", "constant", "argmax", "quantile", "crossing", "daedal", "rho", "classifier", "regression")

LOWEST_THRESHOLD = math.log(2)  # the level of F = 0.5: below it a good model's likelier answers would be cut
# Added to calibrated levels: the pair whose score is the threshold must not be on the other side of it because another
# batch rounds another way (seen: 1e-6 of a level). It can only raise a bound.
TIE_MARGIN = 1e-4
CROSSING_WINDOW = 8
EXPANSION_START, EXPANSION_STEP = 64, 8
DAEDAL_POSITIONS = 32
RHO_BAND = (0.4, 0.6)


def level(log_prob: Tensor) -> Tensor:
    """-log(1 - p), float64, of log p; infinite where log p is 0."""
    return -torch.log(-torch.expm1(log_prob.double().clamp(max=0)))


def level_of(probability: float) -> float:
    """-log(1 - p) of a number in [0, 1)."""
    return -math.log1p(-probability)


def cdf_levels(end_log_prob: Tensor, length_format: str) -> Tensor:  # [B, W] -> float64 [B, W]
    """The distribution of the length, by what P(end token at i) means in the format that the model was trained on.

    With everything masked the predictions are marginals:

    - "eos_fill", `[text][EoS][EoS…]`: P(EoS at i) is P(length ≤ i).
    - "pad_fill", `[text][EoS][PAD…]`: P(EoS or PAD at i) is P(length ≤ i); both are end tokens here.
    - "eos_only", nothing after EoS was in the loss: P(EoS at i) is the hazard h(i) = P(length = i | length ≥ i), and
      1 - F(i) = Π (1 - h), in logarithms.

    The running maximum makes what ought to rise do so. Source: fastdiff's own; the first format's probabilities are
    what LLaDA's are.
    """
    levels = level(end_log_prob)
    return levels.cumsum(1) if length_format == "eos_only" else levels.cummax(1).values


def crossing_levels(end_log_prob: Tensor, width: int = CROSSING_WINDOW) -> Tensor:  # [B, W] -> float64 [B, W]
    """Mean of P(end token) over the `width` positions from j on (fewer at the end), as levels.

    A published rule for the first step: the first j whose mean is at least τ. Here it is above τ, as in every rule of
    this kind.
    """
    survival = -torch.expm1(end_log_prob.double().clamp(max=0))
    length = survival.shape[1]
    sums = functional.pad(survival, (0, width - 1)).unfold(1, width, 1).sum(-1)
    counts = (length - torch.arange(length, device=sums.device)).clamp(max=width)
    return -torch.log(sums / counts)


def classifier_levels(logits: Tensor) -> Tensor:  # [B, W] -> float64 [B, W]
    """Levels of the running maximum of sigmoid(logits): a token classifier's P(length ≤ i) (diffusion-llms)."""
    return functional.softplus(logits.double()).cummax(1).values


def argmax_lengths(end_logits: Tensor) -> Tensor:  # [B, W] -> float64 [B]
    """The position with the highest EoS logit (published on LLaDA's first step)."""
    return end_logits.argmax(1).double()


def quantile_lengths(end_log_prob: Tensor, quantile: float) -> Tensor:  # [B, W] -> float64 [B]
    """The first masked position whose P(EoS) is at least its `quantile` over the masked positions.

    Published on LLaDA-8B (quantile .75, window 1024), plus one: the window is cropped behind that position, which is
    where a bound of that position crops it. Where P(EoS) rises with the position this is about quantile · W, whatever
    the prompt says.
    """
    probability = end_log_prob.double().exp()
    least = torch.quantile(probability, quantile, dim=1, keepdim=True)
    return (probability >= least).to(torch.int8).argmax(1).double()


def regression_lengths(expected: Tensor, window: int) -> Tensor:  # [B] -> float64 [B]
    """A regressor's expected lengths, rounded up to tokens, within the window (diffusion-llms)."""
    return expected.double().ceil().clamp(0, window)


def daedal_confidence(
    end_log_prob: Tensor, end_is_likeliest: Tensor, positions: int = DAEDAL_POSITIONS
) -> Tensor:  # [B, W], bool [B, W] -> float64 [B]
    """The sum of P(EoS) over the last `positions` positions, from the end, whose likeliest token is EoS, / `positions`.

    It is divided by `positions` however few there are, so that a single sure EoS does not stop the growth. DAEDAL's
    initial length adjustment (its public code): the window grows while this is below 0.5.
    """
    rank = end_is_likeliest.flip(1).cumsum(1).flip(1)  # 1 for the last such position
    counted = end_is_likeliest & (rank <= positions)
    return torch.where(counted, end_log_prob.double().exp(), 0).sum(1) / positions


def daedal_steps(end_log_prob: Tensor, end_is_likeliest: Tensor, threshold: float) -> Tensor:  # -> int64 [B]
    """1 for the rows whose window DAEDAL lets grow, else 0."""
    return (daedal_confidence(end_log_prob, end_is_likeliest) < threshold).long()


def rho_steps(end_is_likeliest: Tensor, band: tuple[float, float] = RHO_BAND) -> Tensor:  # bool [B, W] -> int64 [B]
    """ρ-EOS, ρ = masked positions whose likeliest token is EoS / masked positions: 1 below 0.4, -1 above 0.6, else 0.

    The published rule expands and contracts while it denoises, without passes of its own; here it is asked before, with
    the whole window masked, and steps are of 8 tokens.
    """
    rho = end_is_likeliest.double().mean(1)
    return (rho < band[0]).long() - (rho > band[1]).long()


def next_window(window: int, step: int, direction: int, longest: int) -> int:
    """The window after a step of -1, 0 or 1; the same where the search ends.

    It ends at `longest`, at 8 tokens, and where the step goes against `direction`, that of the first (0: none yet), so
    that no row goes to and fro.
    """
    if step * direction < 0:
        return window
    return min(max(window + EXPANSION_STEP * step, min(EXPANSION_STEP, longest)), longest) if step else window


def curve_bounds(levels: Tensor, threshold: float) -> Tensor:  # [B, W] -> int64 [B]
    """The first offset whose level is above the threshold, or above that of F = 0.5; W where there is none."""
    return (levels <= max(threshold, LOWEST_THRESHOLD)).long().cumprod(1).sum(1)


def curve_scores(levels: Tensor, lengths: Tensor) -> Tensor:  # [B, W], int64 [B] -> float64 [B]
    """The highest level before each length; 0 for length 0, infinite for those that do not fit (length ≥ W)."""
    window = levels.shape[1]
    highest = functional.pad(levels.cummax(1).values, (1, 0))
    scores = highest.gather(1, lengths.clamp(max=window)[:, None])[:, 0]
    return scores.masked_fill(lengths >= window, math.inf)


def length_bounds(predictions: Tensor, threshold: float, window: int) -> Tensor:  # float64 [B] -> int64 [B]
    """The prediction plus the threshold, rounded up, within 0 … W."""
    return (predictions + threshold).ceil().clamp(0, window).long()


def length_scores(predictions: Tensor, lengths: Tensor, window: int) -> Tensor:  # float64 [B], int64 [B] -> float64 [B]
    """length - prediction, infinite for lengths that do not fit (length ≥ W)."""
    return (lengths - predictions).masked_fill(lengths >= window, math.inf)


def bounds(rule: str, reading: Tensor, threshold: float, window: int) -> Tensor:  # -> int64 [B]
    """The bounds of either kind of rule, from levels `[B, W]` or predicted lengths `[B]`."""
    if rule in CURVE_RULES:
        return curve_bounds(reading, threshold)
    return length_bounds(reading, threshold, window)


def scores(rule: str, reading: Tensor, lengths: Tensor, window: int) -> Tensor:  # -> float64 [B]
    """The conformal scores of either kind of rule."""
    return curve_scores(reading, lengths) if rule in CURVE_RULES else length_scores(reading, lengths, window)


def as_lengths(lengths: Tensor | Sequence[int], rows: int, device: torch.device) -> Tensor:  # int64 [rows]
    """Lengths in tokens as a tensor. Raises ValueError for another number of them, or negative ones."""
    lengths = torch.as_tensor(lengths, device=device)
    if lengths.shape != (rows,) or lengths.is_floating_point() or bool((lengths < 0).any()):
        raise ValueError(f"lengths: got {lengths.tolist()}; expected {rows} integers of 0 or above, one per row")
    return lengths.long()
