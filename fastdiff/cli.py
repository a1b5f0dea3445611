"""What the commands share: recipes from YAML and arguments, and errors as one line."""

import contextlib
import dataclasses
import difflib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentError
from jsonargparse import ArgumentParser as _ArgumentParser

Recipe = TypeVar("Recipe")
RECIPE_KINDS = ("dit", "masked_lm", "length_head", "qgfd")
# What a user can cause; anything else keeps its traceback, since it is a fault of ours.
_USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)


class ArgumentParser(_ArgumentParser):
    """jsonargparse's, with advice where an option does not exist."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message, re.IGNORECASE)
        if unknown and "did you mean" not in message:  # it comes here twice
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0.8)
            message += f"; did you mean {close[0]}?" if close else ""
        super().error(message, *args, **kwargs)


def one_line(message: object) -> str:
    """A message without line breaks."""
    return " ".join(str(message).split())


def fail(message: object, code: int) -> NoReturn:
    """Prints an error as one line and ends the process."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Makes a command of a function: its errors are printed as one line.

    Exit codes: 2 for what the user can mend (arguments, files, folders), 1 for a run that failed on its way.
    FASTDIFF_TRACEBACK=1 shows where an error comes from.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:
        from fastdiff.backends import BackendError
        from fastdiff.training.errors import TrainingError

        if os.environ.get("FASTDIFF_TRACEBACK") == "1":
            return main(argv)
        try:
            return main(argv)
        except (TrainingError, BackendError) as error:
            fail(error, 1)
        except ArgumentError as error:
            fail(f"{one_line(error)}; --help lists what there is", 2)
        except _USER_ERRORS as error:
            fail(error, 2)
        except OSError as error:
            if error.filename is None:  # not about a file of the user's
                raise
            fail(f"{error.filename}: {error.strerror}", 2)

    return wrapper


def program(command_name: str) -> str:
    """How the running command is called: `fastdiff train` (see fastdiff.__main__) or `python -m fastdiff.train`."""
    name = f"fastdiff {command_name}"
    return name if sys.argv[0] == name else f"python -m fastdiff.{command_name}"


def recipe_parser(recipe: type, command_name: str, description: str) -> ArgumentParser:
    """A parser of `RECIPE.yaml --section.field value …`, with every field of the dataclass `recipe`."""
    usage = f"{program(command_name)} RECIPE.yaml [--SECTION.FIELD VALUE ...]"
    parser = ArgumentParser(usage=usage, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--recipe", action=ActionConfigFile, help="a YAML file; the same as naming it first")
    parser.add_class_arguments(recipe, None)
    return parser


def parse_recipe(recipe: type[Recipe], argv: Sequence[str] | None, command_name: str, description: str) -> Recipe:
    """The recipe that a command line names, with its overrides.

    Raises:
        ArgumentError: an unknown key, a wrong type, or YAML that cannot be read.
        ValueError: a value out of range.
        FileNotFoundError: no such recipe.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--recipe")
    parser = recipe_parser(recipe, command_name, description)
    if not arguments:
        raise ValueError(f"no recipe given; expected: {parser.usage}")
    if arguments[0] == "--recipe" and len(arguments) > 1:
        if not Path(arguments[1]).is_file():
            raise FileNotFoundError(
                f"recipe {arguments[1]!r} is not a file; expected the path of a YAML recipe (a run goes on "
                "with its own and --training.resume true)"
            )
        check_recipe_file(recipe, Path(arguments[1]))
    values = parser.parse_args(arguments)
    return build(recipe, values)


def load_recipe(recipe: type[Recipe], path: Path) -> Recipe:
    """The recipe in a run's config.yaml.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not fit this version's recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the folder of a run of fastdiff.train")
    check_recipe_file(recipe, path)
    try:
        return build(recipe, recipe_parser(recipe, "train", "").parse_args(["--recipe", str(path)]))
    except ArgumentError as error:
        raise ValueError(f"{path} is not a recipe of this version: {one_line(error)}") from None


def recipe_kind(path: Path) -> str:
    """What a YAML recipe trains: its field `task`, or "dit" where it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or a task that is not known; the message names the file.
    """
    content = _read_recipe_file(path)
    task = content.get("task", "dit") if isinstance(content, dict) else "dit"
    if task not in RECIPE_KINDS:
        raise ValueError(
            f"{path}: task is {task!r}; expected one of {', '.join(RECIPE_KINDS)} (dit where it is left out)"
        )
    return task


def check_recipe_file(recipe: type, path: Path) -> None:
    """Checks that a file is YAML, and has no other sections and fields than the dataclass `recipe`.

    Fields of `recipe` that are no dataclasses themselves, such as `task`, stand in the file beside the sections. A
    section that may be left out may be null.

    Raises:
        ValueError: it names the file and what is wrong in it.
    """
    content = _read_recipe_file(path)
    sections = {field.name: _section(field.type) for field in dataclasses.fields(recipe)}
    optional = {field.name for field in dataclasses.fields(recipe) if field.default is None}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {content!r}; expected the sections {', '.join(sections)}")
    for section, fields in content.items():
        section, _, field = str(section).partition(".")  # "model.depth: 2" is "model: {depth: 2}"
        if section not in sections:
            raise ValueError(f"{path}: there is no section {section!r}; expected {', '.join(sections)}")
        if sections[section] is None:
            if field or isinstance(fields, dict):
                raise ValueError(f"{path}: {section} has fields below it; expected one value, as in {section}: VALUE")
            continue
        if fields is None and section in optional:
            continue
        fields = {field: fields} if field else fields
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: {section} is {fields!r}; expected fields below it, as in {section}: {{name: value}}; "
                "--help lists them"
            )
        known = [each.name for each in dataclasses.fields(sections[section])]
        for name in fields:
            name = str(name).partition(".")[0]  # "sampling.generation.seed: 1"
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                advice = f"did you mean {section}.{close[0]}? " if close else ""
                raise ValueError(f"{path}: there is no field {section}.{name}; {advice}--help lists the fields")


def _read_recipe_file(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ValueError(f"{place}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML text ({one_line(error)})") from None


def build(recipe: type[Recipe], values: Any) -> Recipe:
    """Dataclasses from jsonargparse's namespace; their own checks run here."""
    parts = {}
    for field in dataclasses.fields(recipe):
        value, section = getattr(values, field.name), _section(field.type)
        if section is None or value is None:
            parts[field.name] = value
            continue
        with naming_section(field.name):
            parts[field.name] = section(**vars(value))
    return recipe(**parts)


@contextlib.contextmanager
def naming_section(name: str) -> Iterator[None]:
    """Errors of data sets speak of "data.folder"; within the block, for a section "audio_data", of that one's."""
    try:
        yield
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        message = re.sub(r"\bdata\.(?=[a-z_])", f"{name}.", str(error))
        if not name.endswith("_data") or message == str(error):
            raise
        kind = next(k for k in (FileNotFoundError, ModuleNotFoundError, ValueError) if isinstance(error, k))
        raise kind(message) from None


def _section(kind: Any) -> type | None:
    """The dataclass that a field of a recipe holds, also where it may be None; None for a plain value."""
    return next((each for each in (kind, *get_args(kind)) if dataclasses.is_dataclass(each)), None)


def run_parser(command_name: str, description: str) -> ArgumentParser:
    """A parser for a command on a run: the run and how to sample from it; None is what the run's recipe says."""
    parser = ArgumentParser(
        prog=program(command_name), description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("run", type=str, help="a run's folder (the newest checkpoint), or one of its checkpoints")
    parser.add_argument("--guidance-scale", type=float | None, help="classifier-free guidance; 1 is none")
    parser.add_argument("--num-inference-steps", type=int | None, help="denoising steps")
    parser.add_argument("--sampler", type=str | None, help="euler, ddpm, ddim, dpm-solver++ or renoise")
    parser.add_argument("--seed", type=int | None, help="of the first sample; sample i has seed + i")
    parser.add_argument("--weights", type=Literal["ema", "model"], default="ema", help="averaged or plain weights")
    parser.add_argument("--device", type=str | None, help="for example cpu or cuda")
    return parser


def output_path(given: str | None, default: Path) -> Path:
    """Where a command writes its result, after a try to open it: before work that would be lost.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be written; the message says how to mend it.
    """
    path = Path(given or default)
    name, existed = f"--output {str(path)!r}", os.path.exists(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder; expected the name of a file")
    if not os.path.isdir(path.parent):
        raise FileNotFoundError(f"{name} lies in a folder that does not exist; make it first")
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise PermissionError(f"{name} cannot be written ({error.strerror}); pass another file") from None
    return path


def sampling_options(arguments: Any, defaults: Any) -> Any:
    """The run's SamplingConfig with what the command line says otherwise."""
    names = ("guidance_scale", "num_inference_steps", "sampler", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(defaults, **given)


def quiet_libraries() -> None:
    """Silences what libraries imported so far say that a user of a command can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()  # remarks on the type of our models
        transformers_logging.disable_progress_bar()  # its bars of one shard would break the lines of ours
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each try to reach the hub
