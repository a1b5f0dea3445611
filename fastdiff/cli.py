"""What the commands share: options made from dataclasses."""

import dataclasses
import json
import logging
import os
import sys
import types
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import SUPPRESS, ActionYesNo

from fastdiff.arguments import ArgumentParser, meanings_of
from fastdiff.errors import one_line
from fastdiff.tasks.options import GenerationOptions

# Types of the fields whose default, None, does not tell. A field that is in neither is read as JSON, or else as text.
_TYPES: dict[str, Any] = {
    "num_inference_steps": int, "block_length": int, "top_k": int, "top_p": float, "threshold": float,
    "factor": float, "entropy_budget": float, "seed": int, "cache_refresh_interval": int, "eps": float,
    "alg_temp": float,
}  # fmt: skip
_LISTS: dict[str, Any] = {
    "suppress_tokens": int, "begin_suppress_tokens": int, "cfg_keep_tokens": int, "stop_strings": str,
}  # fmt: skip


def action_command(action: str, about: str, argv: Sequence[str] | None) -> None:
    """`fastdiff <action> RUN [options]`: does a kind's action on a run; the options are those that fit the run."""
    from fastdiff.tasks.kinds import KINDS, action_of, kind_named
    from fastdiff.training.run_folder import locate
    from fastdiff.tuning import using

    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = f"fastdiff {action} RUN [options]"
    path = find_path(arguments) or find_path(arguments, _switches(action))
    if path is None:
        parser = ArgumentParser(prog=f"fastdiff {action}", usage=usage, exit_on_error=False, allow_abbrev=False)
        able = {name: kind_named(name) for name in KINDS if getattr(kind_named(name), action) is not None}
        kinds = "; ".join(f"{kind.about} ({name})" for name, kind in able.items())
        parser.description = f"{about} RUN is a run's folder (its newest checkpoint), one of its checkpoints, a saved "
        parser.description += f"model, or a hub id: {kinds}."
        parser.epilog = f"The options depend on the run: fastdiff {action} RUN --help lists them."
        parser.parse_args(arguments)  # --help ends here
        raise ValueError(f"no run given; expected: {usage}")
    kind, act = action_of(path, action)
    options = kind.options_of(action)
    parser = ArgumentParser(
        prog=f"fastdiff {action}", usage=usage, description=one_line(parse(options.__doc__ or "").description),
        exit_on_error=False, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("run", type=str, help="a run's folder, one of its checkpoints, a saved model, or a hub id")
    unfit, told = (getattr(options, name, None) for name in ("unfit", "told"))
    add_options(parser, options, unfit(path) if unfit else (), told(path) if told else {})
    arguments.remove(path)
    given = vars(parser.parse_args([path, *arguments]))  # first: an option with several values would take it
    made = options_from(options, given)
    quiet_libraries()
    folder, _ = locate(given["run"])
    with using(folder.choices() or None):  # what the run goes by, or what is measured
        act(given["run"], made)


def find_path(arguments: Sequence[str], switches: Collection[str] = ()) -> str | None:
    """The run among a command's arguments, whose options are not known yet; None where there is none.

    It is the first argument where that is no option; or else one that exists; or else the first that cannot be an
    option's value. `switches` are options that are known to take none.
    """
    words = [word for word in arguments if word[:1] != "-"]
    if words and arguments[0] == words[0]:
        return words[0]
    there = [word for word in words if os.path.lexists(word)]
    pairs = zip(["", *arguments], arguments, strict=False)
    sure = [
        word for before, word in pairs if word[:1] != "-" and (before[:1] != "-" or "=" in before or before in switches)
    ]
    return next(iter([*(word for word in there if word in sure), *there, *sure]), None)


def _switches(action: str) -> set[str]:
    """The options without a value that some kind has for a command."""
    from fastdiff.tasks.kinds import KINDS, kind_named

    kinds = [kind for kind in map(kind_named, KINDS) if getattr(kind, action) is not None]
    options = [kind.options_of(action) for kind in kinds]
    return {
        "--" + name.replace("_", "-") for each in options for name, hint in get_type_hints(each).items() if hint is bool
    }


def add_options(
    parser: ArgumentParser, options: type, without: Collection[str] = (), told: Mapping[str, str] | None = None
) -> None:
    """Adds an option for each field of a dataclass; what is not given is not in the parser's result.

    Fields in `without` get none: a dataclass whose options depend on the run has a static method `unfit(path)`, which
    names them. `told` is what the help says of fields beside their meaning; a static method `told(path)` gives it.

    The docstring's Attributes are the help. A field of type `GenerationOptions` stands for all options of decoding that
    the class does not have itself. `metadata` of a field are further arguments of `add_argument`.
    """
    meanings, hints = _help_of(options), get_type_hints(options)
    decoding = None
    for field in dataclasses.fields(options):
        if field.name in without:
            continue
        if hints[field.name] is GenerationOptions:
            decoding = field
            continue
        kind, default = _without_none(hints[field.name]), field.default
        if default is None or default is False or default is dataclasses.MISSING:
            said = (told or {}).get(field.name, "").replace("%", "%%")
        else:
            said = f"default: {default}"
        text = meanings.get(field.name, "") + (f" ({said})" if said else "")
        common: dict[str, Any] = {"default": SUPPRESS, "help": text, **field.metadata}
        option = "--" + field.name.replace("_", "-")
        if kind is bool:
            common["action"] = ActionYesNo(no_prefix="no-") if default else "store_true"
        elif get_origin(kind) is list:
            common |= {"type": get_args(kind)[0]} | ({} if "action" in common else {"nargs": "+"})
        elif get_origin(kind) is Literal:
            common["choices"] = get_args(kind)
        else:
            common["type"] = kind
        parser.add_argument(option, **common)
    if decoding is not None:
        _add_generation_options(parser, decoding.metadata.get("defaults", {}))


def options_from(options: type, given: dict[str, Any]) -> Any:
    """The dataclass made of what a parser of `add_options` found. Its own checks run here."""
    hints, own = get_type_hints(options), {field.name for field in dataclasses.fields(options)}
    values = {name: value for name, value in given.items() if name in own}
    for name in own:
        if hints[name] is GenerationOptions:
            from fastdiff.generation.config import MaskedDiffusionGenerationConfig  # transformers: a second

            decoding = set(MaskedDiffusionGenerationConfig.option_defaults()) - own
            values[name] = GenerationOptions({key: value for key, value in given.items() if key in decoding})
    return options(**values)


def _without_none(kind: Any) -> Any:
    """`int` of `int | None`."""
    if get_origin(kind) in (types.UnionType, Union):
        return next(each for each in get_args(kind) if each is not types.NoneType)
    return kind


def _add_generation_options(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Adds an option for each field that the parser does not have yet; what is not given is not in its result.

    The help names those of `defaults` that differ from the configuration's.
    """
    from fastdiff.generation.config import CHOICES, MaskedDiffusionGenerationConfig

    meanings = _help_of(MaskedDiffusionGenerationConfig)
    taken = {action.dest for action in parser._actions}
    for name, default in MaskedDiffusionGenerationConfig.option_defaults().items():
        if name in taken:
            continue
        option, told = "--" + name.replace("_", "-"), defaults.get(name, default)
        told = f"default: {told}" if told is not None else "default: none"
        common = dict(default=SUPPRESS, help=f"{meanings.get(name, '')} ({told})".strip())
        if isinstance(default, bool):
            parser.add_argument(option, action=ActionYesNo(no_prefix="no-"), **common)
        elif name in CHOICES:
            parser.add_argument(option, choices=CHOICES[name], **common)
        elif name in _LISTS:
            parser.add_argument(option, type=_LISTS[name], nargs="+", **common)
        else:
            parser.add_argument(option, type=_TYPES.get(name) or _type_of(default), **common)


def _type_of(default: Any) -> Any:
    return _json_or_text if default is None else type(default)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _help_of(options: type) -> dict[str, str]:
    """What docstrings say of each field, as argparse takes it."""
    return {name: text.replace("%", "%%") for name, text in meanings_of(options).items()}


def quiet_libraries() -> None:
    """Silences what libraries imported so far say that a user of a command can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # remarks on the type of our models
        transformers_logging.disable_progress_bar()  # its bars of one shard would break the lines of ours
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each try to reach the hub
