"""Diffusion transformers that draw images of classes."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = ["KIND", "DiTRecipe", "DiTRun", "DiTTask", "SamplingConfig"]

KIND = Kind(
    __name__,
    about="a diffusion transformer that draws images of classes",
    recipe="recipe:DiTRecipe",
    task="task:DiTTask",
    load="run:load_run",
    sample="samples:sample_images",
    evaluate="evaluate:evaluate_images",
    saved_as=("DiT", "DiTTransformer2DModel", "Transformer2DModel"),
)

__getattr__ = exports(
    __name__,
    {
        "DiTRecipe": "fastdiff.tasks.dit.recipe",
        "DiTRun": "fastdiff.tasks.dit.run",
        "DiTTask": "fastdiff.tasks.dit.task",
        "SamplingConfig": "fastdiff.tasks.dit.recipe",
    },
)
