"""Diffusion transformers that draw images of classes."""

from fastdiff.tasks.kinds import Kind

KIND = Kind(
    __name__,
    about="a diffusion transformer that draws images of classes",
    recipe="recipe:DiTRecipe",
    task="task:DiTTask",
    load="run:load_run",
    sample="samples:sample_images",
    evaluate="evaluate:evaluate_images",
    saved_as=("DiT", "DiTTransformer2DModel"),
)
