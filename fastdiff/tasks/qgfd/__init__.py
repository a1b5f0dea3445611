"""QGFD diffusion models of text, images, sound, videos and tables."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = ["KIND", "QGFDObjectiveConfig", "QGFDRecipe", "QGFDRun", "QGFDSamplingConfig", "QGFDTask"]

KIND = Kind(
    __name__,
    about="a QGFD diffusion model of one modality, or of several over a shared backbone",
    recipe="recipe:QGFDRecipe",
    task="task:QGFDTask",
    load="run:load_run",
    sample="sample:sample_qgfd",
    evaluate="evaluate:evaluate_qgfd",
    saved_as=("QGFDModel",),
)

__getattr__ = exports(
    __name__,
    {
        "QGFDObjectiveConfig": "fastdiff.tasks.qgfd.recipe",
        "QGFDRecipe": "fastdiff.tasks.qgfd.recipe",
        "QGFDRun": "fastdiff.tasks.qgfd.run",
        "QGFDSamplingConfig": "fastdiff.tasks.qgfd.recipe",
        "QGFDTask": "fastdiff.tasks.qgfd.task",
    },
)
