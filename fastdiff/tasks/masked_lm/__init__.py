"""Masked diffusion language models."""

from fastdiff.lazy import exports
from fastdiff.tasks.kinds import Kind

__all__ = [
    "KIND",
    "LanguageModel",
    "LanguageModelConfig",
    "MaskedLMRecipe",
    "MaskedLMTask",
    "ObjectiveConfig",
    "TextSamplingConfig",
]

KIND = Kind(
    __name__,
    about="a masked diffusion language model",
    recipe="recipe:MaskedLMRecipe",
    task="task:MaskedLMTask",
    load="run:load_language_model",
    generate="generate:generate_text",
    evaluate="evaluate:evaluate_language_model",
)

__getattr__ = exports(
    __name__,
    {
        "LanguageModel": "fastdiff.tasks.masked_lm.run",
        "LanguageModelConfig": "fastdiff.tasks.masked_lm.recipe",
        "MaskedLMRecipe": "fastdiff.tasks.masked_lm.recipe",
        "MaskedLMTask": "fastdiff.tasks.masked_lm.task",
        "ObjectiveConfig": "fastdiff.tasks.masked_lm.recipe",
        "TextSamplingConfig": "fastdiff.tasks.masked_lm.recipe",
    },
)
