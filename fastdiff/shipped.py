"""The recipes that come with fastdiff, found by name in a checkout and in an installed package."""

import difflib
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def recipes_folder() -> Path:
    """The folder of the shipped YAML recipes: fastdiff/recipe_files in a wheel, recipes beside fastdiff in a checkout.

    Raises:
        FileNotFoundError: there is neither; the installation is damaged.
    """
    for folder in (_PACKAGE / "recipe_files", _PACKAGE.parent / "recipes"):
        if (folder / "dit_mnist.yaml").is_file():  # another package's folder `recipes` may lie beside ours
            return folder
    raise FileNotFoundError(
        f"recipes: got none in {_PACKAGE}; expected its folder recipe_files; install fastdiff again"
    )


def find_recipe(name: str | os.PathLike) -> Path:
    """The file of a recipe: `name` is a path, or a shipped recipe's name with or without .yaml. A path goes first.

    Raises:
        FileNotFoundError: it is neither; the message has the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = recipes_folder()
    known = sorted(each.stem for each in folder.glob("*.yaml"))
    if str(name).removesuffix(".yaml") in known:
        return folder / f"{str(name).removesuffix('.yaml')}.yaml"
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), known, n=3)
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    raise FileNotFoundError(
        f"recipe: got {str(name)!r}; expected the path of a YAML file or the name of a shipped recipe; {advice}"
        "fastdiff train --list shows them all"
    )


def find_entries(name: str | os.PathLike) -> Path:
    """A file of entries for `fastdiff sample RUN --config NAME`: a path, or the name of one in recipes/evaluate.

    Raises:
        FileNotFoundError: it is neither; the message has the names that there are.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = recipes_folder() / "evaluate"
    named = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if str(path.parent) in (".", "recipes/evaluate") and named.is_file():
        return named
    known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
    raise FileNotFoundError(
        f"--config: got {str(name)!r}; expected the path of a YAML file of entries, or the name of one that comes with "
        f"fastdiff: {known}"
    )


def list_recipes() -> list[tuple[str, str]]:
    """Each shipped recipe's name and first line: `WHAT. Needs: WHAT IT NEEDS. Time: HOW LONG IT TRAINS.`

    What it needs are extras of the package in brackets, as in `pip install 'fastdiff-kernels[data]'`, Debian packages,
    downloads and runs of other recipes.
    """
    files = sorted(recipes_folder().glob("*.yaml"))
    return [(file.stem, file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")) for file in files]
