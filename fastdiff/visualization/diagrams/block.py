"""One block of each kind that a model repeats, from inside: norms, attention, MLP, modulation, residual connections."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fastdiff.visualization.diagrams.anatomy import Stage, Trace, stages_of
from fastdiff.visualization.diagrams.cards import number, shape_text
from fastdiff.visualization.diagrams.svg import INK, LINE, MUTED, PAPER, ROLES, Drawing, fitted, text_width, wrapped
from fastdiff.visualization.diagrams.words import Words, describe, spoken

_BOX, _LANE, _RIGHT, _EDGE, _HEADER = 270, 44, 176, 36, 92  # widths: of boxes, of the residual's lane, of what is right
_GAP, _BETWEEN, _MOST = 26, 46, 3  # between boxes, between blocks; blocks of a picture
# Blocks that add each branch to the stream: what follows a norm, up to the next one. Others are drawn as a chain.
_PRE_NORM = {
    "DiTBlock", "CrossDiTBlock", "TransformerBlock", "QFormerBlock", "QGFDEncoderBlock", "QGFDDecoderBlock",
    "CLIPEncoderLayer", "SiglipEncoderLayer", "GPT2Block",
}  # fmt: skip
_AROUND = {"ResnetBlock2D"}  # one connection around all, in place of a convolution where channels change


@dataclass(frozen=True)
class Part:
    """A module within a block.

    Attributes:
        path: in the model.
        module: itself.
        words: what it is called.
        parameters: how many it has.
    """

    path: str
    module: nn.Module
    words: Words
    parameters: int


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        stage: where the first of them is.
        path, module: the block; one within the stage's where that is a list of blocks.
        branches: its parts by residual branch; one of all parts where it has none.
        residual: "each" branch is added to the stream, one goes "around" all, or "none" is known.
        modulation: what makes shifts, scales and gates, or None.
        modulated: what each branch gets of it: ("shift", "scale", "gate").
    """

    stage: Stage
    path: str
    module: nn.Module
    branches: tuple[tuple[Part, ...], ...]
    residual: str
    modulation: Part | None
    modulated: tuple[str, ...]


def blocks_of(model: nn.Module, trace: Trace) -> list[Block]:
    """The kinds of blocks that a model is made of, those with the most parameters first; at most three."""
    found: dict[type, Block] = {}
    stages = [stage for stage in stages_of(model, trace) if stage.module is not None and stage.words.role == "plain"]
    for stage in sorted(stages, key=lambda stage: (stage.beside, -stage.parameters)):
        path, module = _innermost(stage.path, stage.module)
        if type(module) not in found and (block := _block(stage, path, module, trace)) is not None:
            found[type(module)] = block
    return list(found.values())[:_MOST]


def _innermost(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The first block in what is no block itself, or a list of blocks and nothing else, such as a U-Net's."""
    lists = {name: child for name, child in module.named_children() if isinstance(child, nn.ModuleList) and len(child)}
    others = [child for child in module.children() if not isinstance(child, nn.ModuleList)]
    if lists and (not others or "block" not in type(module).__name__.lower()):
        name = max(lists, key=lambda each: sum(p.numel() for p in lists[each].parameters()))
        return f"{path}.{name}.0", lists[name][0]
    return path, module


def _block(stage: Stage, path: str, module: nn.Module, trace: Trace) -> Block | None:
    parts, modulation = [], None
    for name, child in _flat(module):
        place, count = f"{path}.{name}", sum(p.numel() for p in child.parameters())
        part = Part(place, child, describe(child, name.rpartition(".")[2]), count)
        if not count:
            continue
        if part.words.role == "modulation":
            modulation = part
        else:
            parts.append(part)
    kinds = {kind.__name__ for kind in type(module).__mro__}
    parts = [part for part in parts if part.path in trace.order] or parts  # what this call needs
    parts += _norms_without_weights(module, path, {part.path for part in parts}, trace)
    shortcut = [part for part in parts if part.path.endswith("shortcut")]
    parts = [part for part in parts if part not in shortcut]
    parts.sort(key=lambda part: trace.order.get(part.path, 0))
    if len(parts) < 2:
        return None
    residual = "each" if kinds & _PRE_NORM and trace.order else "around" if kinds & _AROUND else "none"
    branches = _branches(parts) if residual == "each" else [tuple(parts)]
    return Block(stage, path, module, tuple(branches), residual, modulation, _modulated(modulation, branches))


def _norms_without_weights(module: nn.Module, path: str, known: set[str], trace: Trace) -> list[Part]:
    """Norms that the modulation alone scales have no parameters, but a place."""
    found = []
    for name, child in _flat(module):
        place = f"{path}.{name}"
        words = describe(child, name.rpartition(".")[2])
        if place not in known and words.role == "norm" and (place in trace.order or not trace.order):
            found.append(Part(place, child, words, sum(p.numel() for p in child.parameters())))
    return found


def _flat(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The children by name, those of dictionaries and lists in their place."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleDict | nn.ModuleList):
            found += _flat(child, f"{prefix}{name}.")
        else:
            found.append((prefix + name, child))
    return found


def _branches(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """The parts in groups, each of which a norm begins."""
    groups: list[list[Part]] = []
    for part in parts:
        if part.words.role == "norm" or not groups:
            groups.append([part])
        else:
            groups[-1].append(part)
    return [tuple(group) for group in groups]


def _modulated(modulation: Part | None, branches: Sequence[tuple[Part, ...]]) -> tuple[str, ...]:
    """What a branch gets of the modulation, by how many vectors of the stream's width it makes for each."""
    if modulation is None:
        return ()
    linear = [each for each in modulation.module.modules() if isinstance(each, nn.Linear)][-1]
    each = linear.out_features // (linear.in_features * len(branches))
    return ("shift", "scale", "gate")[:each]


def draw_blocks(model: nn.Module, trace: Trace, sizes: Mapping[int, str], *, title: str, subtitle: str) -> str | None:
    """The SVG of a model's kinds of blocks, side by side; None where it has no blocks. Arguments are `draw_model`'s."""
    blocks = blocks_of(model, trace)
    if not blocks:
        return None
    names = [_name_of(block) for block in blocks]
    about = "; ".join(
        f"{name}: " + ", ".join(part.words.title for branch in block.branches for part in branch)
        for name, block in zip(names, blocks, strict=True)
    )
    drawing = Drawing(f"{title}: inside a block", about)
    x, bottoms, rotary = float(_EDGE), [], _is_rotary(model)
    top = float(_HEADER + (34 if any(block.modulation is not None for block in blocks) else 0))
    for block, name in zip(blocks, names, strict=True):
        panel = _Panel(drawing, block, trace, sizes, x, top, rotary)
        bottoms.append(panel.draw(name))
        x += panel.width + _BETWEEN
    width = max(x - _BETWEEN + _EDGE, 420)
    drawing.text(_EDGE, 34, fitted(title + ": inside a block", width - 2 * _EDGE, 20, True), size=20, bold=True)
    drawing.text(_EDGE, 58, fitted(subtitle, width - 2 * _EDGE, 12.5), size=12.5, color=MUTED)
    return drawing.svg(width, max(bottoms) + 30)


def _name_of(block: Block) -> str:
    return spoken(type(block.module).__name__)


def _is_rotary(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    kinds = (getattr(each, "position_embedding", None) for each in (config, getattr(config, "dit", None)))
    theta = getattr(getattr(config, "backbone", None), "rope_theta", None)
    return any(kind in ("rope", "rotary") for kind in kinds) or theta is not None


class _Panel:
    """The drawing of one block, from x on."""

    def __init__(
        self, drawing: Drawing, block: Block, trace: Trace, sizes: Mapping[int, str], x: float, y: float,
        rotary: bool,
    ) -> None:  # fmt: skip
        self.y = y
        self.drawing, self.block, self.trace, self.sizes, self.x = drawing, block, trace, sizes, x
        lane = _LANE if block.residual != "none" else 0
        self.box, self.lane = x + lane, x + 14
        self.crosses = any(part.words.role == "cross" for branch in block.branches for part in branch)
        right = _RIGHT if block.modulation is not None or self.crosses else 0
        self.width, self.right = lane + _BOX + right, self.box + _BOX
        self.middle, self.bus = self.box + _BOX / 2, self.right + 106
        self.rotary = rotary and not block.stage.beside

    def draw(self, name: str) -> float:
        """Draws all from the header down; gives the lower edge."""
        drawing, block, y = self.drawing, self.block, self.y
        stage = block.stage
        count = f" × {stage.count}" if stage.count > 1 and block.module is stage.module else ""
        total = number(sum(p.numel() for p in block.module.parameters()))
        drawing.text(self.x, y, fitted(f"{name}{count}", self.width - 90, 14, True), size=14, bold=True)
        drawing.text(self.x + text_width(f"{name}{count}", 14, True) + 12, y, f"{total} each" if count else total,
                     size=12, color=MUTED)  # fmt: skip
        drawing.text(self.x, y + 19, block.path, size=11, color=MUTED)
        y += 40
        shape = shape_text(self.trace.inputs.get(block.path), self.sizes)
        word = "queries" if "QFormer" in type(block.module).__name__ else "stream"
        self._pill(self.middle, y, f"{word} {shape}".strip() if shape else "input")
        self.last, self.lowest = y + 28, y
        if block.modulation is not None:
            self._modulation(y)
        y += 28
        for index, branch in enumerate(block.branches):
            y = self._branch(branch, y, index)
        if block.modulation is not None:
            drawing.line([(self.bus, self.top), (self.bus, self.lowest)], color=ROLES["modulation"][1])
        y += _GAP
        self._down(y)
        shape = shape_text(self.trace.outputs.get(block.path), self.sizes)
        self._pill(self.middle, y, f"{word} {shape}".strip() if shape else "output")
        return y + 28

    def _branch(self, parts: Sequence[Part], y: float, index: int) -> float:
        """Draws what is computed and added to the stream; gives the lower edge."""
        drawing, residual, gets = self.drawing, self.block.residual, self.block.modulated
        split = y + 14
        y += _GAP + (6 if residual != "none" else 0)
        for number_in_branch, part in enumerate(parts):
            self._down(y)
            y = self._part(part, y)
            if part.words.role == "norm" and gets and number_in_branch == 0:
                self._from_bus(y - _height(part, self.rotary) / 2, self.right, ", ".join(gets[:2]))
            if part.words.role == "cross":
                self._context(part, y - _height(part, self.rotary) / 2)
            self.last = y
            y += _GAP
        if "gate" in gets:
            y = self._circle(y, "×", ROLES["modulation"][1])
            self._from_bus(y - 10, self.middle + 10, "gate")
            y += 16
        if residual == "none":
            return self.last
        y = self._circle(y, "+", INK)
        drawing.circle(self.middle, split, 2.2, fill=LINE, stroke=LINE)
        points = [(self.middle, split), (self.lane, split), (self.lane, y - 10), (self.middle - 11, y - 10)]
        drawing.line(points, arrow=True)
        if residual == "around" and _has_shortcut(self.block.module):
            drawing.text(self.lane + 4, split - 9, "1 × 1 where channels change", size=10, color=MUTED)
        return y

    def _circle(self, y: float, sign: str, color: str) -> float:
        """An operation on the stream; gives its lower edge."""
        self._down(y)
        self.drawing.circle(self.middle, y + 10, 10, stroke=color)
        cross = 4.5 if sign == "+" else 3.4
        (x, middle), turned = (self.middle, y + 10), sign == "×"
        ends = [(-cross, -cross, cross, cross), (-cross, cross, cross, -cross)] if turned else [
            (-cross, 0, cross, 0), (0, -cross, 0, cross)]  # fmt: skip
        for x0, y0, x1, y1 in ends:
            self.drawing.line([(x + x0, middle + y0), (x + x1, middle + y1)], color=color)
        self.last = y + 20
        return y + 20

    def _part(self, part: Part, y: float) -> float:
        drawing, (fill, stroke) = self.drawing, ROLES[part.words.role]
        height = _height(part, self.rotary)
        drawing.begin(f"{part.path}: {type(part.module).__name__}, {part.parameters:,} parameters")
        drawing.rect(self.box, y, _BOX, height, fill=fill, stroke=stroke)
        total = number(part.parameters) if part.parameters else ""
        if part.words.role == "norm":
            drawing.text(self.box + 14, y + height / 2, part.words.title, size=13, bold=True)
            start = self.box + 22 + text_width(part.words.title, 13, True)
            room = self.box + _BOX - 22 - text_width(total, 11.5) - start
            drawing.text(start, y + height / 2, fitted(part.words.detail, room, 11), size=11, color=MUTED)
            drawing.text(self.box + _BOX - 14, y + height / 2, total, size=11.5, anchor="end")
        else:
            drawing.text(self.box + 14, y + 20, part.words.title, size=13, bold=True)
            drawing.text(self.box + _BOX - 14, y + 20, total, size=11.5, anchor="end")
            for line, text in enumerate(_lines(part, self.rotary)):
                drawing.text(self.box + 14, y + 40 + 16 * line, text, size=11.5, color=MUTED)
        drawing.end()
        return y + height

    def _context(self, part: Part, y: float) -> None:
        """What a cross-attention attends to, at the right."""
        inputs = self.trace.inputs
        keys = [f"{part.path}.{name}" for name in ("wk", "k_proj")]
        shape = shape_text(next((inputs[key] for key in keys if key in inputs), None), self.sizes)
        color, x = ROLES["condition"][1], self.right + (128 if self.block.modulation is not None else 26)
        self.drawing.line([(x, y), (self.right + 1, y)], color=color, arrow=True)
        wide = max(text_width(shape, 11), text_width("keys and values", 11)) + 22
        self.drawing.rect(x, y - 21, wide, 42, stroke=color, fill=ROLES["condition"][0], radius=21)
        self.drawing.text(x + wide / 2, y - (7 if shape else 0), "keys and values", size=11, anchor="middle")
        self.drawing.text(x + wide / 2, y + 9, shape, size=11, color=MUTED, anchor="middle")
        self.width = max(self.width, x + wide - self.x)

    def _modulation(self, y: float) -> None:
        """The box that makes shifts, scales and gates, at the top right; the bus goes down from it."""
        part, x, width = self.block.modulation, self.right + 22, 168
        fill, stroke = ROLES["modulation"]
        self.drawing.begin(f"{part.path}: {type(part.module).__name__}, {part.parameters:,} parameters")
        self.drawing.rect(x, y - 40, width, 58, fill=fill, stroke=stroke)
        self.drawing.text(x + 12, y - 22, "adaLN", size=13, bold=True)
        self.drawing.text(x + width - 12, y - 22, number(part.parameters), size=11.5, anchor="end")
        self.drawing.text(x + 12, y - 2, fitted(part.words.detail, width - 20, 11.5), size=11.5, color=MUTED)
        self.drawing.end()
        shape = shape_text(self.trace.inputs.get(part.path), self.sizes)
        wide = text_width(f"condition {shape}", 11) + 20
        middle = x + width / 2
        self.drawing.rect(middle - wide / 2, y - 84, wide, 24, stroke=ROLES["condition"][1], fill=PAPER, radius=12)
        self.drawing.text(middle, y - 72, f"condition {shape}".strip(), size=11, anchor="middle")
        self.drawing.line([(middle, y - 60), (middle, y - 41)], arrow=True)
        self.bus, self.top = middle, y + 18
        self.width = max(self.width, x + width - self.x)

    def _from_bus(self, y: float, x: float, text: str) -> None:
        color = ROLES["modulation"][1]
        self.drawing.line([(self.bus, y), (x + 1, y)], color=color, arrow=True)
        self.drawing.circle(self.bus, y, 2, fill=color, stroke=color)
        self.drawing.text((max(x, self.right) + self.bus) / 2, y - 9, text, size=11, color=color, anchor="middle")
        self.lowest = y

    def _pill(self, middle: float, y: float, text: str) -> None:
        width = text_width(text, 12) + 28
        self.drawing.rect(middle - width / 2, y, width, 28, stroke=LINE, radius=14)
        self.drawing.text(middle, y + 14, text, size=12, anchor="middle")

    def _down(self, y: float) -> None:
        """The stream from what was drawn last to y."""
        self.drawing.line([(self.middle, self.last), (self.middle, y - 1)], arrow=True)


def _has_shortcut(module: nn.Module) -> bool:
    return getattr(module, "conv_shortcut", None) is not None


def _lines(part: Part, rotary: bool) -> list[str]:
    detail = part.words.detail
    if rotary and part.words.role == "attention":
        detail += " · rotary positions"
    return wrapped(detail, _BOX - 28, 11.5)[:3] if detail else []


def _height(part: Part, rotary: bool) -> float:
    return 34 if part.words.role == "norm" else 38 + 16 * len(_lines(part, rotary)) + 2 * bool(_lines(part, rotary))
