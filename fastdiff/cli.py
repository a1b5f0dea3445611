"""What the commands share: recipes from YAML and arguments, and errors as one line."""

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

Recipe = TypeVar("Recipe")
# What a user can cause; anything else keeps its traceback, since it is a fault of ours.
_USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)


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

    return wrapper


def recipe_parser(recipe: type, command_name: str, description: str) -> ArgumentParser:
    """A parser of `RECIPE.yaml --section.field value …`, with every field of the dataclass `recipe`."""
    usage = f"python -m fastdiff.{command_name} RECIPE.yaml [--SECTION.FIELD VALUE ...]"
    parser = ArgumentParser(usage=usage, description=description, exit_on_error=False)
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
    if arguments[0] == "--recipe" and len(arguments) > 1 and not Path(arguments[1]).is_file():
        raise FileNotFoundError(f"recipe {arguments[1]!r} is not a file; expected the path of a YAML recipe")
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
    try:
        return build(recipe, recipe_parser(recipe, "train", "").parse_args(["--recipe", str(path)]))
    except ArgumentError as error:
        raise ValueError(f"{path} is not a recipe of this version: {one_line(error)}") from None


def build(recipe: type[Recipe], values: Any) -> Recipe:
    """Dataclasses from jsonargparse's namespace; their own checks run here."""
    hints = {f.name: f.type for f in dataclasses.fields(recipe)}
    parts = {name: kind(**vars(getattr(values, name))) for name, kind in hints.items()}
    return recipe(**parts)


def run_parser(command_name: str, description: str) -> ArgumentParser:
    """A parser for a command on a run: the run and how to sample from it; None is what the run's recipe says."""
    parser = ArgumentParser(prog=f"python -m fastdiff.{command_name}", description=description, exit_on_error=False)
    parser.add_argument("run", type=str, help="a run's folder (the newest checkpoint), or one of its checkpoints")
    parser.add_argument("--guidance-scale", type=float | None, help="classifier-free guidance; 1 is none")
    parser.add_argument("--num-inference-steps", type=int | None, help="denoising steps")
    parser.add_argument("--sampler", type=str | None, help="euler, ddpm, ddim, dpm-solver++ or renoise")
    parser.add_argument("--seed", type=int | None, help="of the first sample; sample i has seed + i")
    parser.add_argument("--weights", type=Literal["ema", "model"], default="ema", help="averaged or plain weights")
    parser.add_argument("--device", type=str | None, help="for example cpu or cuda")
    return parser


def sampling_options(arguments: Any, defaults: Any) -> Any:
    """The run's SamplingConfig with what the command line says otherwise."""
    names = ("guidance_scale", "num_inference_steps", "sampler", "seed")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(defaults, **given)


def quiet_libraries() -> None:
    """Silences warnings of libraries that a user of a command can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
