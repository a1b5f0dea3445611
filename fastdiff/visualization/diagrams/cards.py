"""What cards of a diagram have in common: numbers and shapes as texts, heights, and the lines from one to the next."""

import dataclasses
from collections.abc import Mapping

from torch import nn

from fastdiff.visualization.diagrams.anatomy import Shape, Stage
from fastdiff.visualization.diagrams.svg import MUTED, ROLES, Drawing, wrapped
from fastdiff.visualization.diagrams.words import describe

_UNITS = ((10**3, "K"), (10**6, "M"), (10**9, "B"), (10**12, "T"))
STACK = 4  # offset of the cards of a stack, in pixels


def number(count: int) -> str:
    """A number of parameters: "1 408", "49.4 K", "1.78 M"."""
    if count < 10_000:
        return f"{count:,}".replace(",", " ")
    size, unit = next(each for each in _UNITS if count < 999.5 * each[0])
    return f"{count / size:.3g} {unit}"


def shape_text(shape: Shape | None, sizes: Mapping[int, str]) -> str:
    """ "B × 49 × 128": the first number is the batch; `sizes` names others that are free."""
    if not shape:
        return ""
    names = [sizes.get(size, str(size)) if index == 1 and len(shape) < 4 else str(size)
             for index, size in enumerate(shape)]  # fmt: skip
    return " × ".join(["B", *names[1:]])


@dataclasses.dataclass
class Placed:
    """A stage as it was drawn: its card's place, in pixels."""

    stage: Stage
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


class Flow:
    """The line from one box to the next: it leaves with a shape written beside it, and arrives with an arrowhead."""

    def __init__(self, drawing: Drawing, middle: float) -> None:
        self.drawing, self.middle, self.points, self.text, self.lower = drawing, middle, [], "", 17.0

    def leave(self, y: float, text: str, lower: float = 17.0) -> "Flow":
        self.points, self.text, self.lower = [(self.middle, y)], text, lower
        return self

    def move(self, middle: float) -> None:
        """Goes down elsewhere, within the same box."""
        self.middle, self.points = middle, [(middle, y) for _, y in self.points]

    def stop(self, text: str) -> None:
        """Goes no further: what follows is another way."""
        ((x, y), *_), self.points = self.points, []
        self.drawing.text(x, y + self.lower, text, size=12, color=MUTED, anchor="middle", italic=True)
        self.drawing.text(x + 16, y + self.lower, self.text, size=11, color=MUTED)

    def turn(self, before: Placed, foot: float, between: float, head: float) -> None:
        """Comes from the last box of the column before, and arrives from above."""
        x, y = before.middle, before.y + before.height
        self.points = [(x, y), (x, foot), (between, foot), (between, head), (self.middle, head)]

    def arrive(self, y: float) -> None:
        if self.points:
            self.drawing.line([*self.points, (self.middle, y - 1)], arrow=True)
            (x, start), self.points = self.points[0], []
            self.drawing.text(x + 10, start + (self.lower if y - start > 30 else 13), self.text, size=11, color=MUTED)


def shares_of(module: nn.Module) -> dict[str, int]:
    """A block's parameters by the role of what they serve, in the order of `ROLES`."""
    found: dict[str, int] = {}

    def count(part: nn.Module, name: str) -> None:
        words = describe(part, name)
        if words.role == "plain" and list(part.children()):
            for child_name, child in part.named_children():
                count(child, child_name)
            own = sum(p.numel() for p in part.parameters(recurse=False))
            found["head"] = found.get("head", 0) + own
            return
        found[words.role] = found.get(words.role, 0) + sum(p.numel() for p in part.parameters())

    for name, child in module.named_children():
        count(child, name)
    return {role: found[role] for role in ROLES if found.get(role)}


def stage_shares(stage: Stage) -> dict[str, int]:
    """`shares_of` a stage that is a block of several kinds of parts; {} of another."""
    if stage.words.role != "plain" or stage.module is None:
        return {}
    shares = shares_of(stage.module)
    return shares if len(shares) > 1 else {}


def tooltip(stage: Stage) -> str:
    kind = "parameters" if stage.module is None else type(stage.module).__name__
    several = f" × {stage.count}" if stage.count > 1 else ""
    return f"{stage.path}: {kind}{several}, {stage.parameters:,} parameters"


def detail_lines(stage: Stage, width: float) -> list[str]:
    return wrapped(stage.words.detail, width - 28, 11.5)[:2] if stage.words.detail else []


def card_height(stage: Stage, width: float) -> float:
    """Of a stage's (upper) card."""
    lines = len(detail_lines(stage, width))
    return (
        42 + 17 * lines + (14 if stage_shares(stage) else 0) + (16 if stage.each is not None else 0) - (lines > 0) * 2
    )
