"""Pictures of length prediction: bounds against true lengths, and how often they are right against what they save."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from fastdiff.files import write_atomically
from fastdiff.visualization.figures import any_names, png_of

# Okabe & Ito's colours, which colour-blind readers tell apart, without their yellow, too light on white; markers tell
# the rules apart without colour
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#7F7F7F", "#8C6D31")
_MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "h")
_RIGHT, _CUT = "#0072B2", "#D55E00"
_COLUMNS = 3


@dataclass(frozen=True)
class BoundsOfRule:
    """A rule's bounds on answers.

    Attributes:
        name: the rule's name.
        bounds, lengths: tokens before the EoS, [N] each.
        note: a line below the name.
    """

    name: str
    bounds: Sequence[int]
    lengths: Sequence[int]
    note: str = ""


@dataclass(frozen=True)
class RuleTradeoff:
    """What a rule's bounds save and how often they are right; shares of 1.

    Attributes:
        name: the rule's name.
        calibrated: (saved, correct) at rising coverage; may be empty.
        chosen: the one of these at the coverage that was asked for.
        published: (saved, correct) with the rule's own number, not calibrated.
    """

    name: str
    calibrated: Sequence[tuple[float, float]]
    chosen: tuple[float, float] | None = None
    published: tuple[float, float] | None = None


@any_names()
def save_length_predictions(rules: Sequence[BoundsOfRule], window: int, path: str | Path, *, title: str = "") -> Path:
    """Writes a PNG with a panel per rule: bound against true length. A dot's area is the number of equal answers.

    Below the diagonal the row has to grow. Bounds above twice the longest length are counted, not drawn.

    Raises ValueError without rules, or for a rule without rows.
    """
    if not rules or any(not len(rule.bounds) or len(rule.bounds) != len(rule.lengths) for rule in rules):
        raise ValueError(f"rules: got {len(rules)}; expected at least one, each with a bound for each length")
    columns = min(_COLUMNS, len(rules))
    rows = -(-len(rules) // columns)
    figure = Figure(figsize=(0.9 + 2.7 * columns, 1.2 + 2.75 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    most = max(_dots(rule)[2].max() for rule in rules)
    right = max(max(rule.lengths) for rule in rules)
    top = min(window, 2 * right)  # bounds far above all lengths would press the others onto the axis
    for axes, rule in zip(panels.flat, rules, strict=False):
        lengths, bounds, counts = _dots(rule)
        cut = bounds < np.minimum(lengths, window)
        beyond = int(counts[bounds > top].sum())
        if beyond:
            axes.text(
                right / 2, 0.97 * top, f"↑ {beyond / counts.sum():.0%} above", ha="center", va="top", fontsize=8.5
            )
        for chosen, colour, alpha in ((~cut, _RIGHT, 0.55), (cut, _CUT, 0.9)):
            area = 4 + 76 * counts[chosen] / most
            axes.scatter(lengths[chosen], bounds[chosen], area, colour, alpha=alpha, linewidths=0)
        axes.plot([0, window], [0, window], color="#444444", linewidth=1, zorder=0)
        axes.set_title(f"{rule.name}\n{rule.note}" if rule.note else rule.name, fontsize=9.5)
        _style(axes)
    for axes in panels.flat[len(rules) :]:
        axes.set_visible(False)
    for column in range(columns):  # the lowest panel of each column has the numbers
        panels[(len(rules) - 1 - column) // columns, column].tick_params(labelbottom=True)
    panels[0, 0].set(xlim=(-0.03 * right, 1.03 * right), ylim=(-0.03 * top, 1.03 * top))
    figure.supxlabel("true length, tokens", fontsize=10)
    figure.supylabel("bound, tokens", fontsize=10)
    handles = [_dot(_RIGHT, "bound ≥ length"), _dot(_CUT, "bound too low: the row has to grow")]
    handles.append(Line2D([], [], color="#444444", linewidth=1, label="bound = length"))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=3 if columns > 1 else 1,
        frameon=False,
        fontsize=9,
        title=title or None,
    )
    return _save(figure, Path(path))


@any_names()
def save_length_tradeoff(
    rules: Sequence[RuleTradeoff], path: str | Path, *, coverage: float, exact: float | None = None, title: str = ""
) -> Path:
    """Writes a PNG: share of correct bounds against share of the window saved. Up and to the right is better.

    Args:
        rules: a line each through its calibrated points, and a hollow marker where its published number lies.
        coverage: the coverage that the filled markers are calibrated for; a dotted line lies there.
        exact: the share that bounds equal to the lengths would save; a vertical line.

    Raises ValueError without rules.
    """
    if not rules:
        raise ValueError("rules: got none; expected at least one")
    figure = Figure(figsize=(8.4, 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(coverage, color="#444444", linewidth=0.9, linestyle=":", zorder=0)
    handles = []
    for index, rule in enumerate(rules):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        width = 2.4 if index == 0 else 1.3
        points = np.array(rule.calibrated, dtype=float).reshape(-1, 2)
        axes.plot(*points.T, color=colour, linewidth=width, zorder=len(rules) - index + 2)
        # the hollow marker is larger and below: both are seen where they meet
        for point, face, size in ((rule.published, "white", 10), (rule.chosen, colour, 6.5)):
            if point is not None:
                style = dict(color=colour, markerfacecolor=face, markersize=size, markeredgewidth=1.4)
                axes.plot(*point, marker, zorder=40 - size, clip_on=False, **style)
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=width, label=rule.name))
    grey = dict(color="#444444", linewidth=0, marker="o", markersize=7)
    handles += [
        Line2D([], [], **grey, label=f"calibrated for {coverage:g}"),
        Line2D([], [], **grey | {"markersize": 10}, markerfacecolor="white", markeredgewidth=1.4, label="as published"),
        Line2D([], [], color="#444444", linewidth=0.9, linestyle=":", label=f"coverage {coverage:g}"),
    ]
    if exact is not None:
        axes.axvline(exact, color="#444444", linewidth=0.9, linestyle="--", zorder=0)
        handles.append(Line2D([], [], color="#444444", linewidth=0.9, linestyle="--", label="true lengths would save"))
    axes.set(xlabel="saved tokens, share of the window", ylabel="correct bounds, share of the answers", title=title)
    drawn = [(exact, coverage)] if exact is not None else []
    for rule in rules:
        drawn += [*rule.calibrated, *(point for point in (rule.chosen, rule.published) if point is not None)]
    (left, low), (right, _) = np.min(drawn, axis=0), np.max(drawn, axis=0)
    margin = 0.04 * max(right - left, 0.2)
    axes.set(xlim=(left - margin, min(right, 1) + margin), ylim=(low - 0.04 * (1.2 - low), 1 + 0.04 * (1.2 - low)))
    axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
    _style(axes)
    axes.title.set_fontsize(10)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return _save(figure, Path(path))


def _dots(rule: BoundsOfRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of length and bound that there is, and how often."""
    pairs, counts = np.unique(np.stack([rule.lengths, rule.bounds]), axis=1, return_counts=True)
    return pairs[0], pairs[1], counts


def _dot(colour: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", linewidth=0, alpha=0.7, label=label)


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not isinstance(axes.xaxis.get_major_formatter(), PercentFormatter):
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _save(figure: Figure, path: Path) -> Path:
    """The whole picture or the one that was there before; 128 colours are plenty, and a third of the bytes."""
    drawn, picture = io.BytesIO(png_of(figure, 130, path)), io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(128).save(picture, format="png", optimize=True)
    write_atomically(path, picture.getvalue())
    return path
