"""Tables as CSV files, and pictures of what is in their columns."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastdiff.files import write_atomically
from fastdiff.visualization.figures import REAL, SYNTHETIC, any_names, save_figure, shown

_BINS = 20
_MOST_BARS = 12  # categories with a bar of their own; the rarer ones share one


def save_table_csv(table: Mapping[str, np.ndarray], path: str | Path) -> Path:
    """Writes columns, as `TableSchema.decode` gives them, with a line of names.

    Raises:
        ValueError: no columns, or columns of different lengths.
    """
    rows = _rows(table, "table")
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(table)
    columns = [values.tolist() for values in table.values()]
    writer.writerows([_plain(column[row]) for column in columns] for row in range(rows))
    write_atomically(Path(path), content.getvalue())
    return Path(path)


@any_names()
def save_marginals(
    real: Mapping[str, np.ndarray],
    synthetic: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    columns: int = 4,
    title: str | None = None,
) -> Path:
    """Writes a PNG with a panel per column: histograms of numbers (20 bins, as densities), shares of categories.

    Numbers are drawn over the range of the real ones, widened by a quarter on either side; synthetic ones beyond it are
    counted above the panel. The 11 commonest real categories have bars of their own where there are more than 12.

    Args:
        real, synthetic: columns by name, as `TableSchema.decode` gives them: float [R], or names of categories [R].
        path: path of the PNG.
        columns: panels per row.
        title: above them all.

    Raises:
        ValueError: no rows, or not the same columns.
    """
    if set(real) != set(synthetic) or not _rows(real, "real") or not _rows(synthetic, "synthetic"):
        raise ValueError(
            f"real: got the columns {list(real)} and synthetic {list(synthetic)}; expected the same ones, with rows"
        )
    columns = min(columns, len(real))
    lines = -(-len(real) // columns)
    figure = Figure(figsize=(0.4 + 2.5 * columns, 0.6 + 1.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, name in zip(panels.flat, real, strict=False):
        draw = _draw_categories if real[name].dtype == object else _draw_numbers
        note = draw(axes, real[name], synthetic[name])
        axes.set_title(f"{shown(name)}\n{note}" if note else shown(name), fontsize=8.5)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(real) :]:
        axes.set_visible(False)
    handles = [
        Patch(color=colour, alpha=0.6, label=label)
        for colour, label in ((REAL, f"real ({_rows(real, 'real')} rows)"), (SYNTHETIC, _count(synthetic)))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9, title=title or None)
    return save_figure(figure, path, dpi=110)


def _count(synthetic: Mapping[str, np.ndarray]) -> str:
    return f"synthetic ({_rows(synthetic, 'synthetic')} rows)"


def _rows(table: Mapping[str, np.ndarray], name: str) -> int:
    lengths = {len(values) for values in table.values()}
    if len(lengths) != 1:
        raise ValueError(f"{name}: got columns of {sorted(lengths)} rows; expected at least one, all of one length")
    return lengths.pop()


def _plain(value: object) -> object:
    """3.0 as 3: a CSV file has no types, and the source wrote whole numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _draw_numbers(axes: Axes, real: np.ndarray, synthetic: np.ndarray) -> str:
    low, high = float(real.min()), float(real.max())
    margin = 0.25 * (high - low) or 0.5
    edges = np.linspace(low - margin, high + margin, _BINS + 1)
    for values, colour in ((real, REAL), (synthetic, SYNTHETIC)):
        counts, _ = np.histogram(values, edges)
        density = counts / (len(values) * (edges[1] - edges[0]))
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(density, edges, color=colour, linewidth=1.1)
    axes.set_yticks([])
    axes.set_ylim(bottom=0)
    beyond = int(((synthetic < edges[0]) | (synthetic > edges[-1])).sum())
    return f"{beyond / len(synthetic):.1%} of synthetic beyond" if beyond else ""


def _draw_categories(axes: Axes, real: np.ndarray, synthetic: np.ndarray) -> str:
    names, counts = np.unique(real.astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = [str(name) for name in names[order]]
    others = len(kept) > _MOST_BARS
    kept = kept[: _MOST_BARS - 1] if others else sorted(kept)
    places = np.arange(len(kept) + others)
    for values, colour, side in ((real, REAL, -0.2), (synthetic, SYNTHETIC, 0.2)):
        shares = [float((values.astype(str) == name).mean()) for name in kept]
        shares += [1 - sum(shares)] if others else []
        axes.bar(places + side, shares, 0.4, color=colour, alpha=0.6)
    labels = [shown(name) for name in kept] + (["others"] if others else [])
    steep = sum(map(len, labels)) > 24
    axes.set_xticks(places, labels, rotation=40 if steep else 0, ha="right" if steep else "center")
    axes.yaxis.set_major_formatter("{x:.0%}")
    return ""
