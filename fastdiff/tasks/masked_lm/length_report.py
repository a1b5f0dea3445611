"""The report on length rules: a table, JSON and two pictures."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.evaluation.length import CONFIDENCE, Interval, LengthMeasures
from fastdiff.evaluation.length_comparison import RuleComparison
from fastdiff.generation.length.rules import CURVE_RULES, LOWEST_THRESHOLD
from fastdiff.visualization.lengths import BoundsOfRule, RuleTradeoff, save_length_predictions, save_length_tradeoff

PICTURES = ("length_predictions.png", "length_tradeoff.png")
_HEADER = (
    "rule", "bounds", "threshold", "correct", "longest third", "slack, tokens", "slack / length",
    "bound − length, tokens", "RMSE, tokens", "saved tokens", "saved share", "passes a row", "answers",
)  # fmt: skip
_BRIEF = [_HEADER.index(name) for name in ("rule", "bounds", "correct", "slack, tokens", "saved share", "answers")]


@dataclass(frozen=True, eq=False)
class LengthReport:
    """The rules' numbers as JSON, as a table and as pictures."""

    rules: Sequence[RuleComparison]
    window: int
    length_format: str
    coverage: float
    calibration_pairs: int
    seed: int
    resamples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is infinite or not defined is None."""
        lengths = self._lengths()
        rules = []
        for rule in self.rules:
            for kind, threshold, measures in _rows(rule):
                rules.append({
                    "rule": rule.rule,
                    "bounds": kind,
                    "threshold": threshold if np.isfinite(threshold) else None,
                    "threshold_means": describe_threshold(rule.rule, threshold),
                    "calibration_pairs": rule.calibration.num_pairs if kind == "calibrated" else 0,
                    "forward_passes_a_row": rule.passes,
                    **dataclasses.asdict(measures),
                })  # fmt: skip
        names = ("coverage", "saved_share", "correctness")
        tradeoff = {rule.rule: [dict(zip(names, point, strict=True)) for point in rule.tradeoff] for rule in self.rules}
        return {
            "window": self.window,
            "length_format": self.length_format,
            "coverage": self.coverage,
            "seed": self.seed,
            "calibration_pairs": self.calibration_pairs,
            "test_pairs": len(lengths),
            "too_long": int((lengths >= self.window).sum()),
            "mean_length": float(lengths.mean()),
            "confidence_of_intervals": CONFIDENCE,
            "resamples": self.resamples,
            "rules": rules,
            "tradeoff": tradeoff,
        }

    def to_markdown(self, brief: bool = False) -> str:
        """A line for each rule and kind of bounds, with intervals in brackets; `brief` fits into a terminal."""
        lengths = self._lengths()
        table = [_HEADER, ("---", "---") + ("---:",) * (len(_HEADER) - 2)]
        rows = [(rule, *row) for rule in self.rules for row in _rows(rule)]
        for rule, kind, threshold, measures in sorted(rows, key=lambda row: row[1]):  # stable: calibrated, published
            table.append((
                rule.rule, kind, describe_threshold(rule.rule, threshold),
                _percent(measures.correctness), _percent(measures.longest_third),
                _number(measures.slack), _percent(measures.relative_slack), _number(measures.difference),
                _number(measures.rmse), _number(measures.saved_tokens), _percent(measures.saved_share),
                f"{rule.passes:.3g}", str(measures.rows),
            ))  # fmt: skip
        told = (
            f"{len(lengths)} held-out answers, mean length {lengths.mean():.1f} tokens, in a window of {self.window} "
            f"tokens ({self.length_format}); {int((lengths >= self.window).sum())} do not fit with their EoS. "
            f"{self.calibration_pairs} other held-out pairs calibrated the rules for a coverage of {self.coverage:g} "
            "(split conformal prediction); published: with the rule's own number. In brackets: 95 % bootstrap "
            "intervals. correct: bound ≥ length, or nothing cropped; slack: mean of bound − length where the bound is "
            "correct; saved: of the window, by wrong bounds, too, whose rows grow again when decoded."
        )
        if brief:
            table = [[row[column] for column in _BRIEF] for row in table]
        return "\n".join([told, "", *("| " + " | ".join(row) + " |" for row in table)])

    def save_pictures(self, folder: Path) -> None:
        """Writes length_predictions.png and length_tradeoff.png."""
        lengths = self._lengths()
        panels, curves = [], []
        for rule in self.rules:
            measures, published = rule.calibrated, rule.published
            slack = "" if measures.slack.value is None else f", slack {measures.slack.value:.1f}"
            fewer = f", {measures.rows} answers" if measures.rows < len(lengths) else ""
            note = f"correct {measures.correctness.value:.1%}{slack}{fewer}"
            panels.append(BoundsOfRule(rule.rule, rule.bounds, rule.lengths, note))
            points = [(saved, correct) for _, saved, correct in rule.tradeoff]
            curves.append(RuleTradeoff(rule.rule, points, _point(measures), published and _point(published)))
        about = f"{len(lengths)} held-out answers, window {self.window} tokens"
        title = f"bounds calibrated for coverage {self.coverage:g}; {about}"
        save_length_predictions(panels, self.window, folder / PICTURES[0], title=title)
        exact = float((self.window - np.minimum(lengths + 1, self.window)).mean() / self.window)
        path = folder / PICTURES[1]
        save_length_tradeoff(curves, path, coverage=self.coverage, exact=exact, title=about)

    def _lengths(self) -> np.ndarray:
        """The lengths of all test answers: those of a rule that was not measured on fewer."""
        return np.array(max((rule.lengths for rule in self.rules), key=len))


def _rows(rule: RuleComparison) -> list[tuple[str, float, LengthMeasures]]:
    rows = [("calibrated", rule.threshold, rule.calibrated)]
    return rows if rule.published is None else [*rows, ("published", rule.published_threshold, rule.published)]


def _point(measures: LengthMeasures) -> tuple[float, float]:
    return measures.saved_share.value, measures.correctness.value


def _number(interval: Interval) -> str:
    return "–" if interval.value is None else f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _percent(interval: Interval) -> str:
    if interval.value is None:
        return "–"
    return f"{interval.value:.1%} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def describe_threshold(rule: str, threshold: float) -> str:
    """A rule's threshold for people: where its curve has to be, or the tokens added to its prediction."""
    if math.isinf(threshold):
        return "whole window"
    if rule not in CURVE_RULES:
        return f"{threshold + 0.0:+g} tokens"  # - 0.0 is "-0"
    above = math.exp(-max(threshold, LOWEST_THRESHOLD))  # 1 - F
    return f"F > {1 - above:.4f}" if above >= 1e-3 else f"F > 1 - {above:.1e}"
