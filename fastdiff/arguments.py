"""Command lines: jsonargparse's parser, with its errors in our words and with a help that fits on a page."""

import dataclasses
import difflib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NoReturn

from docstring_parser import parse
from jsonargparse import ArgumentParser as _ArgumentParser

from fastdiff.errors import one_line

_WORDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
    "<class 'list'>": "a list, as in [a, b]",
    "<class 'tuple'>": "a list, as in [a, b]",
    "<class 'dict'>": "fields, as in {name: value}",
}
_KEY = re.compile(r"""Parser key ["']([\w.]+)["']: """)
_INNER = re.compile(_KEY.pattern + r".*Problem with given class_path '[^']*': (\w+: got .*?; expected .*?) - Expected ")
_GOT = re.compile(r"(?:Got value|Given value): (.*)$")
_EXPECTED = re.compile(
    r"Expected an? (<class '\w+'>|typing\.Literal\[.*?\]|tuple with \d+ elements|list\[[^]]*\]|dict\b|\w+)"
)
_CHOICE = re.compile(r"argument (--[\w.-]+): invalid choice: (.+?) \(choose from (.*)\)$")
_NO_VALUE = re.compile(r"argument (--[\w.-]+): expected (?:one argument|at least one argument)$")
_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)", re.IGNORECASE)
_MEANING_AT, _NARROWEST = 44, 120  # columns of `short_help`


class ArgumentParser(_ArgumentParser):
    """jsonargparse's, whose errors are `name: got X; expected Y`, with advice where an option does not exist."""

    of_recipe = False  # whether its options are fields, which messages call by their section and name

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        super().error(self._in_our_words(one_line(message)), *args, **kwargs)

    def _in_our_words(self, message: str) -> str:  # it comes here twice
        if unknown := _UNKNOWN.match(message):
            return message if "did you mean" in message or "; expected" in message else self._unknown(message, unknown)
        if choice := _CHOICE.search(message):
            return f"{choice[1]}: got {choice[2]}; expected one of {choice[3]}"
        if option := _NO_VALUE.search(message):
            return f"{option[1]}: got no value; expected one"
        if inner := _INNER.search(message):  # a field of a section that may be null
            return f"{inner[1]}.{inner[2]}"
        key, got = _KEY.search(message), _GOT.search(message)
        expected = list(dict.fromkeys(_in_words(each) for each in _EXPECTED.findall(message)))
        if not key or not got or not expected:
            return message
        return f"{self._option(key[1])}: got {got[1]}; expected {' or '.join(expected)}"

    def _unknown(self, message: str, unknown: re.Match[str]) -> str:
        if not unknown[1].startswith("-"):
            if all(action.option_strings for action in self._actions):
                return f"{message}; expected options alone"
            return f"{message}; expected one value for an option, several with commas, as in --labels 0,1"
        close = difflib.get_close_matches(unknown[1].partition("=")[0], self._option_string_actions, n=1, cutoff=0.8)
        return f"{message}; did you mean {close[0]}?" if close else message

    def _option(self, key: str) -> str:
        """How messages call a value: a field of a recipe by its section, an option of a command as it is typed."""
        option = "--" + key.replace("_", "-")
        return option if not self.of_recipe and option in self._option_string_actions else key


def _in_words(kind: str) -> str:
    if kind.startswith("typing.Literal["):
        choices = kind.removeprefix("typing.Literal[").removesuffix("]")
        return f"one of {choices}" if "," in choices else choices
    return _WORDS.get(kind) or ("a list, as in [a, b]" if kind.startswith("list[") else f"a {kind}")


def meanings_of(options: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each field, in one line each."""
    meanings: dict[str, str] = {}
    for each in options.__mro__:
        for entry in parse(each.__dict__.get("__doc__") or "").params:
            for name in entry.arg_name.split(","):
                meanings.setdefault(name.strip(), one_line((entry.description or "").replace("`", "")))
    return meanings


def short_help(recipe: Any, values: Mapping[str, Any]) -> str:
    """A line for each field of a recipe: its option, its value, and the first sentence of what it means.

    Args:
        recipe: a dataclass of dataclasses.
        values: those of the fields to show, by section.
    """
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    about, lines = meanings_of(type(recipe)), []
    for name, value in values.items():
        section = getattr(recipe, name)
        if not dataclasses.is_dataclass(section):
            lines += ["", _line(name, value, about.get(name, ""), width)]
            continue
        lines += ["", f"{name}: {about.get(name, '')}"]
        meanings = meanings_of(type(section))
        lines += [
            _line(f"{name}.{field}", of_field, meanings.get(field, ""), width) for field, of_field in value.items()
        ]
    return "\n".join(lines)


def _line(name: str, value: Any, meaning: str, width: int) -> str:
    told = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    option = f"  --{name} {told if len(told) <= 24 else told[:23] + '…'}"
    sentence = re.split(r"(?<!al)\. (?=[A-Z])", meaning, maxsplit=1)[0].rstrip(".")
    room = width - max(_MEANING_AT, len(option) + 1)
    return f"{option:<{_MEANING_AT - 1}} {sentence if len(sentence) <= room else sentence[: room - 1] + '…'}"
