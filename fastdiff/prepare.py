"""Draws or decodes the pictures of a data set once: `fastdiff prepare clipart --image-size 64`.

They are kept in the cache, from which trainings open them at once. A run that was ended goes on where it was. NAME is
clipart, stamps, coco or flickr30k, or a recipe that trains on one of them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastdiff.arguments import ArgumentParser
from fastdiff.cli import add_options, options_from, quiet_libraries
from fastdiff.commands import command


@dataclass
class PrepareOptions:
    """What `fastdiff prepare` takes.

    Attributes:
        folder: where the files lie, if not where Debian's packages put them; coco and flickr30k need it
        captions: the file of captions, of coco and flickr30k; without it, one of the known names in the folder
        image_size: edge of the pictures in pixels; 64, or the recipe's
        held_out_fraction: share that is kept out of training, where the captions have no split of their own
        skip_broken: leaves out files that cannot be read, and says how many they are
    """

    folder: str | None = None
    captions: str | None = None
    image_size: int | None = None
    held_out_fraction: float | None = None
    skip_broken: bool = False


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    parser = ArgumentParser(prog="fastdiff prepare", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("name", type=str, help="a data set, or a recipe that trains on one")
    add_options(parser, PrepareOptions)
    given = vars(parser.parse_args(argv))
    options = options_from(PrepareOptions, given)
    quiet_libraries()
    from fastdiff.data.caption_sets import prepare

    fields = ("folder", "captions", "image_size", "held_out_fraction")
    chosen = {name: getattr(options, name) for name in fields if getattr(options, name) is not None}
    data = prepare(replace(_config(given["name"]), **chosen), skip_broken=options.skip_broken)
    print(f"{data.name}: {len(data.train)} pictures to train on, {len(data.held_out)} held out, in {data.place}")
    for reason, count in data.left_out.items():
        print(f"left out: {count} ({reason})")
    if data.broken:
        shown = ", ".join(data.broken[:10]) + (" …" if len(data.broken) > 10 else "")
        print(f"left out: {len(data.broken)} (broken): {shown}", file=sys.stderr)


def _config(name: str):
    """The data that a name stands for: its own, or a recipe's."""
    from fastdiff.data import DataConfig
    from fastdiff.data.caption_sets import SOURCES
    from fastdiff.recipes import parse_recipe
    from fastdiff.shipped import find_recipe
    from fastdiff.tasks.kinds import kind_named, recipe_kind

    if name in SOURCES:
        return DataConfig(name=name)
    try:
        file = find_recipe(name)
    except FileNotFoundError:
        raise ValueError(f"name: got {name!r}; expected one of {', '.join(SOURCES)}, or a recipe") from None
    data = getattr(parse_recipe(kind_named(recipe_kind(file)).get("recipe"), [str(file)]), "data", None)
    if not isinstance(data, DataConfig):
        raise ValueError(f"name: got the recipe {name!r}, which trains on no pictures; expected one that does")
    return data


if __name__ == "__main__":
    main()
