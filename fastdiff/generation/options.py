"""The options of decoding on a command line: one for each field of `MaskedDiffusionGenerationConfig`."""

import json
from collections.abc import Mapping
from typing import Any

from docstring_parser import parse
from jsonargparse import SUPPRESS, ActionYesNo, ArgumentParser

from fastdiff.generation.config import LENGTHS, MaskedDiffusionGenerationConfig
from fastdiff.ops.unmask import ORDERS, RULES

# Types of the fields whose default, None, does not tell. A field that is in neither is read as JSON, or else as text.
_TYPES: dict[str, Any] = {
    "num_inference_steps": int, "block_length": int, "top_k": int, "top_p": float, "threshold": float,
    "factor": float, "entropy_budget": float, "seed": int, "cache_refresh_interval": int,
}  # fmt: skip
_LISTS: dict[str, Any] = {"suppress_tokens": int, "stop_strings": str}
_CHOICES = {"unmasking_rule": RULES, "unmasking_order": ORDERS, "length": LENGTHS}


def add_generation_options(parser: ArgumentParser, defaults: Mapping[str, Any] | None = None) -> None:
    """Adds an option for each field that the parser does not have yet; what is not given is not in its result.

    `defaults` are told in the help where they are others than the configuration's.
    """
    meanings, defaults = _meanings(), defaults or {}
    taken = {action.dest for action in parser._actions}
    for name, default in MaskedDiffusionGenerationConfig.option_defaults().items():
        if name in taken:
            continue
        option, told = "--" + name.replace("_", "-"), defaults.get(name, default)
        told = f"default: {told}" if told is not None else "default: none"
        common = dict(default=SUPPRESS, help=f"{meanings.get(name, '')} ({told})".strip())
        if isinstance(default, bool):
            parser.add_argument(option, action=ActionYesNo(no_prefix="no-"), **common)
        elif name in _CHOICES:
            parser.add_argument(option, choices=_CHOICES[name], **common)
        elif name in _LISTS:
            parser.add_argument(option, type=_LISTS[name], nargs="+", **common)
        else:
            parser.add_argument(option, type=_TYPES.get(name) or _type_of(default), **common)


def generation_options(arguments: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` (a recipe's `sampling.generation`), replaced by what the command line says.

    The number of a rule that the command line leaves is dropped with it: `--unmasking-rule count` on a recipe with a
    threshold.
    """
    given = {name: getattr(arguments, name, None) for name in MaskedDiffusionGenerationConfig.option_defaults()}
    given = {name: value for name, value in given.items() if value is not None}
    options = {**defaults, **given}
    if given.get("max_new_tokens") == 0:  # fills the prompt's masks: a recipe's blocks of new tokens mean nothing then
        for name in {"block_length", "num_inference_steps", "length"} - given.keys():
            options.pop(name, None)
    rule = given.get("unmasking_rule")
    if rule is not None:
        numbers = {"threshold", "factor", "entropy_budget"} - {rule}
        if rule not in ("count", "ancestral"):
            numbers.add("num_inference_steps")
        for name in numbers & defaults.keys() - given.keys():
            options.pop(name, None)
    return options


def _type_of(default: Any) -> Any:
    return _json_or_text if default is None else type(default)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _meanings() -> dict[str, str]:
    """What the docstring of the configuration says of each field."""
    meanings = {}
    for entry in parse(MaskedDiffusionGenerationConfig.__doc__ or "").params:
        for name in entry.arg_name.split(","):
            meanings[name.strip()] = " ".join((entry.description or "").replace("`", "").split())
    return meanings
