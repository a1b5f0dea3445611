"""The loss of a run over its steps."""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fastdiff.visualization.figures import any_names, save_figure


@any_names()
def save_loss_curve(
    metrics: str | Path, path: str | Path, *, decay: float | None = None, validation: str | Path | None = None
) -> Path:
    """Writes a PNG with the loss of every step, its moving average, and the validation bound where there is one.

    Args:
        metrics: a run's metrics.jsonl.
        path: path of the PNG.
        decay: decay of the moving average; None takes one that fits the number of steps.
        validation: a run's validation.jsonl; its nats_per_token are drawn with their standard error, else its loss.

    Raises:
        ValueError: the file has no steps.
    """
    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    if not lines:
        raise ValueError(f"{metrics} has no steps; expected a run of fastdiff.train")
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    smooth = moving_average(losses, 1 - 1 / max(5.0, min(200.0, len(losses) / 30)) if decay is None else decay)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.7, label="each step")
    axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label="moving average")
    axes.set(xlabel="step", ylabel="loss", title=f"training loss, {smooth[-1]:.4f} at step {steps[-1]}")
    if validation is not None and Path(validation).exists():
        measures = [json.loads(line) for line in Path(validation).read_text().splitlines()]
        style = dict(color="#c1542d", marker="o", markersize=4, linewidth=1.2, capsize=2)
        names = [name for name in (measures[0] if measures else ()) if name != "step"]
        if names:
            name = "loss" if "loss" in names else names[0]
            errors = [line["standard_error"] for line in measures] if "standard_error" in names else None
            measured = [line["step"] for line in measures], [line[name] for line in measures]
            axes.errorbar(*measured, errors, label=f"held-out {name.replace('_', ' ')}", **style)
    if min(losses) > 0 and max(losses) > 4 * min(smooth):  # the first steps would flatten the rest of a linear axis
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    return save_figure(figure, path)


def moving_average(values: list[float], decay: float) -> list[float]:
    """Exponential moving average, over few values at first and over 1 / (1 - decay) later on."""
    smooth, average = [], 0.0
    for index, value in enumerate(values):
        weight = max(1 - decay, 4 / (4 + index))
        average += weight * (value - average)
        smooth.append(average)
    return smooth
