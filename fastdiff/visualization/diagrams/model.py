"""A whole model as a column of stages, with what conditions it beside."""

import itertools
from collections.abc import Mapping, Sequence

from torch import nn

from fastdiff.visualization.diagrams.anatomy import Stage, Trace, stages_of
from fastdiff.visualization.diagrams.cards import (
    STACK,
    Flow,
    Placed,
    card_height,
    detail_lines,
    number,
    shape_text,
    stage_shares,
    tooltip,
)
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
from fastdiff.visualization.diagrams.words import describe

_MAIN, _SIDE, _BETWEEN, _EDGE, _HEADER = 330, 280, 78, 36, 92  # widths of the columns, their distance, margins
_GAP, _PILL = 36, 30  # between boxes; height of inputs and outputs
_LONGEST = 12  # stages of a column; more are put into two, where the model has sections
_ROLE_WORDS = {
    "attention": "attention", "cross": "cross-attention", "mlp": "MLP", "modulation": "adaLN", "norm": "norms",
    "conv": "convolutions", "head": "linear", "embed": "embeddings",
}  # fmt: skip
_INPUTS = {
    "Patches to tokens": "noisy sample", "Convolutional stem": "noisy sample", "Token embedding": "token ids",
    "First convolution": "image", "QFormer block": "queries",
}  # fmt: skip


def draw_model(model: nn.Module, trace: Trace, sizes: Mapping[int, str], *, title: str, subtitle: str) -> str:
    """The SVG of a model: its stages from top to bottom, with parameters and the shapes that flow between them.

    Args:
        model: any module.
        trace: of one call; an empty one gives no shapes, and the order in which modules were registered.
        sizes: names of numbers that are free, such as {13: "L"} for the length of a text.
        title, subtitle: above.
    """
    stages = stages_of(model, trace)
    total = sum(stage.parameters for stage in stages)
    about = f"{total:,} parameters in {len(stages)} stages: " + ", ".join(
        f"{stage.words.title}{f' × {stage.count}' if stage.count > 1 else ''}" for stage in stages
    )
    return _Sheet(Drawing(f"{title}: the model", about), model, trace, sizes, stages).draw(title, subtitle, total)


class _Sheet:
    """The layout of one model."""

    def __init__(
        self, drawing: Drawing, model: nn.Module, trace: Trace, sizes: Mapping[int, str], stages: Sequence[Stage]
    ) -> None:
        self.drawing, self.model, self.trace, self.sizes = drawing, model, trace, sizes
        self.main = [stage for stage in stages if not stage.beside]
        self.side = _groups([stage for stage in stages if stage.beside])
        self.context = self._context()
        self.framed = self._framed()
        self.roles: set[str] = set()
        self.foot = 0.0  # of the column before

    def draw(self, title: str, subtitle: str, total: int) -> str:
        drawing = self.drawing
        columns = _columns(self.main)
        left = _EDGE + (_SIDE + _BETWEEN if self.side or self.context else 0)
        width = left + len(columns) * (_MAIN + _BETWEEN) - _BETWEEN + _EDGE
        bottoms, placed = [], []
        for index, column in enumerate(columns):
            x = left + index * (_MAIN + _BETWEEN)
            bottoms.append(self._column(column, x, placed, index, index == len(columns) - 1))
        bottoms.append(self._beside(placed))
        bottom = max(bottoms)
        drawing.text(_EDGE, 34, fitted(title, width - 2 * _EDGE, 20, bold=True), size=20, bold=True)
        parameters = f"{total:,} parameters".replace(",", " ")
        about = f"{parameters} · {subtitle}" if subtitle else parameters
        for line, text in enumerate(wrapped(about, width - 2 * _EDGE, 12.5)[:2]):
            drawing.text(_EDGE, 58 + 17 * line, text, size=12.5, color=MUTED)
        bottom = self._legend(bottom + 22, width)
        return drawing.svg(width, bottom)

    def _column(self, stages: Sequence[Stage], x: float, placed: list, index: int, last: bool) -> float:
        """Draws a column of stages; gives its lower edge."""
        drawing, y, middle = self.drawing, float(_HEADER + _PILL), x + _MAIN / 2
        flow = Flow(drawing, middle)
        if index == 0:
            self._pill(middle, y - _PILL, self._input_of(stages[0]))
            flow.leave(y, "")
        else:
            flow.turn(placed[-1], self.foot + 26, middle - _MAIN / 2 - 15 - (_BETWEEN - 30) / 2, y - 16)
            self.drawing.text(placed[-1].middle + 10, self.foot + 15, self._output_of(placed[-1].stage), size=11,
                              color=MUTED)  # fmt: skip
        y += _GAP
        for section, group in itertools.groupby(stages, key=lambda stage: stage.section):
            run, framed, top = list(group), section in self.framed, y - 10
            place = drawing.mark()
            y += 18 if framed else 0
            for stage in run:
                if _are_alternatives(placed[-1].stage if placed else None, stage):
                    flow.stop("or")
                flow.arrive(y)
                placed.append(self._box(stage, x, y, _MAIN))
                y += placed[-1].height
                flow.leave(y, self._output_of(stage), 25 if framed and stage is run[-1] else 17)
                y += _GAP
            if framed:
                self._frame(section, x - 15, top, _MAIN + 30, y - _GAP + 14 - top, place)
                y += 12
        self.foot = y - _GAP + (2 if framed else 0)  # `y` is where the next box would be
        if not last:
            return self.foot
        flow.text = ""
        flow.arrive(y)
        self._pill(middle, y, f"{self._output_word()} {self._output_of(stages[-1], whole=True)}".strip())
        return y + _PILL

    def _beside(self, placed: Sequence[Placed]) -> float:
        """Draws what conditions the column, its lines to the boxes that it reaches; gives the lower edge."""
        if not self.side:
            return self._from_outside(placed, 0.0, 0.0) if self.context else 0
        reached = [(self._target(group, placed), group) for group in self.side]
        reached.sort(key=lambda pair: pair[0].y)  # lines that cross less
        targets, groups = [target for target, _ in reached], [group for _, group in reached]
        heights, lanes = [self._height_of(group) for group in groups], sorted({target.y for target in targets})
        total, between = sum(heights), 30
        wanted = max(target.y + target.height / 2 for target in targets)
        y = max(float(_HEADER), wanted - (total + between * (len(heights) - 1)) / 2)
        for group, target, height in zip(groups, targets, heights, strict=True):
            self._reach(group, self._chain(group, y), target, 11 * lanes.index(target.y))
            y += height + between
        if self.context:
            return self._from_outside(placed, y, 11.0 * len(lanes))
        return y - between + 14

    def _context(self) -> tuple[Stage, str] | None:
        """Blocks that attend to states which no part of the model makes, such as a picture's, and these states."""
        made = ("text_proj", "cond_proj", "context_norm")
        if any(group[0].path.endswith(made) or len(group) > 1 for group in self.side):
            return None
        for stage in self.main:
            for name, part in stage.module.named_modules() if "cross" in stage_shares(stage) else ():
                path = f"{stage.path}.{name}"
                found = [self.trace.inputs.get(f"{path}.{key}") for key in ("k_proj", "wk")]
                if describe(part, name.rpartition(".")[2]).role == "cross" and any(found):
                    return stage, f"context {shape_text(found[0] or found[1], self.sizes)}"
        return None

    def _from_outside(self, placed: Sequence[Placed], y: float, lane: float) -> float:
        """Draws what the blocks attend to, from y on or at their height; gives the lower edge."""
        stage, text = self.context
        target = next(each for each in placed if each.stage is stage)
        end, color = target.y + target.height / 2, ROLES["condition"][1]
        y = max(y, end - _PILL / 2)
        middle, wide = y + _PILL / 2, text_width(text, 12) + 30
        self._pill(_EDGE + _SIDE - wide / 2, y, text)
        points = [(_EDGE + _SIDE, middle), (target.x - 1, end)]
        if abs(middle - end) > 1:
            bus = _EDGE + _SIDE + _BETWEEN - 42 + lane
            points[1:1] = [(bus, middle), (bus, end)]
        self.drawing.line(points, color=color, arrow=True)
        return y + _PILL

    def _height_of(self, group: Sequence[Stage]) -> float:
        """Of a chain beside the column, with its frame and what goes into it."""
        boxes = sum(card_height(stage, _SIDE) + (2 * STACK if stage.count > 1 else 0) for stage in group)
        framed = 38 if len(group) > 1 else 0
        return boxes + 26 * (len(group) - 1) + framed + (48 if self._side_input(group) else 0)

    def _chain(self, group: Sequence[Stage], y: float) -> Placed:
        """Draws a chain from y on, with the text that goes into it; gives its last box.

        The learned queries of a Q-Former stand beside the way of the text to the blocks.
        """
        x, place, top, text = float(_EDGE), self.drawing.mark(), y, self._side_input(group)
        queries = next((stage for stage in group if stage.path.endswith("queries")), None)
        flow = Flow(self.drawing, x + _SIDE / 2)
        y += 26 if len(group) > 1 else 0
        if text:
            middle = x + (10 + (text_width(text, 12) + 30) / 2 if queries else _SIDE / 2)
            self._pill(middle, y, text, 26)
            flow.leave(y + 26, "")
            y += 48
        for stage in group:
            aside = 70 if stage is queries else 0
            if queries and group.index(stage) <= group.index(queries):
                flow.move(x + 35)
            if stage is not queries:
                flow.arrive(y)
            box = self._box(stage, x + aside, y, _SIDE - aside)
            y += box.height
            following = group[group.index(stage) + 1] if stage is not group[-1] else None
            if stage is queries:
                Flow(self.drawing, box.middle).leave(y, "").arrive(y + 26)
            else:
                flow = Flow(self.drawing, x + _SIDE / 2).leave(y, self._output_of(stage) if following else "")
            y += 26 if following else 0
        if len(group) > 1:
            self._frame(group[0].section, x - 13, top, _SIDE + 26, y + 12 - top, place)
        return box

    def _reach(self, group: Sequence[Stage], box: Placed, target: Placed, lane: float) -> None:
        """The line from a condition to what it reaches, with its shape."""
        middle, end, bus = box.y + box.height / 2, target.y + target.height / 2, box.x + _SIDE + _BETWEEN - 42 + lane
        right = box.x + _SIDE + (2 * STACK if box.stage.count > 1 else 0)
        points = [(right, middle), (bus, middle), (bus, end), (target.x - 1, end)]
        points = [points[0], points[-1]] if abs(middle - end) < 1 else points
        if target.x > box.x + _SIDE + _BETWEEN:  # in another column, behind boxes
            points = [(right, middle), (right + 18, middle)]
            self.drawing.text(right + 22, middle, "→ " + target.stage.words.title, size=11, color=MUTED)
        self.drawing.line(points, color=ROLES["condition"][1], arrow=target.x <= box.x + _SIDE + _BETWEEN)
        shape = self._output_of(group[-1], whole=len(group) > 1)
        below = box.y + box.height + (23 if len(group) > 1 else 11)
        self.drawing.text(box.x + _SIDE, below, shape, size=10.5, color=MUTED, anchor="end")

    def _target(self, group: Sequence[Stage], placed: Sequence[Placed]) -> Placed:
        """What a condition reaches: the blocks of its own section, else the largest of all.

        Positions are added where tokens are made, and so is a time that no block takes by itself.
        """
        section = group[0].section
        blocks = [each for each in placed if each.stage.words.role == "plain"] or list(placed)
        blocks = [each for each in blocks if {"cross", "modulation"} & set(stage_shares(each.stage))] or blocks
        near = [each for each in blocks if each.stage.section == section]
        target = max(near or blocks, key=lambda each: each.stage.parameters)
        if group[0].path.endswith("final_modulation"):
            return [each for each in placed if each.stage.section == section][-1]
        added = len(group) == 1 and group[0].path.split(".")[-1] in ("pos_embed", "embed_positions")
        if group[0].words.title == "Time embedding":
            takes = "modulation" in stage_shares(target.stage) or "Cross DiT" in target.stage.words.title
            added = added or not takes
        makers = [each for each in placed if each.stage.section == target.stage.section]
        return makers[0] if added else target

    def _box(self, stage: Stage, x: float, y: float, width: float) -> Placed:
        """Draws a stage; several like ones as a stack of cards."""
        drawing, (fill, stroke) = self.drawing, ROLES[stage.words.role]
        height = card_height(stage, width)
        drawing.begin(tooltip(stage))
        for offset in (2 * STACK, STACK) if stage.count > 1 else ():
            drawing.rect(x + offset, y + offset, width, height, fill=fill, stroke=stroke)
        drawing.rect(x, y, width, height, fill=fill, stroke=stroke)
        total = "tied" if not stage.parameters else number(stage.parameters)
        room = width - 36 - text_width(total, 12)
        badge = f"× {stage.count}" if stage.count > 1 else ""
        name = fitted(stage.words.title, room - (text_width(badge, 12, True) + 24 if badge else 0), 13.5, True)
        drawing.text(x + 14, y + 21, name, size=13.5, bold=True)
        drawing.text(x + width - 14, y + 21, total, size=12, color=INK, anchor="end")
        if badge:
            start, wide = x + 22 + text_width(name, 13.5, True), text_width(badge, 12, True) + 12
            drawing.rect(start, y + 11, wide, 19, fill=stroke, radius=9.5)
            drawing.text(start + wide / 2, y + 20.5, badge, size=12, bold=True, color=PAPER, anchor="middle")
        for line, text in enumerate(detail_lines(stage, width)):
            drawing.text(x + 14, y + 41 + 16 * line, text, size=11.5, color=MUTED)
        if stage.each is not None:
            drawing.text(x + width - 14, y + height - 17 - 9, f"each {number(stage.each)}", size=11, color=MUTED,
                         anchor="end")  # fmt: skip
        self._bar(stage, x + 14, y + height - 14, width - 28)
        drawing.end()
        return Placed(stage, x, y, width, height + (2 * STACK if stage.count > 1 else 0))

    def _bar(self, stage: Stage, x: float, y: float, width: float) -> None:
        """The shares of a block's parameters, by what they serve."""
        shares = stage_shares(stage)
        total = sum(shares.values())
        for role, count in shares.items():
            part = width * count / total
            self.drawing.rect(x, y, max(part - 1, 0.5), 6, fill=ROLES[role][1], radius=1.5, opacity=0.8)
            self.roles.add(role)
            x += part

    def _frame(self, section: str, x: float, y: float, width: float, height: float, place: int) -> None:
        """A frame behind what was drawn since `place`, with the section's name."""
        kind = type(self.model.get_submodule(section)).__name__
        with self.drawing.behind(place):
            self.drawing.rect(x, y, width, height, fill="#fafbfc", stroke=FAINT, dashes="4 3", radius=12, line=1)
            name = f"{section}: {kind}"
            room = width / 2 - 20 if width > _MAIN else width - 24  # the column's line comes in through the middle
            name = name if text_width(name, 11) < room else fitted(section, room, 11)
            self.drawing.text(x + 12, y + 14, name, size=11, color=MUTED)

    def _pill(self, middle: float, y: float, text: str, height: float = _PILL) -> None:
        width = text_width(text, 12) + 30
        self.drawing.rect(middle - width / 2, y, width, height, fill=PAPER, stroke=LINE, radius=height / 2)
        self.drawing.text(middle, y + height / 2, text, size=12, anchor="middle")

    def _legend(self, y: float, width: float) -> float:
        if not self.roles:
            return y + 6
        x = float(_EDGE)
        words = [("bars: shares of a block's parameters", None)]
        words += [(_ROLE_WORDS.get(role, role), role) for role in ROLES if role in self.roles]
        for text, role in words:
            wide = text_width(text, 11) + (34 if role else 20)
            if x + wide > width - _EDGE + 14:
                x, y = float(_EDGE), y + 18
            if role:
                self.drawing.rect(x, y - 4, 12, 8, fill=ROLES[role][1], radius=2, opacity=0.8)
            self.drawing.text(x + (18 if role else 0), y, text, size=11, color=MUTED)
            x += wide
        return y + 26

    def _framed(self) -> set[str]:
        """The sections that get a frame: where there are several, those of several stages."""
        runs = [(section, len(list(run))) for section, run in itertools.groupby(self.main, key=lambda s: s.section)]
        if len(runs) < 2:
            return set()
        return {section for section, length in runs if section and length > 1}

    def _input_of(self, stage: Stage) -> str:
        known = type(self.model).__name__ != "QGFDModel"  # whose latents are noised, behind its adapters
        word = _INPUTS.get(stage.words.title, "input") if known else "sample"
        return f"{word} {shape_text(stage.input, self.sizes)}".strip()

    def _side_input(self, group: Sequence[Stage]) -> str:
        """What goes into a chain beside the column: a text's states, or its tokens."""
        section = group[0].section
        shape = shape_text(self.trace.inputs.get(section), self.sizes)
        if len(group) > 1 and shape:
            return f"text states {shape}"
        if len(group) > 1:
            return f"embedded text {shape_text(group[0].input, self.sizes)}"
        return f"text states {shape_text(group[0].input, self.sizes)}" if group[0].path == "text_proj" else ""

    def _output_of(self, stage: Stage, whole: bool = False) -> str:
        """The shape behind a stage; `whole`: of the section or model that it is the last stage of."""
        outputs = self.trace.outputs
        shape = outputs.get(stage.section, stage.output) if whole and stage.section else stage.output
        if whole and not stage.beside:
            shape = outputs.get("", shape)
        return shape_text(shape, self.sizes)

    def _output_word(self) -> str:
        names = {kind.__name__ for kind in type(self.model).__mro__}
        if names & {"DiT", "TextToImage"}:
            return "prediction"
        return "logits" if "MaskedDiffusionLM" in names else "image" if "AutoencoderKL" in names else "output"


def _groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """Stages beside the column: those of one section that has no others are a chain, the rest stand alone."""
    groups: list[list[Stage]] = []
    for stage in stages:
        chained = groups and groups[-1][-1].section == stage.section and _is_chain(stage)
        if chained:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return [sorted(group, key=lambda stage: not stage.path.endswith("text_proj")) for group in groups]


def _is_chain(stage: Stage) -> bool:
    return stage.section.split(".")[-1] in ("q_former", "encoder", "condition_encoder")


def _columns(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in one column, or in two, parted where a section begins, as evenly as that goes."""
    cuts = [n for n in range(1, len(stages)) if stages[n].section != stages[n - 1].section]
    if len(stages) <= _LONGEST or not cuts:
        return [list(stages)]
    cut = min(cuts, key=lambda n: abs(2 * n - len(stages)))
    return [list(stages[:cut]), list(stages[cut:])]


def _are_alternatives(before: Stage | None, after: Stage) -> bool:
    """Whether they are of different adapters: of each sample one is used."""
    if before is None:
        return False
    names = [stage.path.split(".")[:2] for stage in (before, after)]
    return names[0][0] == names[1][0] == "adapters" and names[0] != names[1]
