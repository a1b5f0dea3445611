"""The entries of `fastdiff sample RUN --config FILE`: each is a picture, as in LLM2DiT's inference configurations."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.recipes import read_recipe_file

_KINDS = ("denoising_steps", "noise_levels", "progression")  # of pictures; an entry is one of them, or a grid
_NAME = 60  # characters


@dataclass
class Entry:
    """A picture.

    Attributes:
        name: of its files.
        prompts: texts to draw.
        classes: labels or class names to draw. Beside as many prompts they are compared with these, side by side: a row
            each, images of the class at the left, of the prompt at the right, from the same noise.
        combinations: instead of prompts and classes, "seen" or "unseen": texts of combinations of attributes that the
            run was trained on, or never met, one of each combination of class and color, spread evenly; "both" draws
            them side by side.
        count: how many combinations; given with those alone.
        images_per_prompt: images of each text.
        guidance_scale: a number, or several for a sweep: a column each.
        num_inference_steps, sampler, seed: as in `fastdiff sample`.
        denoising_steps: so many of the steps, a column each: noise on its way to an image.
        noise_levels: noise times in [0, 1], a column each: the image of the text noised so far, and below it what the
            model makes of that in one step.
        progression: a column for each checkpoint of the run, all from the same noise.
        attention_timesteps: times at which attention to the text's tokens is written down, each a heatmap: of a
            discrete diffusion its levels (0 … 999), else times from 0 (the image) to 1 (noise). A Q-Former's maps are
            the same at all of them.
        attention_average: maps averaged over "all" layers and heads (a map a prompt), over "heads" (one a layer), or
            "none".
        animate: write a GIF of the denoising, too.
    """

    name: str = ""
    prompts: list[str] | None = None
    classes: list[int | str] | None = None
    combinations: str | None = None
    count: int = 16
    images_per_prompt: int = 1
    guidance_scale: float | list[float] | None = None
    num_inference_steps: int | None = None
    sampler: str | None = None
    seed: int | None = None
    denoising_steps: int | None = None
    noise_levels: list[float] | None = None
    progression: bool = False
    attention_timesteps: list[float] | None = None
    attention_average: str = "all"
    animate: bool = False

    @property
    def sides(self) -> str:
        """Which two things are drawn side by side; empty where there are no two."""
        if self.combinations == "both":
            return "combinations: both"
        return "prompts beside classes" if self.prompts is not None and self.classes is not None else ""

    @property
    def scales(self) -> list[float] | None:
        """The guidance scales of a sweep; None where there is none."""
        return self.guidance_scale if isinstance(self.guidance_scale, list) else None

    def sampling(self) -> dict[str, Any]:
        """What is given of how samples are drawn."""
        names = ("num_inference_steps", "sampler", "seed")
        given = {name: getattr(self, name) for name in names}
        return given | ({} if self.scales is not None else {"guidance_scale": self.guidance_scale})


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a field that there is not, a wrong value, nothing to draw, or two kinds of pictures
            in one entry; one line that names file and entry.
    """
    content = read_recipe_file(path)
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"entries"}:
        raise ValueError(f"{path}: expected the one key entries, with a list of pictures")
    found = [_entry(each, f"{path}: entry {number}") for number, each in enumerate(entries, 1)]
    for number, entry in enumerate(found, 1):
        if entry.name in {each.name for each in found[: number - 1]}:
            raise ValueError(f"{path}: entry {number}: name: got {entry.name!r} twice; expected another")
    return found


def _entry(content: Any, where: str) -> Entry:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {content!r}; expected fields, as in {{name: cats, prompts: [a cat]}}")
    fields = {field.name: field for field in dataclasses.fields(Entry)}
    for name in content:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            advice = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"{where}: there is no field {name!r}; {advice}expected {', '.join(fields)}")
    for name, value in content.items():
        check, expected = _EXPECTED[name]
        if not check(value):
            raise ValueError(f"{where}: {name}: got {value!r}; expected {expected}")
    entry = Entry(**content)
    if not entry.name:
        raise ValueError(f"{where}: name: got none; expected the name of its picture")
    _check_alone(entry, f"{where} ({entry.name})")
    return entry


def _check_alone(entry: Entry, where: str) -> None:
    given = [name for name in ("prompts", "classes", "combinations") if getattr(entry, name) is not None]
    if not given or (entry.combinations is not None and len(given) > 1):
        got = " and ".join(given) or "none of them"
        raise ValueError(f"{where}: got {got}; expected prompts, classes, both of these side by side, or combinations")
    if entry.sides and entry.combinations is None and len(entry.prompts) != len(entry.classes):
        raise ValueError(
            f"{where}: prompts: got {len(entry.prompts)} beside {len(entry.classes)} classes; expected one a class"
        )
    kinds = [name for name in _KINDS if getattr(entry, name)]
    kinds += [entry.sides] if entry.sides else []
    kinds += ["guidance_scale (several)"] if entry.scales is not None else []
    if len(kinds) > 1:
        raise ValueError(f"{where}: got {' and '.join(kinds)}; expected one of them: an entry is one picture")
    if entry.attention_timesteps is not None and given == ["classes"]:
        raise ValueError(f"{where}: attention_timesteps: got it with classes, which have no tokens; expected prompts")
    for name, needed in (("count", "combinations"), ("attention_average", "attention_timesteps")):
        default = getattr(Entry, name)
        if getattr(entry, name) != default and getattr(entry, needed) is None:
            raise ValueError(f"{where}: {name}: got {getattr(entry, name)} without {needed}; leave it out")
    if kinds and (entry.animate or entry.attention_timesteps):
        other = "animate" if entry.animate else "attention_timesteps"
        raise ValueError(f"{where}: {other}: got it with {kinds[0]}; expected it in an entry of its own")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # more digits than a float takes
        return False


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _list_of(check: Any) -> Any:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(check, value))


def _is_name(value: Any) -> bool:
    plain = isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum()
    return plain and value.isascii() and len(value) <= _NAME


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_class(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


# Of each field: what its value must be, and how an error calls that.
_EXPECTED: dict[str, tuple[Any, str]] = {
    "name": (_is_name, f"letters, digits, - and _, at most {_NAME}"),
    "prompts": (_list_of(_is_text), "a list of texts"),
    "classes": (_list_of(_is_class), "a list of labels or class names"),
    "combinations": (lambda value: value in ("seen", "unseen", "both"), "seen, unseen or both"),
    "count": (_is_count, "a whole number of 1 or more"),
    "images_per_prompt": (_is_count, "a whole number of 1 or more"),
    "guidance_scale": (lambda value: _is_number(value) or _list_of(_is_number)(value), "a number, or a list of them"),
    "num_inference_steps": (_is_count, "a whole number of 1 or more"),
    "sampler": (_is_text, "the name of a sampler"),
    "seed": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "denoising_steps": (_is_count, "a whole number of 1 or more"),
    "noise_levels": (
        lambda value: _list_of(lambda each: _is_number(each) and 0 <= each <= 1)(value), "a list of numbers from 0 to 1"
    ),
    "progression": (lambda value: isinstance(value, bool), "true or false"),
    "attention_timesteps": (_list_of(_is_number), "a list of times"),
    "attention_average": (lambda value: value in ("all", "heads", "none"), "all, heads or none"),
    "animate": (lambda value: isinstance(value, bool), "true or false"),
}  # fmt: skip
