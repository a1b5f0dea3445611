"""Autoencoders of images, in whose latents diffusion models draw."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = ["KIND", "AutoencoderRecipe", "AutoencoderRun", "AutoencoderTask"]

KIND = Kind(
    __name__,
    about="an autoencoder of images (diffusers' AutoencoderKL)",
    recipe="recipe:AutoencoderRecipe",
    task="task:AutoencoderTask",
    load="run:load_run",
    sample="samples:sample_reconstructions",
    evaluate="evaluate:evaluate_reconstructions",
    saved_as=("AutoencoderKL",),
)

__getattr__ = exports(
    __name__,
    {
        "AutoencoderRecipe": "fastdiff.tasks.autoencoder.recipe",
        "AutoencoderRun": "fastdiff.tasks.autoencoder.run",
        "AutoencoderTask": "fastdiff.tasks.autoencoder.task",
    },
)
