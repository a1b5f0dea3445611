"""What data a run was trained on, and whether it still is that.

A checkpoint's trainer_state.json holds, under "data", the record of each data set (`LabelledData.record`,
`TextData.record`) by the section of the recipe that names it. Resuming and evaluation compare it with what the recipe
names now, of every kind of task.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Record = dict[str, Any]  # plain values
_LISTED = 3  # names of each sort that a message lists


class DataSet(Protocol):
    """What a task was trained on."""

    def record(self) -> Record:
        """Its name, fingerprint, number of examples, and what it has of classes, columns and tokenizer."""
        ...


def records_of(data: Mapping[str, DataSet]) -> dict[str, Record]:
    """The records of data sets by their sections, as a checkpoint keeps them."""
    return {section: each.record() for section, each in data.items()}


def check_data(state: Mapping[str, Any], now: Mapping[str, Record], run: str, accept: bool, option: str) -> None:
    """Compares the data of a recipe with what a checkpoint was trained on.

    Where the checkpoint does not tell, as those of fastdiff 0.1.0 do not, a line on stderr says so.

    Args:
        state: the checkpoint's trainer_state.json.
        now: of sections of the recipe, what their data is now.
        run: names the run in messages.
        accept: whether to go on with other data; a line on stderr says what changed.
        option: how to ask for that.

    Raises:
        ValueError: the data is not the same; the message says what changed. Classes in another order are refused even
            with `accept`: what the model learnt of one would be taken for another.
    """
    for section, record in now.items():
        _check_order(class_order(state, section), record.get("class_names"), section, run)
    before = _records(state)
    for section, record in now.items():
        changes = changes_of(before.get(section, {}), record)
        if changes and not accept:
            raise ValueError(
                f"{section}: got other data than the run {run} was trained on ({'; '.join(changes)}); expected the "
                f"same; bring it back, train anew, or pass {option} to go on with it"
            )
        if changes:
            print(f"{section}: going on with data that changed: {'; '.join(changes)}", file=sys.stderr)
    if now and "data" not in state:
        print(
            f"the run {run} is of fastdiff 0.1.0, which kept no record of its data and files: whether they are the "
            "same cannot be checked",
            file=sys.stderr,
        )


def class_order(state: Mapping[str, Any], section: str) -> list[str] | None:
    """The names of the classes in the order that a checkpoint's labels have; None where it has none."""
    return _records(state).get(section, {}).get("class_names")


def _check_order(before: Sequence[str] | None, now: Sequence[str] | None, section: str, run: str) -> None:
    if before and now and list(before) != list(now) and sorted(before) == sorted(now):
        raise ValueError(
            f"{section}.class_names: got another order of the classes than the run {run} was trained with; expected "
            f"that one, since labels would mean other classes; pass --{section}.class_names '{json.dumps(before)}'"
        )


def _records(state: Mapping[str, Any]) -> dict[str, Record]:
    """The records of a checkpoint."""
    return state["data"] if "data" in state else _of_before(state["task"])


def _of_before(task: Mapping[str, Any]) -> dict[str, Record]:
    """The names of classes, which fastdiff 0.1.0 kept among the facts of a task."""
    parts = {"data": task, **{f"{name}_data": facts for name, facts in task.get("modalities", {}).items()}}
    return {name: {"class_names": facts["class_names"]} for name, facts in parts.items() if "class_names" in facts}


def changes_of(before: Record, now: Record) -> list[str]:
    """What differs between two records of a data set, in words; what only one of them has is not looked at."""
    both = {name for name in before if name in now and before[name] != now[name]}
    found = []
    if "name" in both:
        found.append(f"it is {now['name']}, not {before['name']}")
    if "class_names" in both:
        found.append(_named("class", before["class_names"], now["class_names"]))
    statistics: list[str] = []
    if "columns" in both:
        names, statistics = _columns(before["columns"], now["columns"])
        found += names
    if "tokenizer" in both:
        found.append("another tokenizer")
    if "examples" in both:
        counts, known = now["examples"], before["examples"]
        found.append(
            f"{counts['train']} examples and {counts['held_out']} held-out ones, not {known['train']} and "
            f"{known['held_out']}"
        )
    if "fingerprint" in both and not found and not statistics:
        found.append("the same number of examples with other content")
    return found or statistics[:_LISTED]  # which change with the examples


def _columns(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between the columns of two tables, in names and kinds, and in means and deviations.

    A column is a list of its categories, or mean and deviation as a text.
    """
    if list(before) != list(now):
        return [_named("column", list(before), list(now))], []
    names, statistics = [], []
    for name, kept in now.items():
        if kept == before[name]:
            continue
        if isinstance(kept, list) and isinstance(before[name], list):
            names.append(f"column {name!r}: {_named('category', before[name], kept)}")
        elif isinstance(kept, list) or isinstance(before[name], list):
            names.append(f"column {name!r} has {'categories' if isinstance(kept, list) else 'numbers'} now")
        else:
            statistics.append(f"column {name!r} has {kept}, not {before[name]}")
    return names[:_LISTED], statistics


def _named(what: str, before: Sequence[str], now: Sequence[str]) -> str:
    """How a list of names differs from what it was."""
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    parts = [f"{what} {', '.join(map(repr, names[:_LISTED]))}{', …' if len(names) > _LISTED else ''} {how}"
             for names, how in ((gone, "gone"), (new, "new")) if names]  # fmt: skip
    return ", ".join(parts) or f"another order of {what} names"
