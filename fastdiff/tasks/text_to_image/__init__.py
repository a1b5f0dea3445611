"""Diffusion transformers that draw images of texts."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = ["KIND", "TextToImageRecipe", "TextToImageRun", "TextToImageSamplingConfig", "TextToImageTask"]

KIND = Kind(
    __name__,
    about="a diffusion transformer that draws images of texts",
    recipe="recipe:TextToImageRecipe",
    task="task:TextToImageTask",
    load="run:load_run",
    sample="samples:sample_prompted",
    evaluate="evaluate:evaluate_prompted",
    saved_as=("TextToImage",),
)

__getattr__ = exports(
    __name__,
    {
        "TextToImageRecipe": "fastdiff.tasks.text_to_image.recipe",
        "TextToImageRun": "fastdiff.tasks.text_to_image.run",
        "TextToImageSamplingConfig": "fastdiff.tasks.text_to_image.recipe",
        "TextToImageTask": "fastdiff.tasks.text_to_image.task",
    },
)
