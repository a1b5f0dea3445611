"""Recipes: YAML files and command-line options, as dataclasses."""

import contextlib
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentError

from fastdiff.arguments import ArgumentParser, short_help
from fastdiff.errors import one_line, section
from fastdiff.shipped import find_recipe

Recipe = TypeVar("Recipe")
_FLAGS = ("-h", "--list", "--print_config")  # options without a value


@dataclasses.dataclass(frozen=True)
class RecipeArguments:
    """A command line that names a recipe: its file, and the options that stand beside it.

    Attributes:
        recipe: a YAML file; None where none is named.
        options: `--section.field value` and others, in their order.
    """

    recipe: Path | None
    options: list[str]

    @classmethod
    def find(cls, arguments: Sequence[str]) -> "RecipeArguments":
        """Finds the recipe anywhere in a command line: `RECIPE`, `--recipe RECIPE` or `--recipe=RECIPE`.

        Raises:
            FileNotFoundError: neither a file nor a recipe that comes with fastdiff.
            ValueError: two recipes.
        """
        named, options, words = [], [], list(arguments)
        while words:
            word = words.pop(0)
            if word == "--recipe" and words:
                named.append(words.pop(0))
            elif word.startswith("--recipe="):
                named.append(word.partition("=")[2])
            elif not word.startswith("-"):
                named.append(word)
            else:
                options.append(word)
                takes_value = "=" not in word and word not in _FLAGS and not word.startswith("--help")
                if takes_value and words and not words[0].startswith("--"):
                    options.append(words.pop(0))
        if len(named) > 1:
            raise ValueError(f"recipe: got {' and '.join(named)}; expected one")
        return cls(find_recipe(named[0]) if named else None, options)


def recipe_parser(recipe: type, description: str) -> ArgumentParser:
    """A parser of `--section.field value …`, with every field of the dataclass `recipe`."""
    usage = "fastdiff train RECIPE [--SECTION.FIELD VALUE ...]"
    parser = ArgumentParser(usage=usage, description=description, exit_on_error=False, allow_abbrev=False)
    parser.of_recipe = True
    parser.add_argument("--recipe", action=ActionConfigFile, help="a YAML file; the same as naming it alone")
    parser.add_class_arguments(recipe, None)
    return parser


def parse_recipe(recipe: type[Recipe], arguments: RecipeArguments | Sequence[str], description: str = "") -> Recipe:
    """The recipe that a command line names, with its overrides.

    Raises:
        ArgumentError: an unknown key, a wrong type, or YAML that cannot be read.
        ValueError: a value out of range, or no recipe.
        FileNotFoundError: no such recipe.
    """
    if not isinstance(arguments, RecipeArguments):
        arguments = RecipeArguments.find(arguments)
    parser = recipe_parser(recipe, description)
    if arguments.recipe is None:
        raise ValueError(f"no recipe given; expected: {parser.usage}")
    check_recipe_file(recipe, arguments.recipe)
    of_file = [f"--recipe={arguments.recipe}"]
    if {"-h", "--help"} & set(arguments.options):
        _print_help(build(recipe, parser.parse_args(of_file)), arguments.recipe, parser)
    if "--help-all" in arguments.options:
        _print_all_help(parser, of_file)
    # first, whatever its place was: options replace what it says
    made = build(recipe, parser.parse_args([*of_file, *arguments.options]))
    _check_overwrite(made, arguments)
    return made


def _print_help(recipe: Any, path: Path, parser: ArgumentParser) -> NoReturn:
    """A line a field, with the recipe's values, of the sections that it has; ends the process."""
    values = recipe.to_dict() if hasattr(recipe, "to_dict") else dataclasses.asdict(recipe)
    values = {name: value for name, value in values.items() if name != "task"}
    print(f"usage: {parser.usage}\n\n{parser.description}\nThese are the values of {path}; --help-all tells more.")
    print(short_help(recipe, plain(values)))
    raise SystemExit(0)


def _print_all_help(parser: ArgumentParser, of_file: list[str]) -> NoReturn:
    """jsonargparse's help of every field, with the recipe's values; ends the process."""
    values = vars(parser.parse_args(of_file).as_flat())
    values.pop("recipe", None)
    for name, value in values.items():
        with contextlib.suppress(KeyError):  # fields of a section that may be null have no option of their own
            parser.set_defaults({name: value})
    parser.print_help()
    raise SystemExit(0)


def _check_overwrite(recipe: Any, arguments: RecipeArguments) -> None:
    """Raises ValueError where a file alone asks for a run to be deleted: whoever types the command must say so."""
    training = getattr(recipe, "training", None)
    typed = any(word.startswith("--training") for word in arguments.options if "overwrite" in word or "{" in word)
    if getattr(training, "overwrite", False) and not typed:
        raise ValueError(
            f"{arguments.recipe}: training.overwrite: got true; expected it on the command line alone, as it deletes "
            "the run in training.output_dir: take it out of the file, and type --training.overwrite true"
        )


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
        return build(recipe, recipe_parser(recipe, "").parse_args([f"--recipe={path}"]))
    except ArgumentError as error:
        raise ValueError(f"{path} is not a recipe of this version: {one_line(error)}") from None


def check_recipe_file(recipe: type, path: Path) -> None:
    """Checks that a file is YAML, and has no other sections and fields than the dataclass `recipe`.

    Fields of `recipe` that are not dataclasses themselves, such as `task`, stand in the file beside the sections. A
    section that may be left out may be null.

    Raises:
        ValueError: it names the file and what is wrong in it.
    """
    content = read_recipe_file(path)
    sections = {field.name: _section(field.type) for field in dataclasses.fields(recipe)}
    optional = {field.name for field in dataclasses.fields(recipe) if field.default is None}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {content!r}; expected the sections {', '.join(sections)}")
    for part, fields in content.items():
        part, _, field = str(part).partition(".")  # "model.depth: 2" is "model: {depth: 2}"
        if part not in sections:
            raise ValueError(f"{path}: there is no section {part!r}; expected {', '.join(sections)}")
        if sections[part] is None:
            if field or isinstance(fields, dict):
                raise ValueError(f"{path}: {part} has fields below it; expected one value, as in {part}: VALUE")
            continue
        if fields is None and part in optional:
            continue
        fields = {field: fields} if field else fields
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: {part}: got {fields!r}; expected fields below it, as in {part}: {{name: value}}; "
                "--help lists them"
            )
        known = [each.name for each in dataclasses.fields(sections[part])]
        for name in fields:
            name = str(name).partition(".")[0]  # "sampling.generation.seed: 1"
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                advice = f"did you mean {part}.{close[0]}? " if close else ""
                raise ValueError(f"{path}: there is no field {part}.{name}; {advice}--help lists the fields")


def read_recipe_file(path: Path) -> Any:
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
        value, config = getattr(values, field.name), _section(field.type)
        if config is None or value is None:
            parts[field.name] = value
            continue
        with section(field.name):  # for the names in their errors
            parts[field.name] = config(**vars(value))
    return recipe(**parts)


def _section(kind: Any) -> type | None:
    """The dataclass that a field of a recipe holds, also where it may be None; None for a plain value."""
    return next((each for each in (kind, *get_args(kind)) if dataclasses.is_dataclass(each)), None)


def plain(value: Any) -> Any:
    """Dicts, lists and scalars alone: tuples become lists, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
