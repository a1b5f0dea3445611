"""Which texts stand for an image."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdiff.data import ImageData
from fastdiff.data.captions import CaptionedData, Captions
from fastdiff.errors import named

_SHOWN = 12  # held-out texts of a picture of samples, where the recipe names none


def captions_of(data: ImageData) -> Captions:
    """The texts of a data set; of one without texts, the names of its classes."""
    if isinstance(data, CaptionedData):
        return data.captions
    train, held_out = (part.labels.to(torch.int32)[:, None] for part in (data.train, data.held_out))
    return Captions(tuple(data.class_names), ("name",), train, held_out)


def trained_texts(captions: Captions, left_out: Sequence[str] = ()) -> tuple[tuple[str, ...], Tensor]:
    """The different texts of the images to train on, and which of them each has: int64 [N, E], -1 for none.

    Columns of the entries `left_out` have none.
    """
    unused = torch.tensor([name in left_out for name in captions.entries])
    rows = captions.train.long().clamp(min=-1).masked_fill(unused, -1)
    used, places = rows.unique(return_inverse=True)
    known = used[used >= 0].tolist()
    return tuple(captions.texts[index] for index in known), places - (len(used) - len(known))


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ValueError for weights of texts, by entry, that are no numbers of 0 or more; a recipe's entry_weights."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"{named('entry_weights')}.{name}: got {weight!r}; expected a number of 0 or more")


class TextChoice:
    """Chooses one of the texts of each image, by numbers that are drawn elsewhere.

    Args:
        texts: int [N, E], indices of texts; -1 where an image has no such text.
        entries: what each of the E columns is.
        weights: how often columns are chosen, by entry; 1 where it is not named. Messages call it entry_weights.

    Raises ValueError for a weight of an entry that there is not, and where an image is left without a text.
    """

    def __init__(self, texts: Tensor, entries: Sequence[str], weights: Mapping[str, float]) -> None:
        unknown = [name for name in weights if name not in entries]
        if unknown:
            raise ValueError(
                f"{named('entry_weights')}: got {unknown[0]!r}; the texts of the data are "
                f"{', '.join(dict.fromkeys(entries))}"
            )
        self.texts = texts.long()
        self.weights = torch.tensor([float(weights.get(name, 1.0)) for name in entries], dtype=torch.float64)
        without = ~((self.texts >= 0) & (self.weights > 0)).any(1)
        if without.any():
            index = int(without.nonzero()[0])
            raise ValueError(
                f"{named('entry_weights')}: got {dict(weights)}, which leave image {index} and "
                f"{int(without.sum()) - 1} others without a text; give another entry a weight"
            )

    def __call__(self, indices: Tensor, draws: Tensor) -> Tensor:  # [n], uniform on [0, 1) [n] -> int64 [n]
        """The index of a text for each image."""
        texts = self.texts[indices]
        shares = torch.where(texts >= 0, self.weights, 0.0).cumsum(1)
        chosen = (draws.double()[:, None] * shares[:, -1:] >= shares).sum(1)
        return texts.gather(1, chosen.clamp(max=texts.shape[1] - 1)[:, None])[:, 0]


def shown_texts(captions: Captions) -> list[str]:
    """Some different held-out texts, spread evenly over the images: those of a picture that names none."""
    count = len(captions.held_out)
    found: dict[str, None] = {}
    for image in (torch.arange(4 * _SHOWN) * count // (4 * _SHOWN)).unique().tolist():
        row = [index for index in captions.held_out[image].tolist() if index >= 0]
        if row and len(found) < _SHOWN:
            found[captions.texts[row[image % len(row)]]] = None
    return list(found)
