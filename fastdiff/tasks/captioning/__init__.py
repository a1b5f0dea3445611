"""Captions of images by masked diffusion, over the states of a frozen vision encoder."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = ["KIND", "CaptioningRecipe", "CaptioningRun", "CaptioningTask", "CaptionsConfig", "VisionConfig"]

KIND = Kind(
    __name__,
    about="a masked diffusion language model that captions images",
    recipe="recipe:CaptioningRecipe",
    task="task:CaptioningTask",
    load="run:load_run",
    generate="generate:generate_captions",
    evaluate="evaluate:evaluate_captions",
    saved_as=("ImageCaptioner",),
)

__getattr__ = exports(
    __name__,
    {
        "CaptioningRecipe": "fastdiff.tasks.captioning.recipe",
        "CaptioningRun": "fastdiff.tasks.captioning.run",
        "CaptioningTask": "fastdiff.tasks.captioning.task",
        "CaptionsConfig": "fastdiff.tasks.captioning.recipe",
        "VisionConfig": "fastdiff.tasks.captioning.recipe",
    },
)
