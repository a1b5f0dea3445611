"""Texts about images: which an image has, what is measured of it, and which combinations were trained on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fastdiff.data.images import ImageData, ImageSet

Part = Literal["train", "held_out"]


@dataclass(frozen=True)
class Captions:
    """Texts of images, each kept once.

    Attributes:
        texts: the different texts of both parts, in a fixed order.
        entries: what each column is: "base", "base_syn", "caption", "caption_syn", "name", "alias". Names may repeat.
        train: int32 [N, E]: an index into texts, or -1 where the image has no such text.
        held_out: int32 [M, E].
    """

    texts: tuple[str, ...]
    entries: tuple[str, ...]
    train: Tensor
    held_out: Tensor

    @staticmethod
    def of(
        entries: Sequence[str], train: Sequence[Sequence[str | None]], held_out: Sequence[Sequence[str | None]]
    ) -> "Captions":
        """From the texts of each image: rows of one text an entry, None where there is none."""
        numbers: dict[str | None, int] = {None: -1}
        for row in (*train, *held_out):
            for text in row:
                numbers.setdefault(text, len(numbers) - 1)

        def part(rows: Sequence[Sequence[str | None]]) -> Tensor:
            flat = torch.tensor([numbers[text] for row in rows for text in row], dtype=torch.int32)
            return flat.view(len(rows), len(entries))

        texts = tuple(text for text in numbers if text is not None)
        return Captions(texts, tuple(entries), part(train), part(held_out))

    def rows(self, part: Part, entries: Sequence[str] | None = None) -> Tensor:
        """The columns of these entries (of all if None): int32 [N, …]. Raises ValueError for an entry there is not."""
        table = self.train if part == "train" else self.held_out
        if entries is None:
            return table
        unknown = sorted(set(entries) - set(self.entries))
        if unknown:
            raise ValueError(f"entries: got {', '.join(unknown)}; expected of {', '.join(dict.fromkeys(self.entries))}")
        return table[:, [index for index, name in enumerate(self.entries) if name in entries]]

    def fingerprint(self) -> str:
        """A hash of the texts and of which image has which."""
        digest = hashlib.sha256("\n".join((*self.entries, "", *self.texts)).encode(errors="surrogateescape"))
        for table in (self.train, self.held_out):
            digest.update(table.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Attribute:
    """Something that an image shows and a classifier can tell: its values by number.

    Attributes:
        names: by value.
        train: int64 [N].
        held_out: int64 [M].
    """

    names: tuple[str, ...]
    train: Tensor
    held_out: Tensor

    def number(self, value: int | str) -> int:
        """The number of a value, or of its name. Raises ValueError for what is neither."""
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if isinstance(value, str) or not 0 <= value < len(self.names):
            raise ValueError(f"value: got {value!r}; expected one of {', '.join(self.names)}")
        return int(value)


@dataclass(frozen=True)
class AttributedImages:
    """Images and what they show.

    Attributes:
        images: K of them.
        values: int64 [K] by attribute.
    """

    images: ImageSet
    values: dict[str, Tensor]


@dataclass(frozen=True)
class CaptionedData(ImageData):
    """Labelled images with texts.

    Attributes:
        captions: the texts.
        attributes: what is measured of samples, by name; {} where nothing is.
        seen: bool [M], of held-out images: their combination of attributes was trained on; None where all were.
        every_combination: what classifiers that measure samples learn from: training images with all combinations,
            those of `seen` False, too. A classifier that never saw a purple sneaker takes it for something else. None
            is the part to train on.
    """

    captions: Captions
    attributes: dict[str, Attribute]
    seen: Tensor | None = None
    every_combination: AttributedImages | None = None

    @cached_property
    def images_fingerprint(self) -> str:
        """A hash of images, classes and attributes."""
        digest = hashlib.sha256("\n".join((self.name, *self.class_names)).encode(errors="surrogateescape"))
        for part in (self.train.fingerprint(), self.held_out.fingerprint()):
            digest.update(part.encode())
        for name, attribute in self.attributes.items():
            digest.update("\n".join((name, *attribute.names)).encode(errors="surrogateescape"))
            for values in (attribute.train, attribute.held_out):
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of images, classes, attributes and texts."""
        return hashlib.sha256(f"{self.images_fingerprint} {self.captions.fingerprint()}".encode()).hexdigest()

    def values(self, part: Part, names: Sequence[str] | None = None) -> Tensor:
        """The attributes of each image, a column each: int64 [N, A]. Raises ValueError for one that there is not."""
        names = list(self.attributes) if names is None else names
        unknown = [name for name in names if name not in self.attributes]
        if unknown:
            known = ", ".join(self.attributes) or "none"
            raise ValueError(f"attributes: got {', '.join(unknown)}; expected of {known}")
        columns = [getattr(self.attributes[name], part) for name in names]
        return torch.stack(columns, dim=1) if columns else torch.empty(len(getattr(self, part)), 0, dtype=torch.long)

    def combinations(
        self, names: Sequence[str] | None = None, *, part: Part = "held_out", seen: bool | None = None
    ) -> list[dict[str, int]]:
        """The combinations of attributes that images of a part have, each once, in a fixed order.

        Args:
            names: the attributes; None takes all.
            part: "train" or "held_out".
            seen: of held-out images, True takes those whose combination was trained on, False the others, None all.
        """
        names = list(self.attributes) if names is None else list(names)
        values = self.values(part, names)
        if part == "held_out" and self.seen is not None and seen is not None:
            values = values[self.seen == seen]
        elif seen is False:
            values = values[:0]
        return [dict(zip(names, row, strict=True)) for row in values.unique(dim=0).tolist()]

    def trained_on(self, values: Mapping[str, Tensor]) -> Tensor:  # int64 [K] each -> bool [K]
        """Whether combinations of values of some attributes are in the part to train on."""
        names = list(values)
        wanted = torch.stack([values[name].long() for name in names], dim=1)  # [K, A]
        known = self.values("train", names).unique(dim=0)
        return (wanted[:, None] == known).all(-1).any(-1)

    def prompts_of(
        self,
        combination: Mapping[str, int | str],
        *,
        part: Part = "held_out",
        entries: Sequence[str] = ("caption",),
    ) -> tuple[str, ...]:
        """The texts that say all of a combination: those that images with it have, and no others.

        Args:
            combination: values by attribute, as numbers or names: {"class": "sneaker", "color": "red"}.
            part: where they are looked for. Combinations that were never trained on are in "held_out" alone.
            entries: which texts; see `Captions`.

        Returns:
            The texts in a fixed order; () where no image has the combination, or no text says it all.

        Raises:
            ValueError: an attribute, value or entry that there is not.
        """
        wanted = [self.attributes[name].number(value) for name, value in combination.items() if name in self.attributes]
        fits = (self.values(part, list(combination)) == torch.tensor(wanted, dtype=torch.long)).all(dim=1)
        table = self.captions.rows(part, entries)
        said, elsewhere = table[fits].unique(), table[~fits].unique()
        only = said[(said >= 0) & ~torch.isin(said, elsewhere)]
        return tuple(self.captions.texts[index] for index in only.tolist())
