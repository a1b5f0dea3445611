"""Fashion-MNIST in colour: garment and background tinted in named colours, with captions that say so.

Some combinations of class and garment colour are never in the part to train on, so that it can be measured whether a
model draws what it has never seen together. Texts come as those of LLM2DiT do: the class ("base"), a synonym of it
("base_syn"), a caption ("caption"), and one with synonyms ("caption_syn").
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.data.captions import Attribute, AttributedImages, CaptionedData, Captions
from fastdiff.data.config import DataConfig
from fastdiff.data.fashion_mnist import FASHION_CLASSES, load_fashion_mnist
from fastdiff.data.images import ArrayImages, to_signed_unit
from fastdiff.errors import named

SIZE = 32
PALETTE = {
    "red": (224, 36, 44), "orange": (247, 138, 26), "yellow": (250, 219, 50), "green": (42, 168, 74),
    "blue": (42, 92, 226), "purple": (138, 60, 196), "pink": (250, 150, 202), "white": (252, 252, 252),
    "gray": (128, 128, 128), "black": (16, 16, 16),
}  # fmt: skip
GARMENTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
BACKGROUNDS = ("black", "gray", "white", "red", "yellow", "green", "blue", "purple")
# garment and background that are hard to tell where the garment is dark, beside those of one name
_ALIKE = {("white", "gray"), ("orange", "red"), ("purple", "blue"), ("blue", "purple"), ("orange", "yellow")}
# the colour in which a class is never trained on
UNSEEN = {
    "T-shirt": "purple", "trouser": "yellow", "pullover": "green", "dress": "white", "coat": "pink", "sandal": "blue",
    "shirt": "orange", "sneaker": "purple", "bag": "red", "ankle boot": "green",
}  # fmt: skip
_SEED = 20260602  # of the colours and captions of every image
_DARK = 10  # of 255: at most this is background, where it is joined to the edge; the files have noise of a few steps
_SEE_THROUGH = ("trouser", "sandal", "bag")  # of the others, what a garment encloses is a dark print
_SHADE = 0.42  # of the darkest cloth: darker, colours are no longer told apart
_DIMMEST = 60  # of 255: bright parts that are dimmer are not brightened more, since noise would be seen
_CHUNK = 2000  # images tinted at once
_COLORINGS = 8  # of each garment, for classifiers

NOUNS = {
    "T-shirt": ("T-shirt", "tee", "tee shirt"), "trouser": ("pair of trousers", "pair of pants", "pair of slacks"),
    "pullover": ("pullover", "sweater", "jumper"), "dress": ("dress", "gown", "frock"),
    "coat": ("coat", "overcoat", "jacket"), "sandal": ("sandal", "open-toed shoe", "summer shoe"),
    "shirt": ("shirt", "blouse", "button-up shirt"), "sneaker": ("sneaker", "trainer", "running shoe"),
    "bag": ("bag", "handbag", "purse"), "ankle boot": ("ankle boot", "bootie", "short boot"),
}  # fmt: skip
_CLASS_SYNONYMS = {"trouser": ("trousers", "pants", "slacks")}  # where they are not those of the nouns
_COLOR_SYNONYMS = {
    "red": ("scarlet", "crimson"), "orange": ("tangerine",), "yellow": ("lemon yellow",), "green": ("emerald",),
    "blue": ("cobalt blue", "royal blue"), "purple": ("violet",), "pink": ("rose",), "white": ("snow-white",),
    "gray": ("grey",), "black": ("jet-black",),
}  # fmt: skip
ENTRIES = ("base", "base_syn", "caption", "caption_syn")


def load_colored_fashion(config: DataConfig) -> CaptionedData:
    """Fashion-MNIST's 60 000 and 10 000 images as [3, 32, 32], with attributes class, color and background.

    Image i of a part has its colours and captions by a fixed seed. The part to train on never shows a class in its
    colour of `UNSEEN`; an eighth of the held-out images does.

    Raises:
        FileNotFoundError, ValueError: the IDX files are missing, damaged or of larger images; one line.
    """
    grey = load_fashion_mnist(config)
    if max(grey.image_shape[1:]) > SIZE:
        raise ValueError(
            f"{named('folder')}: got images of {grey.image_shape[1]}x{grey.image_shape[2]} pixels; colored_fashion "
            f"takes those of Fashion-MNIST, 28x28, or others of at most {SIZE}x{SIZE}"
        )
    parts, values, rows = [], [], []
    for number, part in enumerate((grey.train, grey.held_out)):
        draws = np.random.default_rng([_SEED, number]).random((len(part), 6))  # a row an image
        labels = part.labels.numpy()
        colors, backgrounds = _colors(labels, draws[:, 0], draws[:, 1], trained_on=number == 0)
        pixels = tinted(part.pixels[:, 0].numpy(), labels, colors, backgrounds)
        parts.append(ArrayImages(torch.from_numpy(pixels), part.labels))
        values.append([torch.from_numpy(each.astype(np.int64)) for each in (labels, colors, backgrounds)])
        rows.append(_texts(labels, colors, backgrounds, draws[:, 2:]))
    names = {"class": FASHION_CLASSES, "color": GARMENTS, "background": BACKGROUNDS}
    attributes = {
        name: Attribute(names[name], *pair) for name, pair in zip(names, zip(*values, strict=True), strict=True)
    }
    label, color, _ = values[1]
    recolored = RecoloredGarments(grey.train)
    return CaptionedData(
        "colored_fashion",
        parts[0],
        parts[1],
        FASHION_CLASSES,
        (3, SIZE, SIZE),
        Captions.of(ENTRIES, *rows),
        attributes,
        seen=color != torch.from_numpy(_UNSEEN_COLOR)[label],
        every_combination=AttributedImages(recolored, recolored.values),
    )


class RecoloredGarments:
    """The garments to train on, each in eight other colourings of all combinations, tinted when they are asked for.

    Args:
        grey: the garments in grey.
    """

    def __init__(self, grey: ArrayImages):
        self._grey, count = grey, _COLORINGS * len(grey)
        self.labels = grey.labels.repeat(_COLORINGS)
        draws = np.random.default_rng([_SEED, 2]).random((count, 2))
        self._colors, self._backgrounds = _colors(self.labels.numpy(), draws[:, 0], draws[:, 1], trained_on=False)

    @property
    def values(self) -> dict[str, Tensor]:
        """int64 [K] by attribute."""
        colors, backgrounds = torch.from_numpy(self._colors), torch.from_numpy(self._backgrounds)
        return {"class": self.labels, "color": colors, "background": backgrounds}

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """The images at `indices`: float32 [n, 3, 32, 32] in [-1, 1]."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        grey, which = self._grey.pixels[indices % len(self._grey), 0].numpy(), indices.numpy()
        pixels = tinted(grey, self.labels[indices].numpy(), self._colors[which], self._backgrounds[which])
        return to_signed_unit(torch.from_numpy(pixels))

    def batch(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """{"pixel_values": float32 [n, 3, 32, 32] in [-1, 1], "labels": int64 [n]}."""
        return {"pixel_values": self.images(indices), "labels": self.labels[torch.as_tensor(indices, dtype=torch.long)]}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{_COLORINGS} {_SEED} {self._grey.fingerprint()}".encode()).hexdigest()


_UNSEEN_COLOR = np.array([GARMENTS.index(UNSEEN[name]) for name in FASHION_CLASSES])


def _colors(
    labels: np.ndarray, garment_draws: np.ndarray, background_draws: np.ndarray, trained_on: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of garment and background colours from labels and uniform draws on [0, 1), [N] each."""
    if trained_on:  # of the seven others, those after the unseen one move up
        colors = (garment_draws * (len(GARMENTS) - 1)).astype(np.int64)
        colors += colors >= _UNSEEN_COLOR[labels]
    else:
        colors = (garment_draws * len(GARMENTS)).astype(np.int64)
    allowed = [[number for number, name in enumerate(BACKGROUNDS) if name != garment and (garment, name) not in _ALIKE]
               for garment in GARMENTS]  # fmt: skip
    counts = np.array([len(each) for each in allowed])
    table = np.array([each + [0] * (counts.max() - len(each)) for each in allowed])
    return colors, table[colors, (background_draws * counts[colors]).astype(np.int64)]


def tinted(
    grey: np.ndarray,  # uint8 [N, H, W], garments bright on black, H and W at most 32
    labels: np.ndarray,  # int [N]
    colors: np.ndarray,  # int [N], of GARMENTS
    backgrounds: np.ndarray,  # int [N], of BACKGROUNDS
) -> np.ndarray:  # uint8 [N, 3, 32, 32]
    """Garments in their colour, brighter and darker as the grey ones are, in the middle of a plain background.

    Background is what is dark and joined to the edge. What a garment encloses is a print of it, but for the handles of
    bags, the straps of sandals and the gap of trousers. Each garment's bright parts have its colour full; its edge is
    mixed with the background as the grey one's is with black.
    """
    height, width = grey.shape[1:]
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    garment_colors = np.array([PALETTE[name] for name in GARMENTS], np.float32)
    background_colors = np.array([PALETTE[name] for name in BACKGROUNDS], np.float32)
    see_through = np.isin(labels, [FASHION_CLASSES.index(name) for name in _SEE_THROUGH])
    pixels = np.empty((len(grey), 3, SIZE, SIZE), np.uint8)
    for start in range(0, len(grey), _CHUNK):
        part = slice(start, start + _CHUNK)
        values = np.pad(grey[part], ((0, 0), (top, SIZE - height - top), (left, SIZE - width - left)))
        cover, shade = _cover_and_shade(values, see_through[part])
        for channel in range(3):
            garment = garment_colors[colors[part], channel][:, None, None] * shade
            background = background_colors[backgrounds[part], channel][:, None, None]
            pixels[part, channel] = np.rint(background + cover * (garment - background))
    return pixels


def _cover_and_shade(values: np.ndarray, see_through: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel the garment covers, and how bright it is there: float32 [n, 32, 32], in 0 … 1."""
    dark = values <= _DARK
    outside = joined_to_edge(dark)
    holes = dark & ~outside
    alone = holes & ~_any_neighbour(holes)
    outside |= holes & ~alone & see_through[:, None, None]
    brightest = _largest_near(values).astype(np.float32)
    at_edge = ~outside & _any_neighbour(outside)
    cover = np.where(outside, 0, np.where(at_edge, np.minimum(values / np.maximum(brightest, 1), 1), 1))
    cloth = np.where(at_edge, brightest, values)  # the edge is dim for the background in it, not for the cloth
    # each garment by its own bright parts: many are dark throughout, and their colour would not be seen
    inside = np.where(outside | at_edge, 0, values).reshape(len(values), -1)
    counts = (~(outside | at_edge)).sum(axis=(1, 2))
    inside.sort(axis=1)
    bright = inside[np.arange(len(inside)), SIZE * SIZE - 1 - counts // 10]  # a tenth of it is brighter
    white = np.where(counts, np.maximum(bright, _DIMMEST), 255)[:, None, None]
    shade = _SHADE + (1 - _SHADE) * np.minimum(cloth / white, 1)
    return cover.astype(np.float32), shade.astype(np.float32)


def joined_to_edge(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask, bool [N, 32, 32], that a path of neighbours within it joins to the edge of the image."""
    rows = np.packbits(mask, axis=-1, bitorder="little").view("<u4")[..., 0]  # a row of pixels is a number
    edge = np.full(SIZE, 0x80000001, np.uint32)
    edge[[0, -1]] = 0xFFFFFFFF
    reached = rows & edge
    while True:
        grown = reached | reached << 1 | reached >> 1
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= rows
        if np.array_equal(grown, reached):
            break
        reached = grown
    filled = reached.astype("<u4")[..., None].view(np.uint8)
    return np.unpackbits(filled, axis=-1, bitorder="little").astype(bool)


def _neighbours(images: np.ndarray, diagonal: bool) -> list[np.ndarray]:
    """Views of the images [N, H, W] moved by one pixel each way, zeros coming in."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    height, width = images.shape[1:]
    steps = [(y, x) for y in (0, 1, 2) for x in (0, 1, 2) if (y, x) != (1, 1) and (diagonal or 1 in (y, x))]
    return [padded[:, y : y + height, x : x + width] for y, x in steps]


def _any_neighbour(mask: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce(_neighbours(mask, diagonal=False))


def _largest_near(values: np.ndarray) -> np.ndarray:
    return np.maximum.reduce([values, *_neighbours(values, diagonal=True)])


# ------------------------------------------------------------------------------------------------ texts


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _colored(noun: str, color: str) -> str:
    """ "red sneaker", "pair of red trousers"."""
    return f"pair of {color} {noun.removeprefix('pair of ')}" if noun.startswith("pair of ") else f"{color} {noun}"


# of noun, colour and background; the fourth leaves the background open
TEMPLATES: tuple[Callable[[str, str, str], str], ...] = (
    lambda noun, color, ground: f"a photo of {_article(_colored(noun, color))} on {_article(ground)} background",
    lambda noun, color, ground: f"{_article(_colored(noun, color))} against {_article(ground)} backdrop",
    lambda noun, color, ground: f"a picture of {_article(_colored(noun, color))} with {ground} all around it",
    lambda noun, color, ground: f"a photo of {_article(_colored(noun, color))}",
    lambda noun, color, ground: f"the {noun} in the middle is {color} and everything around it is {ground}",
)


def _tables() -> dict[str, np.ndarray]:
    """The texts of each entry by class, colour, background and variant: arrays of str [10, 8, 8, 5]."""
    shape = (len(FASHION_CLASSES), len(GARMENTS), len(BACKGROUNDS), len(TEMPLATES))
    tables = {entry: np.empty(shape, dtype=object) for entry in ENTRIES}

    def pick(words: Sequence[str], variant: int) -> str:
        return words[variant % len(words)]

    for label, color, ground, variant in np.ndindex(*shape):
        at, name = (label, color, ground, variant), FASHION_CLASSES[label]
        nouns, synonyms = NOUNS[name], _CLASS_SYNONYMS.get(name, NOUNS[name][1:])
        say = TEMPLATES[variant]
        tables["base"][at] = name
        tables["base_syn"][at] = pick(synonyms, variant)
        tables["caption"][at] = say(nouns[0], GARMENTS[color], BACKGROUNDS[ground])
        words = [pick(_COLOR_SYNONYMS[each], variant) for each in (GARMENTS[color], BACKGROUNDS[ground])]
        tables["caption_syn"][at] = say(pick(nouns[1:], variant), *words)
    return tables


def _texts(labels: np.ndarray, colors: np.ndarray, backgrounds: np.ndarray, draws: np.ndarray) -> list[list[str]]:
    """The texts of each image, one an entry; `draws` [N, 4] are uniform on [0, 1) and choose among the variants."""
    variants = (draws * len(TEMPLATES)).astype(np.int64)
    columns = [table[labels, colors, backgrounds, variants[:, index]] for index, table in enumerate(_tables().values())]
    return np.stack(columns, axis=1).tolist()
