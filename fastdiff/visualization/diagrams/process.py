"""The diffusion process: what is noised or masked, the schedule's curve, and the steps of the sampler."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.masked import MaskedDiffusion, MaskedDiffusionConfig
from fastdiff.visualization.diagrams.svg import (
    FAINT,
    INK,
    LINE,
    MUTED,
    PAPER,
    ROLES,
    Drawing,
    fitted,
    text_width,
    wrapped,
)

_WIDTH, _EDGE, _TILE, _TILES = 880, 36, 124, 5
_CHART, _HIGH = (372, 190), 64  # width and height of a chart; points of a curve
_COLORS = ("#2b6cb0", "#c05621", "#6b46c1")
_PICTURE = (  # a clean sample: 12 x 12 pixels, dark on light
    "............", "...######...", "..#......#..", ".#........#.", ".#..#..#..#.", ".#........#.", ".#........#.",
    ".#.#....#.#.", ".#..####..#.", "..#......#..", "...######...", "............",
)  # fmt: skip
_TEXT = (("the", "quick"), ("brown", "fox"), ("jumps", "over"), ("the", "lazy", "dog"))
_PREDICTIONS = {
    "epsilon": "the noise", "sample": "the clean sample", "v_prediction": "the velocity α·noise − σ·sample",
    "flow": "the velocity noise − sample",
}  # fmt: skip
_RATES = {
    "linear": "r(t) = t", "cosine": "r(t) = 1 − cos(πt/2)", "maskgit_cosine": "r(t) = sin(πt/2)",
    "polynomial": "r(t) = t^{exponent:g}",
}  # fmt: skip


@dataclass(frozen=True)
class Process:
    """What there is to draw of a diffusion process.

    Attributes:
        corrupts: "noise" or "masks".
        times: rising from 0 (clean) to 1 (noise, or all masks).
        curves: by name, a number in [0, 1] for each of the times.
        density: how often training draws times, over equal parts of [0, 1]; () where all are equally likely.
        left: the share of noise, or of masks, before each step of sampling and after the last, where that is known
            before sampling; else ().
        training, sampling: facts, one a line.
        axis: what the times are.
    """

    corrupts: str
    times: Sequence[float]
    curves: Mapping[str, Sequence[float]]
    density: Sequence[float] = ()
    left: Sequence[float] = ()
    training: Sequence[str] = field(default_factory=tuple)
    sampling: Sequence[str] = field(default_factory=tuple)
    axis: str = "t"

    def at(self, name: str, time: float) -> float:
        """A curve's value at the nearest of the times."""
        index = min(range(len(self.times)), key=lambda n: abs(self.times[n] - time))
        return self.curves[name][index]


def noise_process(diffusion: Diffusion, left: Sequence[float] = (), sampling: Sequence[str] = ()) -> Process:
    """The process of a Gaussian diffusion: α(t), σ(t), and the times that training draws.

    Args:
        diffusion: the process.
        left: the share of noise before each step, and after the last.
        sampling: facts about it.
    """
    config = diffusion.config
    if config.is_discrete:
        total = config.num_train_timesteps
        t = torch.linspace(0, total - 1, min(_HIGH, total)).round().long()
        times = diffusion.noise_share(t)
    else:
        t = times = torch.linspace(0, 1, _HIGH + 1)
    alpha, sigma = diffusion.alpha_sigma(t)
    density: list[float] = []
    if not config.is_discrete and config.noise_levels != "uniform":
        drawn = diffusion.sample_times(1 << 16, torch.Generator().manual_seed(0))
        density = (torch.histc(drawn, 48, 0, 1) / len(drawn) * 48).tolist()
    names = {"logit_normal": f"logit-normal, mean {config.logit_normal_mean:g}, deviation {config.logit_normal_std:g}",
             "beta": f"Beta({config.beta_a:g}, {config.beta_b:g})", "uniform": "uniform"}  # fmt: skip
    if config.is_discrete:
        levels_text = f"{config.num_train_timesteps} levels, {config.noise_levels.replace('_', ' ')}"
    else:
        levels_text = f"t drawn: {names[config.noise_levels]}"
    predicts = f"the model predicts {_PREDICTIONS[config.prediction_type]}"
    training = ("noisy sample = α(t)·sample + σ(t)·noise", predicts, levels_text)
    curves = {"α": alpha.tolist(), "σ": sigma.tolist()}
    axis = f"level / {config.num_train_timesteps}" if config.is_discrete else "t"
    return Process("noise", times.tolist(), curves, density, list(left), training, list(sampling), axis)


def mask_process(config: MaskedDiffusionConfig, left: Sequence[float] = (), sampling: Sequence[str] = ()) -> Process:
    """The process of a masked diffusion: its mask rate. Arguments as of `noise_process`."""
    process, times = MaskedDiffusion(config, 0), torch.linspace(0, 1, _HIGH + 1)
    weight = "r′(t) / r(t), a bound on the likelihood" if config.weighting == "elbo" else "1"
    training = (
        f"each token is masked with probability {_RATES[config.schedule].format(exponent=config.exponent)}",
        "the model predicts the tokens behind the masks",
        f"weight of a masked token's loss: {weight}",
    )
    return Process("masks", times.tolist(), {"r": process.mask_rate(times).tolist()}, (), list(left), training,
                   list(sampling))  # fmt: skip


def draw_process(process: Process, *, title: str, subtitle: str) -> str:
    """The SVG of a process. `title` and `subtitle` stand above."""
    noises = process.corrupts == "noise"
    what = "noise" if noises else "masks"
    about = f"Training adds {what}; sampling removes it. {'. '.join((*process.training, *process.sampling))}."
    drawing = Drawing(f"{title}: the diffusion process", about)
    drawing.text(_EDGE, 34, fitted(f"{title}: the diffusion process", _WIDTH - 2 * _EDGE, 20, True), size=20, bold=True)
    drawing.text(_EDGE, 58, fitted(subtitle, _WIDTH - 2 * _EDGE, 12.5), size=12.5, color=MUTED)
    y = _strip(drawing, process, 92)
    left, right = _EDGE, _WIDTH - _EDGE - _CHART[0]
    _schedule(drawing, process, left, y + 30)
    _sampling(drawing, process, right, y + 30)
    y += 30 + 24 + _CHART[1] + 46
    bottoms = [y]
    for x, facts in ((left, process.training), (right, process.sampling)):
        line = y
        for fact in facts:
            drawing.circle(x + 3, line, 2, fill=FAINT, stroke=FAINT)
            for text in wrapped(fact, _CHART[0] - 14, 12):
                drawing.text(x + 13, line, text, size=12, color=INK)
                line += 17
            line += 3
        bottoms.append(line)
    return drawing.svg(_WIDTH, max(bottoms) + 18)


def _strip(drawing: Drawing, process: Process, y: float) -> float:
    """A sample as it is noised, from left to right; gives the lower edge."""
    gap = (_WIDTH - 2 * _EDGE - _TILES * _TILE) / (_TILES - 1)
    noises, blue, orange = process.corrupts == "noise", ROLES["attention"][1], ROLES["condition"][1]
    first, last = _EDGE + _TILE / 2, _WIDTH - _EDGE - _TILE / 2
    adds = "training adds noise" if noises else "training masks tokens"
    drawing.line([(first, y + 8), (last, y + 8)], color=orange, arrow=True)
    _on_line(drawing, (first + last) / 2, y + 8, adds, orange)
    top = y + 26
    for index in range(_TILES):
        time, x = index / (_TILES - 1), _EDGE + index * (_TILE + gap)
        drawing.rect(x, top, _TILE, _TILE, fill="#fafbfc", stroke=FAINT, radius=8)
        if noises:
            alpha, sigma = process.at("α", time), process.at("σ", time)
            _pixels(drawing, x + 8, top + 8, (_TILE - 16) / 12, alpha, sigma)
            said = f"α {alpha:.2f} · σ {sigma:.2f}"
        else:
            rate = process.at("r", time)
            _tokens(drawing, x, top, rate)
            said = f"{rate:.0%} masked"
        drawing.text(x + _TILE / 2, top + _TILE + 14, f"{process.axis} = {time:g}", size=12, anchor="middle")
        drawing.text(x + _TILE / 2, top + _TILE + 31, said, size=11, color=MUTED, anchor="middle")
    low = top + _TILE + 56
    drawing.line([(last, low), (first, low)], color=blue, arrow=True)
    _on_line(drawing, (first + last) / 2, low, "sampling: the model removes noise" if noises
             else "decoding: the model fills the masks", blue)  # fmt: skip
    return low + 10


def _on_line(drawing: Drawing, middle: float, y: float, text: str, color: str) -> None:
    wide = text_width(text, 12) + 18
    drawing.rect(middle - wide / 2, y - 10, wide, 20, fill=PAPER, radius=0)
    drawing.text(middle, y, text, size=12, color=color, anchor="middle")


def _pixels(drawing: Drawing, x: float, y: float, side: float, alpha: float, sigma: float) -> None:
    """The picture, α times, with σ times noise that is the same at all times; values as greys."""
    draw, shades = random.Random(1), {}
    for row, line in enumerate(_PICTURE):
        for column, mark in enumerate(line):
            value = alpha * (-1 if mark == "#" else 1) + sigma * draw.gauss(0, 1)
            shade = round((min(max(value, -1), 1) + 1) / 2 * 12)
            shades.setdefault(shade, []).append((x + column * side, y + row * side))
    for shade, corners in sorted(shades.items()):
        channels = (round(low + shade / 12 * (252 - low)) for low in (31, 41, 51))
        drawing.squares(corners, side, fill="#" + "".join(f"{channel:02x}" for channel in channels))


def _tokens(drawing: Drawing, x: float, y: float, rate: float) -> None:
    """A sentence, whose tokens are masked in an order that is the same at all times."""
    words = [word for line in _TEXT for word in line]
    order = random.Random(4).sample(range(len(words)), len(words))
    masked, index = set(order[: round(rate * len(words))]), 0
    for row, line in enumerate(_TEXT):
        left = x + 9
        for word in line:
            wide = text_width(word, 10.5) + 10
            hidden = index in masked
            drawing.rect(left, y + 12 + 27 * row, wide, 20, radius=5, line=1,
                         fill=ROLES["mlp"][1] if hidden else ROLES["mlp"][0], stroke=ROLES["mlp"][1])  # fmt: skip
            if not hidden:
                drawing.text(left + wide / 2, y + 22 + 27 * row, word, size=10.5, anchor="middle")
            left, index = left + wide + 4, index + 1


def _schedule(drawing: Drawing, process: Process, x: float, y: float) -> None:
    """The curves over time, and how often training draws each time."""
    noises = process.corrupts == "noise"
    drawing.text(x, y, "noise schedule" if noises else "mask rate", size=13.5, bold=True)
    place = _axes(drawing, x, y + 20, process.axis, ("0", "1"))
    if process.density:
        most, count = max(process.density), len(process.density)
        points = [place(n / count + step / count, each / most * 0.9) for n, each in enumerate(process.density)
                  for step in (0, 1)]  # fmt: skip
        drawing.area([place(0, 0), *points, place(1, 0)], fill=ROLES["embed"][0])
        drawing.text(x + _CHART[0] - 4, y + 12, "■", size=11, color="#9fd8b8", anchor="end")
        drawing.text(x + _CHART[0] - 18, y + 12, "times that training draws", size=11, color=MUTED, anchor="end")
    colors = _COLORS if noises else _COLORS[2:]
    for (name, values), color in zip(process.curves.items(), colors, strict=False):
        points = [place(*pair) for pair in zip(process.times, values, strict=True)]
        drawing.line(points, color=color, width=2.2, radius=0)
        index = round(len(values) * (0.16 if values[0] > 0.5 else 0.84))
        at_x, at_y = place(process.times[index], values[index])
        drawing.text(at_x + (12 if values[0] > 0.5 else -12), at_y - 11, f"{name}(t)", size=13, color=color, bold=True,
                     anchor="middle")  # fmt: skip


def _sampling(drawing: Drawing, process: Process, x: float, y: float) -> None:
    """What is left before each step."""
    what = "noise" if process.corrupts == "noise" else "masks"
    drawing.text(x, y, f"sampling: {what} left", size=13.5, bold=True)
    steps = len(process.left) - 1
    place = _axes(drawing, x, y + 20, "step", ("0", str(max(steps, 0)) if steps > 0 else ""))
    if steps < 1:
        drawing.text(x + _CHART[0] / 2, y + 20 + _CHART[1] / 4, "as many steps as the rule needs", size=12, color=MUTED,
                     anchor="middle")  # fmt: skip
        return
    points = [(index / steps, each) for index, each in enumerate(process.left)]
    stairs = [points[0]]
    for before, after in pairwise(points):
        stairs += [(after[0], before[1]), after]
    drawing.area([place(0, 0), *(place(*point) for point in stairs), place(1, 0)], fill=ROLES["attention"][0])
    drawing.line([place(*point) for point in stairs], color=_COLORS[0], width=1.6, radius=0)
    if steps <= 50:
        for point in points:
            drawing.circle(*place(*point), 2.6, fill=PAPER, stroke=_COLORS[0])


def _axes(drawing: Drawing, x: float, y: float, name: str, ends: tuple[str, str]):
    """Draws axes from 0 to 1; gives the function from these to pixels."""
    (width, height), left = _CHART, x + 26
    for share in (0, 0.5, 1):
        level = y + height - share * height
        drawing.line([(left, level), (x + width, level)], color="#e4e9ee" if share else LINE, width=1)
        drawing.text(left - 6, level, f"{share:g}", size=11, color=MUTED, anchor="end")
    drawing.text(left, y + height + 14, ends[0], size=11, color=MUTED, anchor="middle")
    drawing.text(x + width, y + height + 14, ends[1], size=11, color=MUTED, anchor="end")
    drawing.text((left + x + width) / 2, y + height + 14, name, size=11, color=MUTED, anchor="middle")
    return lambda across, up: (left + across * (x + width - left), y + height - up * height)
