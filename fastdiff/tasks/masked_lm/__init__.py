"""Masked diffusion language models."""

from fastdiff.tasks.kinds import Kind

KIND = Kind(
    __name__,
    about="a masked diffusion language model",
    recipe="recipe:MaskedLMRecipe",
    task="task:MaskedLMTask",
    load="run:load_language_model",
    generate="generate:generate_text",
    evaluate="evaluate:evaluate_language_model",
)
