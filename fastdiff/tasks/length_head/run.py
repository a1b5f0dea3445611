"""Runs of length heads, loaded to predict lengths with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastdiff.device import check_device
from fastdiff.models.length_heads import read_length_head, save_length_head
from fastdiff.recipes import load_recipe
from fastdiff.tasks.length_head.recipe import LengthHeadRecipe
from fastdiff.tasks.run import Run, find

if TYPE_CHECKING:
    from fastdiff.models.masked_lm import MaskedDiffusionLM


@dataclass(frozen=True)
class LengthHeadRun(Run):
    """A length head; `fastdiff.generation.length.LengthPredictor` takes its model.

    Attributes:
        about: which language model it was trained on: "run", "model_hash", "window".
    """

    kind: ClassVar[str] = "length_head"

    about: dict[str, Any] = field(default_factory=dict)

    def usage(self) -> str:
        return (
            "import torch\n"
            "from fastdiff.generation.length import LengthPredictor\n"
            'lm = fastdiff.load("THE_LANGUAGE_MODEL")  # the one that the head was trained on\n'
            f'predictor = LengthPredictor(lm.model, window={self.about["window"]}, rule="{self.model.kind}", '
            "head=run.model)\n"
            'prompt = torch.tensor([lm.codec.encode("a prompt")], device=lm.model.device)\n'
            "print(predictor(prompt).bounds)  # tokens"
        )

    def _save(self, directory: Path) -> None:
        own = {"model_type", "fastdiff_version", "head", "hidden_size"}  # what saving writes itself
        facts = {name: value for name, value in self.about.items() if name not in own}
        save_length_head(self.model, directory, **facts)


def load_run(path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None) -> LengthHeadRun:
    """Loads a length head; arguments and errors are those of `fastdiff.load`."""
    device = check_device(device)
    found = find(path, "length_head", weights)
    head, about = read_length_head(found.source, found.weights_file)
    recipe = None if found.folder is None else load_recipe(LengthHeadRecipe, found.folder.config)
    return LengthHeadRun(model=head.to(device).eval(), **found.origin, recipe=recipe, about=about)


def load_length_head(path: str | Path, model: "MaskedDiffusionLM", *, weights: str = "ema") -> nn.Module:
    """Loads the length head that a run of `task: length_head` trained on the states of `model`.

    Args:
        path: the run's folder (the newest checkpoint), one of its checkpoints, or a folder of `save_length_head`.
        model: the language model that the head will serve.
        weights: of a checkpoint: the averaged ones ("ema") or those that the optimizer has.

    Returns:
        An `EndClassifier` or `LengthRegressor` in eval mode on the model's device; its `kind` says which.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint yet.
        ValueError: no length head, a damaged file, or a head that was trained on another model.
    """
    from fastdiff.generation.length.calibration import model_hash

    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected a run of `task: length_head`, or a saved head")
    run = load_run(path, weights=weights, device=next(model.parameters()).device)
    about = run.about
    if about.get("model_hash") != model_hash(model):
        raise ValueError(
            f"{path}: a length head for another model than this one (it was trained on {about.get('run')}); pass that "
            "model, or train the head anew on this one"
        )
    return run.model
