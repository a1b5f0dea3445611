"""How good bounds on the lengths of answers are: how often right, how tight, how many tokens they save."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95  # of the intervals
_RESAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class Interval:
    """A measure and its bootstrap interval; None where no row says anything about it."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class LengthMeasures:
    """What bounds are worth, each with a 95 % bootstrap interval. Lengths and bounds are tokens before the EoS.

    Attributes:
        correctness: share of answers that are not cut: the bound is at least the length. An answer that does not fit
            into the window with its EoS is not cut by the bound where that is the whole window.
        longest_third: the same of the longest third: of the answers at least as long as the one at that rank, so that
            ties count whole.
        slack: mean of bound - length, in tokens, over the answers that fit and have a correct bound.
        relative_slack: slack over the mean length of the same answers.
        difference: mean of bound - length, in tokens, over all answers that fit, those with a bound too low included.
        rmse: root of the mean of (bound - length)², in tokens, over all answers that fit.
        saved_tokens: mean of window - min(bound + 1, window): what cropping saves, with room for the EoS.
        saved_share: saved_tokens over the window.
        rows: answers measured.
        too_long: those of them that do not fit into the window with their EoS.
    """

    correctness: Interval
    longest_third: Interval
    slack: Interval
    relative_slack: Interval
    difference: Interval
    rmse: Interval
    saved_tokens: Interval
    saved_share: Interval
    rows: int
    too_long: int


def length_measures(
    bounds: Sequence[int] | NDArray,  # [N]
    lengths: Sequence[int] | NDArray,  # [N]
    window: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> LengthMeasures:
    """Measures of bounds on the lengths of answers in a window of so many tokens.

    Intervals are percentiles of a bootstrap over the rows; equal `seed`s and numbers of rows draw the same rows, so
    that rules are compared on the same resamples. They tell how much other answers of the kind would change the
    measure of a rule as it is: which pairs calibrated it counts as given. Where all rows agree (every bound is
    correct), an interval has no width.

    Raises:
        ValueError: no rows, not as many bounds as lengths, a negative length, bounds outside of 0 … window, or fewer
            than 1 resample.
    """
    bounds, lengths = np.asarray(bounds, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    if bounds.ndim != 1 or bounds.shape != lengths.shape or not len(bounds):
        raise ValueError(
            f"bounds: got shape {list(bounds.shape)} with lengths of shape {list(lengths.shape)}; expected [N] of both"
        )
    if bounds.min() < 0 or bounds.max() > window or lengths.min() < 0:
        raise ValueError(
            f"bounds: got {bounds.min()} to {bounds.max()} and lengths from {lengths.min()} on; expected bounds of "
            f"0 to the window, {window}, and lengths of 0 or more"
        )
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}; expected at least 1")
    fits, one = lengths < window, np.ones(len(bounds))
    correct = bounds >= np.minimum(lengths, window)
    tight, surplus = correct & fits, (bounds - lengths).astype(np.float64)
    saved = (window - np.minimum(bounds + 1, window)).astype(np.float64)
    longest = lengths >= np.sort(lengths)[-math.ceil(len(lengths) / 3)]
    ratios = {  # each measure is a sum over the rows divided by another one
        "correctness": (correct, one),
        "longest_third": (correct & longest, longest),
        "slack": (surplus * tight, tight),
        "relative_slack": (surplus * tight, lengths * tight),
        "difference": (surplus * fits, fits),
        "rmse": (surplus**2 * fits, fits),
        "saved_tokens": (saved, one),
        "saved_share": (saved, one * window),
    }
    values = bootstrap_ratios(
        np.array([above for above, _ in ratios.values()], dtype=np.float64),
        np.array([below for _, below in ratios.values()], dtype=np.float64),
        resamples=resamples,
        seed=seed,
    )
    intervals = dict(zip(ratios, values, strict=True))
    of_squares = intervals["rmse"]
    if of_squares.value is not None:
        intervals["rmse"] = Interval(*(math.sqrt(x) for x in (of_squares.value, of_squares.low, of_squares.high)))
    return LengthMeasures(**intervals, rows=len(bounds), too_long=int((~fits).sum()))


def bootstrap_ratios(
    above: NDArray, below: NDArray, *, resamples: int = 1000, seed: int = 0, confidence: float = CONFIDENCE
) -> list[Interval]:
    """K ratios of sums over rows, Σ above / Σ below, with percentile bootstrap intervals (Efron 1979).

    Args:
        above, below: float64 [K, N].
        resamples: resamples of N rows each, drawn with replacement.
        seed: seed of the draws.
        confidence: share of the resamples within an interval.

    A resample whose denominator is 0 says nothing and is left out.
    """
    rows, random = above.shape[1], np.random.default_rng(seed)
    uniform, parts = np.full(rows, 1 / rows), []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        times = random.multinomial(rows, uniform, size=min(_RESAMPLES_AT_ONCE, resamples - start))  # each row is drawn
        parts.append(_ratio(times @ above.T, times @ below.T))
    drawn, values = np.concatenate(parts), _ratio(above.sum(1), below.sum(1))
    intervals = []
    for value, column in zip(values, drawn.T, strict=True):
        if np.isnan(value):
            intervals.append(Interval(None, None, None))
            continue
        column = column[~np.isnan(column)] if not np.isnan(column).all() else np.array([value])
        low, high = np.percentile(column, [50 * (1 - confidence), 50 * (1 + confidence)])
        intervals.append(Interval(float(value), float(low), float(high)))
    return intervals


def _ratio(above: NDArray, below: NDArray) -> NDArray:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
