"""Heads that tell the length of a masked diffusion language model's answers."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = ["KIND", "LengthHeadRecipe", "LengthHeadRun", "LengthHeadTask"]

KIND = Kind(
    __name__,
    about="a head that tells an answer's length from the states of a finished masked diffusion language model",
    recipe="recipe:LengthHeadRecipe",
    task="task:LengthHeadTask",
    load="run:load_run",
    saved_as=("fastdiff_length_head",),
)

__getattr__ = exports(
    __name__,
    {
        "LengthHeadRecipe": "fastdiff.tasks.length_head.recipe",
        "LengthHeadRun": "fastdiff.tasks.length_head.run",
        "LengthHeadTask": "fastdiff.tasks.length_head.task",
    },
)
