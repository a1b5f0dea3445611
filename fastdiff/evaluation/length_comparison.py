"""Every rule of `fastdiff.generation.length` on the same pairs: one half calibrates it, the other half measures it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.evaluation.length import LengthMeasures, length_measures
from fastdiff.generation.length import rules as length_rules
from fastdiff.generation.length.calibration import Calibration, pairs_needed
from fastdiff.generation.length.conformal import calibration_of
from fastdiff.generation.length.predictor import LengthPredictor
from fastdiff.generation.length.probe import prompt_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pair = tuple[Sequence[int], Sequence[int]]  # ids of the prompt, and of the answer without EoS
# coverage of a curve's points; the pairs may be too few for the last ones
LEVELS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99)


@dataclass(frozen=True, eq=False)
class RuleReadings:
    """What a rule reads off the first pass of each pair's prompt, all on the CPU.

    Attributes:
        predictor: the rule.
        readings: float64, levels `[N, W]` of a curve or predicted lengths `[N]`; see `LengthPrediction.reading`.
        lengths: int64 `[N]`, of the answers, in tokens before the EoS.
        passes: int64 `[N]`, forward passes that each row went through.
    """

    predictor: LengthPredictor
    readings: Tensor
    lengths: Tensor
    passes: Tensor

    def bounds(self, threshold: float) -> list[int]:
        """The bound of each row from a threshold: a level of the curve, or tokens added to the prediction."""
        predictor = self.predictor
        return length_rules.bounds(predictor.rule, self.readings, threshold, predictor.window).tolist()

    def scores(self) -> Tensor:  # float64 [N]
        """Conformal scores of the answers' lengths."""
        return length_rules.scores(self.predictor.rule, self.readings, self.lengths, self.predictor.window)

    def measures(self, threshold: float, **options: int) -> LengthMeasures:
        """`length_measures` of these bounds, with its options."""
        return length_measures(self.bounds(threshold), self.lengths.numpy(), self.predictor.window, **options)

    def split(self, first: int) -> "tuple[RuleReadings, RuleReadings]":
        """The first rows and the others."""
        parts = (t.tensor_split([first]) for t in (self.readings, self.lengths, self.passes))
        return tuple(RuleReadings(self.predictor, *part) for part in zip(*parts, strict=True))


@dataclass(frozen=True, eq=False)
class RuleComparison:
    """A rule on the test pairs.

    Attributes:
        rule: its name.
        calibration: what the calibration pairs gave.
        threshold: threshold of `calibration` at the coverage that was asked for.
        bounds, lengths: bounds by that threshold and true lengths of the test pairs, in tokens.
        calibrated: what these bounds are worth.
        published_threshold, published: the rule with its own number, uncalibrated; None for "constant", which has none.
        tradeoff: (coverage, saved share, correctness) on the test pairs, at rising coverage.
        passes: mean forward passes a row.
    """

    rule: str
    calibration: Calibration
    threshold: float
    bounds: list[int]
    lengths: list[int]
    calibrated: LengthMeasures
    published_threshold: float | None
    published: LengthMeasures | None
    tradeoff: list[tuple[float, float, float]]
    passes: float


@torch.no_grad()
def read_rules(
    predictors: Sequence[LengthPredictor], pairs: Sequence[Pair], *, batch_size: int = 32, progress: bool = False
) -> list[RuleReadings]:
    """What each predictor reads off each pair's prompt, in the order of the pairs.

    All rules of one pass share it (two passes in the format "pad_fill", where "argmax" has other end tokens). "daedal"
    and "rho" make passes of their own.

    Args:
        predictors: predictors of one model and window, one per rule.
        batch_size: prompts per forward pass.
        progress: shows a bar.

    Raises what `LengthPredictor.probe` raises.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # prompts of like lengths together
    readings: list[list[Tensor]] = [[] for _ in predictors]
    names = " and ".join(p.rule for p in predictors) if len(predictors) < 3 else f"{len(predictors)} rules"
    with tqdm(total=len(pairs), unit="pair", desc=f"probing, {names}", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = prompt_inputs(predictors[0].model, [pairs[i][0] for i in rows])
            probes = {}
            for predictor, parts in zip(predictors, readings, strict=True):
                if predictor.rule in length_rules.EXPANSION_RULES:
                    reading = predictor(**inputs).reading
                else:
                    if predictor.end_token_ids not in probes:
                        probes[predictor.end_token_ids] = predictor.probe(**inputs)
                    reading = predictor.read(probes[predictor.end_token_ids])
                parts.append(reading.cpu())
            bar.update(len(rows))
    back = torch.tensor(order).argsort()
    lengths = torch.tensor([len(answer) for _, answer in pairs])
    whole = [torch.cat(parts)[back] for parts in readings]
    return [
        RuleReadings(predictor, reading, lengths, _passes(predictor, reading))
        for predictor, reading in zip(predictors, whole, strict=True)
    ]


def compare_rule(
    readings: RuleReadings,
    calibration_pairs: int,
    coverage: float,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> RuleComparison:
    """Calibrates a rule on the first pairs and measures it on the others, with and without the calibration.

    Raises ValueError where the first pairs are too few for the coverage, or none is left.
    """
    first, test = readings.split(calibration_pairs)
    predictor = readings.predictor
    calibration = calibration_of(predictor, first.scores().tolist(), tokenizer)
    threshold, tradeoff = calibration.threshold(coverage), []
    options = {"resamples": resamples, "seed": seed}
    for level in sorted({*LEVELS, coverage}):
        if pairs_needed(level) <= calibration_pairs:
            at_level = test.measures(calibration.threshold(level), resamples=1)
            tradeoff.append((level, at_level.saved_share.value, at_level.correctness.value))
    own = None if predictor.rule == "constant" else predictor.threshold
    return RuleComparison(
        rule=predictor.rule,
        calibration=calibration,
        threshold=threshold,
        bounds=test.bounds(threshold),
        lengths=test.lengths.tolist(),
        calibrated=test.measures(threshold, **options),
        published_threshold=own,
        published=None if own is None else test.measures(own, **options),
        tradeoff=tradeoff,
        passes=float(test.passes.double().mean()),
    )


def _passes(predictor: LengthPredictor, reading: Tensor) -> Tensor:  # int64 [N]
    """Forward passes that each row goes through; with the expanding rules, one per window until it stays."""
    if predictor.rule == "constant":
        return torch.zeros(len(reading), dtype=torch.int64)
    if predictor.rule not in length_rules.EXPANSION_RULES:
        return torch.ones(len(reading), dtype=torch.int64)
    way = (reading + 1 - min(length_rules.EXPANSION_START, predictor.window)).abs()
    return (way / length_rules.EXPANSION_STEP).ceil().long() + 1
