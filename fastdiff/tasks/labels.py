"""Names of classes."""

import difflib
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LISTED = 20  # names of classes that an error lists


def label_of(value: int | str, class_names: Sequence[str]) -> int:
    """The label that a number, a class name or the text of a number means.

    Where names list synonyms, as ImageNet's "tench, Tinca tinca", one of them is enough if it is of one class only.

    Raises ValueError for what is not a class, TypeError for what cannot be one; one line, with the names there are, or
    the nearest ones of many.
    """
    label = _named(value, class_names) if isinstance(value, str) else None
    return _numbered(value, class_names) if label is None else label


def labels_of(values: "Iterable[int | str] | Tensor | int | str", class_names: Sequence[str]) -> list[int]:
    """The labels of numbers, class names or texts of numbers, one or several, in the order given.

    Texts of digits are names where all texts are names, else numbers: of the classes "1", "10" and "2" the texts "1"
    and "10" are the labels 0 and 1, but "0", "1" and "2" are 0, 1 and 2.

    Raises as `label_of` does.
    """
    single = isinstance(values, int | str) or getattr(values, "ndim", 1) == 0  # ndim: of tensors and NumPy's numbers
    values = [values] if single else values
    try:
        values = [value if isinstance(value, str) else _index(value) for value in values]
    except TypeError:
        raise TypeError(f"labels: got {values!r}; expected class labels or names, one or several") from None
    texts = [value for value in values if isinstance(value, str)]
    if all(_named(text, class_names) is not None for text in texts):
        return [label_of(value, class_names) for value in values]
    digits = [isinstance(value, str) and value.strip().isdecimal() for value in values]
    return [
        (_numbered if is_digits else label_of)(value, class_names)
        for value, is_digits in zip(values, digits, strict=True)
    ]


def _index(value: int) -> int:
    if isinstance(value, bool):  # which Python takes for 0 or 1
        raise TypeError
    return operator.index(value)


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Labels from "0,3,7" or class names, in the order given. Raises ValueError for what is not a class."""
    if _named(text, class_names) is not None:  # which may have commas in it
        return [label_of(text, class_names)]
    return labels_of(text.split(","), class_names)


def _named(text: str, class_names: Sequence[str]) -> int | None:
    """The label of a name, or of a synonym in one name only; None where there is none."""
    text = text.strip()
    if text in class_names:
        return list(class_names).index(text)
    having = [index for index, name in enumerate(class_names) if text in map(str.strip, name.split(","))]
    return having[0] if len(having) == 1 else None


def _numbered(value: int | str, class_names: Sequence[str]) -> int:
    """The label that a number or its text is."""
    if isinstance(value, str):
        value = value.strip()
        number = int(value) if value.isdecimal() else None
    else:
        number = operator.index(value)
    if number is not None and 0 <= number < len(class_names):
        return number
    known = f"0 to {len(class_names) - 1}" + _names_like(str(value), class_names)
    raise ValueError(f"labels: got {value!r}; expected {known if class_names else 'none: there are no classes'}")


def _names_like(value: str, class_names: Sequence[str]) -> str:
    if all(name.isdecimal() for name in class_names):  # the names are the numbers
        return ""
    if len(class_names) <= _LISTED:
        return f" or one of {', '.join(class_names)}"
    close = difflib.get_close_matches(value, class_names, n=3, cutoff=0.4)
    return f" or a class's name{', such as ' + ' or '.join(map(repr, close)) if close else ''}"
