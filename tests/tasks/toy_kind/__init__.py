"""A kind of its own, as a newcomer would add one: it learns the mean and the spread of numbers."""

from fastdiff.tasks.kinds import Kind

KIND = Kind(
    __name__,
    about="a bell curve over numbers",
    recipe="recipe:ToyRecipe",
    task="task:ToyTask",
    load="run:load_run",
    sample="run:sample_numbers",
    evaluate="run:evaluate_numbers",
    saved_as=("Bell",),
)
