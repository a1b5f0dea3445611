"""Expected against true lengths of answers: what a length head learned."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastdiff.visualization.figures import any_names, save_figure


@any_names()
def save_length_scatter(
    predicted: Sequence[float], lengths: Sequence[int], path: str | Path, *, title: str | None = None
) -> Path:
    """Writes a PNG with a dot an answer: its true length and the expected one; on the line they are equal.

    Args:
        predicted, lengths: numbers of tokens, as many of both.
        path: path of the PNG.
        title: above the picture.

    Raises:
        ValueError: no answers, or not as many of both.
    """
    if not len(lengths) or len(predicted) != len(lengths):
        raise ValueError(
            f"predicted: got {len(predicted)} lengths and {len(lengths)} true ones; expected as many, at least 1"
        )
    most = max(max(predicted), max(lengths), 1)
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.plot([0, most], [0, most], color="#c1542d", linewidth=1.2, label="equal")
    axes.scatter(lengths, predicted, s=14, color="#1f4e8c", alpha=0.35, linewidths=0, label="an answer")
    margin = 0.03 * most
    axes.set(xlim=(-margin, most + margin), ylim=(-margin, most + margin))
    axes.set(xlabel="true length, tokens", ylabel="expected length, tokens")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_title(title or "", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    return save_figure(figure, path)
