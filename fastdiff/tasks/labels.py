"""Names of classes."""

import difflib
from collections.abc import Sequence

_LISTED = 20  # names of classes that an error lists


def label_of(value: int | str, class_names: Sequence[str]) -> int:
    """The label that a number, a class name or the text of a number means.

    Raises ValueError for what is not a class; one line, with the names there are, or the nearest ones of many.
    """
    if isinstance(value, str):
        value = value.strip()
        if value in class_names:
            return list(class_names).index(value)
        number = int(value) if value.isdecimal() else None
    else:
        number = int(value)
    if number is not None and 0 <= number < len(class_names):
        return number
    known = f"0 to {len(class_names) - 1}" + _names_like(str(value), class_names)
    raise ValueError(f"labels: got {value!r}; expected {known if class_names else 'none: there are no classes'}")


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Labels from "0,3,7" or class names, in the order given. Raises ValueError for what is not a class."""
    if text in class_names:  # which may have commas in it
        return [label_of(text, class_names)]
    return [label_of(part, class_names) for part in text.split(",")]


def _names_like(value: str, class_names: Sequence[str]) -> str:
    if all(name.isdecimal() for name in class_names):  # the names are the numbers
        return ""
    if len(class_names) <= _LISTED:
        return f" or one of {', '.join(class_names)}"
    close = difflib.get_close_matches(value, class_names, n=3, cutoff=0.4)
    return f" or a class's name{', such as ' + ' or '.join(map(repr, close)) if close else ''}"
