"""Shapes with a sentence each, drawn here: "A small red heart at the top left", "Three large blue stars in the middle".

The sentence says all that there is to say of a picture, and `parse_caption` reads it back: what a captioning model
says, and what a model of images was asked for, can be checked word by word. Each form is never trained on in one colour
(`UNSEEN`), so that it can be measured whether a model says, or draws, what it has never seen together.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.captions import Attribute, AttributedImages, CaptionedData, Captions
from fastdiff.data.colored_fashion import PALETTE
from fastdiff.data.config import DataConfig
from fastdiff.data.images import LabelledImages, to_signed_unit

SIZES = ("small", "large")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
FORMS = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
PLACES = {
    "top left": "at the top left", "top": "at the top", "top right": "at the top right", "left": "on the left",
    "middle": "in the middle", "right": "on the right", "bottom left": "at the bottom left",
    "bottom": "at the bottom", "bottom right": "at the bottom right",
}  # fmt: skip
COUNTS = ("one", "two", "three")
# the colour in which a form is never trained on
UNSEEN = {
    "circle": "purple", "square": "yellow", "triangle": "pink", "star": "blue", "heart": "green", "diamond": "red",
    "cross": "orange", "moon": "black",
}  # fmt: skip
ATTRIBUTES = {"size": SIZES, "color": COLORS, "form": FORMS, "place": tuple(PLACES), "count": COUNTS}
NUM_TRAIN, NUM_HELD_OUT = 5000, 1000
_SEED = 20260603  # of what every picture shows and where
_VERSION = 1  # of how it is drawn
_OF_SEVERAL = tuple(list(PLACES).index(name) for name in ("top", "left", "middle", "right", "bottom"))  # no corners
_COUNT_AND_PLACE = [(count, place) for count in range(3) for place in (range(9) if count == 0 else _OF_SEVERAL)]
_OVERSAMPLING = 6  # pixels drawn for one, each way
_RADII = ((0.072, 0.085), (0.135, 0.15))  # of small and large shapes, by the edge of the picture
_NEAR, _FAR = 0.2, 0.8  # of the edge: where things at the top or left, and at the bottom or right are
_MARGIN = 0.025  # of the edge, at least free
_TILT = dict(zip(FORMS, (0.0, 0.12, 0.2, 0.25, 0.2, 0.12, 0.15, 0.25), strict=True))  # in radians, at most
_DRAWS = 24  # random numbers of a picture
_SHADOW = 0.16  # of the light, under a shape


def load_shapes(config: DataConfig) -> CaptionedData:
    """5 000 pictures to train on and 1 000 held out, [3, image_size, image_size], labelled by form.

    Attributes size, color, form, place and count; one caption each. Two or three shapes stand in a row, and never in a
    corner. Of the held-out pictures every second one shows a form in its colour of `UNSEEN`. Picture i of a part
    depends on i alone. It is drawn when it is first asked for, and stays in memory.
    """
    size = config.image_size
    train, held_out = ShapeImages(_values(NUM_TRAIN, 0), 0, size), ShapeImages(_values(NUM_HELD_OUT, 1), 1, size)
    everything = ShapeImages(_values(NUM_TRAIN, 2), 2, size)
    attributes = {
        name: Attribute(names, train.values[name], held_out.values[name]) for name, names in ATTRIBUTES.items()
    }
    rows = ([[text] for text in _captions(part)] for part in (train, held_out))
    return CaptionedData(
        "shapes",
        train,
        held_out,
        FORMS,
        (3, size, size),
        Captions.of(("caption",), *rows),
        attributes,
        seen=held_out.values["color"] != torch.from_numpy(_UNSEEN_COLOR)[held_out.values["form"]],
        every_combination=AttributedImages(everything, everything.values),
    )


# ------------------------------------------------------------------------------------------------ sentences


def caption_of(values: Mapping[str, int | str]) -> str:
    """The sentence of a picture.

    Args:
        values: of all five attributes, as numbers or names: {"size": "small", "color": "red", "form": "heart", "place":
            "top left", "count": "one"}.

    Raises:
        ValueError: an attribute that is missing, or a value that there is not.
    """
    missing = [name for name in ATTRIBUTES if name not in values]
    if missing:
        raise ValueError(f"values: got none of {', '.join(missing)}; expected {', '.join(ATTRIBUTES)}")
    said = {}
    for name, names in ATTRIBUTES.items():
        value = values[name]
        number = names.index(value) if value in names else value
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(names)}")
        said[name] = number
    count = said["count"]
    noun = FORMS[said["form"]] if count == 0 else _PLURALS[said["form"]]
    place = PLACES[ATTRIBUTES["place"][said["place"]]]
    return f"{_DETERMINERS[count]} {SIZES[said['size']]} {COLORS[said['color']]} {noun} {place}"


def parse_caption(text: str) -> dict[str, int] | None:
    """What a sentence says: the number of the value of each attribute. The inverse of `caption_of`.

    Capitals, spaces and a full stop do not matter. None for what is no such sentence: "Two small red heart …".
    """
    found = _SENTENCE.fullmatch(" ".join(text.lower().split()).removesuffix("."))
    if found is None:
        return None
    count, size, color, noun, place = found.groups()
    several, nouns = count != "a", FORMS if count == "a" else _PLURALS
    if noun not in nouns:
        return None
    number = [each.lower() for each in _DETERMINERS].index(count) if several else 0
    phrases = list(PLACES.values())
    numbers = SIZES.index(size), COLORS.index(color), nouns.index(noun), phrases.index(place), number
    return dict(zip(ATTRIBUTES, numbers, strict=True))


_PLURALS = tuple(f"{form}es" if form.endswith("s") else f"{form}s" for form in FORMS)
_DETERMINERS = ("A", "Two", "Three")
_SENTENCE = re.compile(
    " ".join(
        f"({'|'.join(each)})" for each in (map(str.lower, _DETERMINERS), SIZES, COLORS, FORMS + _PLURALS,
                                           PLACES.values())
    )
)  # fmt: skip
_UNSEEN_COLOR = np.array([COLORS.index(UNSEEN[form]) for form in FORMS])


def _captions(images: "ShapeImages") -> list[str]:
    rows = zip(*(values.tolist() for values in images.values.values()), strict=True)
    return [caption_of(dict(zip(images.values, row, strict=True))) for row in rows]


def _values(count: int, part: int) -> dict[str, np.ndarray]:
    """What the pictures of a part show: int64 [count] by attribute. Parts: 0 to train on, 1 held out, 2 all."""
    draws = np.random.default_rng([_SEED, part]).random((count, 4))
    form = (draws[:, 0] * len(FORMS)).astype(np.int64)
    if part == 2:
        color = (draws[:, 1] * len(COLORS)).astype(np.int64)
    else:  # of the others, those after the unseen one move up
        color = (draws[:, 1] * (len(COLORS) - 1)).astype(np.int64)
        color += color >= _UNSEEN_COLOR[form]
        if part == 1:
            color[1::2] = _UNSEEN_COLOR[form[1::2]]
    many, place = np.array(_COUNT_AND_PLACE)[(draws[:, 2] * len(_COUNT_AND_PLACE)).astype(np.int64)].T
    size = (draws[:, 3] * len(SIZES)).astype(np.int64)
    return dict(zip(ATTRIBUTES, (size, color, form, place, many), strict=True))


# ------------------------------------------------------------------------------------------------ pictures


class ShapeImages(LabelledImages):
    """Pictures of shapes, drawn when they are asked for.

    Args:
        values: int64 [N] by attribute.
        part: a number from which chance is drawn: where exactly the shapes are, and on what.
        image_size: edge in pixels.
    """

    def __init__(self, values: dict[str, np.ndarray], part: int, image_size: int):
        self.values = {name: torch.from_numpy(each.astype(np.int64)) for name, each in values.items()}
        self.labels = self.values["form"]
        self.image_size = image_size
        self._draws = np.random.default_rng([_SEED, part, 1]).random((len(self.labels), _DRAWS))
        self._pixels = np.zeros((len(self.labels), 3, image_size, image_size), np.uint8)
        self._drawn = np.zeros(len(self.labels), bool)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The pictures at `indices`: float32 [n, 3, image_size, image_size] in [-1, 1]."""
        where = np.asarray(indices, dtype=np.int64)
        for index in np.unique(where[~self._drawn[where]]).tolist():
            shown = {name: int(values[index]) for name, values in self.values.items()}
            self._pixels[index] = drawn(shown, self._draws[index], self.image_size)
            self._drawn[index] = True
        return to_signed_unit(torch.from_numpy(self._pixels[where]))

    def fingerprint(self) -> str:
        """A hash of all that decides the pictures; nothing is drawn for it."""
        digest = hashlib.sha256(f"shapes {_VERSION} {_SEED} {self.image_size}".encode())
        for values in self.values.values():
            digest.update(values.numpy().tobytes())
        digest.update(self._draws.tobytes())
        return digest.hexdigest()


def drawn(shown: Mapping[str, int], draws: np.ndarray, size: int) -> np.ndarray:  # uint8 [3, size, size]
    """A picture: its shapes with a soft shadow on a plain or softly coloured ground.

    Args:
        shown: the number of the value of each attribute.
        draws: float64 [24], uniform on [0, 1): all that the sentence leaves open.
        size: edge in pixels.
    """
    from PIL import Image, ImageDraw, ImageFilter

    low, high = _RADII[shown["size"]]
    radius = low + (high - low) * draws[0]
    edge = size * _OVERSAMPLING
    form = FORMS[shown["form"]]
    mask = Image.new("L", (edge, edge))
    pen = ImageDraw.Draw(mask)
    for (x, y), turn in zip(_centres(shown, radius, draws[1:9]), draws[9:12], strict=False):
        points = _OUTLINES[form] @ _rotation(_TILT[form] * (2 * turn - 1)) * radius + (x, y)
        pen.polygon([tuple(point) for point in points * edge], fill=255)
    blurred = mask.reduce(_OVERSAMPLING).filter(ImageFilter.GaussianBlur(0.014 * size))
    shadow = np.roll(np.asarray(blurred, np.float32) / 255, max(round(0.014 * size), 1), axis=0)
    cover = np.asarray(mask.reduce(_OVERSAMPLING), np.float32) / 255
    ground = _ground(draws[12:18], size) * (1 - _SHADOW * shadow)
    color = np.array(PALETTE[COLORS[shown["color"]]], np.float32) * (0.95 + 0.05 * draws[18])
    light = 1 + 0.1 * (0.5 - np.linspace(0, 1, size, dtype=np.float32))[:, None]  # brighter above
    paint = np.minimum(color[:, None, None] * light, 255)
    return np.rint(ground + cover * (paint - ground)).astype(np.uint8)


def _centres(shown: Mapping[str, int], radius: float, draws: np.ndarray) -> list[tuple[float, float]]:
    """Where the shapes are, x and y by the edge of the picture."""
    place, count = ATTRIBUTES["place"][shown["place"]], shown["count"] + 1
    x = _NEAR if "left" in place else _FAR if "right" in place else 0.5
    y = _NEAR if "top" in place else _FAR if "bottom" in place else 0.5
    jitter = 0.07 * (draws - 0.5)
    free = radius + _MARGIN  # of a centre and the edge
    if count == 1:
        found = [(x + jitter[0], y + jitter[1])]
    elif count == 3 and place == "middle":
        apart = (2 * radius + 0.02 + 0.05 * draws[2]) / math.sqrt(3)
        turns = [math.tau * (third / 3 - 0.25) + 0.15 * (draws[3] - 0.5) for third in range(3)]
        found = [(x + apart * math.cos(turn), y + apart * math.sin(turn)) for turn in turns]
    else:
        apart = min(2 * radius + 0.02 + 0.1 * draws[2], (1 - 2 * free) / (count - 1))
        along = [apart * (number - (count - 1) / 2) for number in range(count)]
        column = place in ("left", "right") or (place == "middle" and draws[3] < 0.5)
        steps = [(0.3 * jitter[4 + number], step) for number, step in enumerate(along)]
        found = [(x + a, y + b) if column else (x + b, y + a) for a, b in steps]
    return [(min(max(a, free), 1 - free), min(max(b, free), 1 - free)) for a, b in found]


def _ground(draws: np.ndarray, size: int) -> np.ndarray:  # float32 [3, size, size]
    """White, or a pale colour that may pass into another from above to below."""
    if draws[0] < 0.3:
        return np.full((3, size, size), 255, np.float32)
    tints = [np.array([math.cos(math.tau * (hue - third / 3)) for third in range(3)]) for hue in draws[1:3]]
    above, below = (255 - 14 * draws[3] - (11 + 9 * draws[4]) * (1 - tint) / 2 for tint in tints)
    share = np.linspace(0, 1, size)[:, None] * (draws[5] < 0.6)
    mixed = above[:, None, None] * (1 - share) + below[:, None, None] * share
    return np.broadcast_to(mixed, (3, size, size)).astype(np.float32)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _arc(count: int, start: float, stop: float) -> np.ndarray:  # [count, 2]
    """Points on the unit circle between two shares of a turn, clockwise from the right, y down."""
    turns = math.tau * np.linspace(start, stop, count)
    return np.stack([np.cos(turns), np.sin(turns)], axis=1)


def _outlines() -> dict[str, np.ndarray]:
    """Each form as a polygon [P, 2] within the unit circle or a little beyond it, of about one area."""
    star = _arc(11, -0.25, 0.75)[:-1] * np.where(np.arange(10) % 2, 0.5, 1.15)[:, None]
    turns = np.linspace(0, math.tau, 120, endpoint=False)
    heart = np.stack([16 * np.sin(turns) ** 3, -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns)
                                                 - np.cos(4 * turns)) - 2.5], axis=1) / 16.5  # fmt: skip
    arm, end = 0.36, 1.02
    quarter = np.array([(arm, -end), (arm, -arm), (end, -arm)])
    cross = np.concatenate([quarter @ _rotation(math.tau * number / 4) for number in range(4)])
    outer = _arc(80, 0.1, 0.9)  # open to the right
    width = 0.73  # radius of the circle that is cut out, through both ends of the outer arc
    half = math.asin(outer[0, 1] / width) / math.tau
    inner = width * _arc(80, 1 - half, half)[1:-1] + (outer[0, 0] - width * math.cos(math.tau * half), 0)
    return {
        "circle": _arc(97, 0, 1)[:-1] * 0.95,
        "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85,
        "triangle": _arc(4, -0.25, 0.75)[:-1] * 1.14 + (0, 0.25),
        "star": star + (0, 0.06),
        "heart": heart,
        "diamond": np.array([(0, -1.15), (0.85, 0), (0, 1.15), (-0.85, 0)]),
        "cross": cross,
        "moon": np.concatenate([outer, inner]) + (0.1, 0),
    }


_OUTLINES = _outlines()
