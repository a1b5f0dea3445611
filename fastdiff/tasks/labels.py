"""Names of classes."""

from collections.abc import Sequence


def parse_labels(text: str, class_names: Sequence[str]) -> list[int]:
    """Labels from "0,3,7" or class names, in the order given. Raises ValueError for what is not a class."""
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part in class_names:
            labels.append(class_names.index(part))
        elif part.isdecimal() and int(part) < len(class_names):
            labels.append(int(part))
        else:
            raise ValueError(
                f"labels: got {part!r}; expected 0 to {len(class_names) - 1} or one of {', '.join(class_names)}"
            )
    return labels
