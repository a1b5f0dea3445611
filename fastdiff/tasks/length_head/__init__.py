"""Heads that tell the length of a masked diffusion language model's answers."""

from fastdiff.tasks.kinds import Kind

KIND = Kind(
    __name__,
    about="a head that tells an answer's length from the states of a finished masked diffusion language model",
    recipe="recipe:LengthHeadRecipe",
    task="task:LengthHeadTask",
    load="run:load_run",
    saved_as=("fastdiff_length_head",),
)
