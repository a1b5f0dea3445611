"""QGFD diffusion models of text, images, sound, videos and tables."""

from fastdiff.tasks.kinds import Kind

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
