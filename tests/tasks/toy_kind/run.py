import json
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastdiff.files import output_path, write_atomically
from fastdiff.recipes import load_recipe
from fastdiff.tasks.options import RunOptions
from fastdiff.tasks.run import Run, find
from fastdiff.training.checkpoint import load_weights
from toy_kind.recipe import ToyRecipe
from toy_kind.task import Bell, save_bell


@dataclass(frozen=True)
class ToyRun(Run):
    kind: ClassVar[str] = "toy"

    def _save(self, directory):
        save_bell(self.model, directory)

    def sample(self, count=1, seed=0):
        noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        return self.model.mean.detach() + noise * self.model.log_spread.detach().exp()


def load_run(path, *, weights="ema", device=None):
    found, model = find(path, "toy", weights), Bell()  # a run, a checkpoint or a folder of save_pretrained
    load_weights(model, found.source / found.weights_file)
    recipe = None if found.folder is None else load_recipe(ToyRecipe, found.folder.config)
    return ToyRun(model=model.eval(), **found.origin, recipe=recipe)


@dataclass
class SampleOptions(RunOptions):
    """Draws numbers.

    Attributes:
        count: how many numbers
    """

    count: int = 3


def sample_numbers(path: str, options: SampleOptions) -> None:
    print(load_run(path, weights=options.weights).sample(options.count).tolist())


@dataclass
class EvaluateOptions(RunOptions):
    """Compares the mean with the right one.

    Attributes:
        output: path of the JSON
    """

    output: str | None = None


def evaluate_numbers(path: str, options: EvaluateOptions) -> None:
    run = load_run(path, weights=options.weights)
    output = output_path(options.output, run.folder.path / "evaluation.json")
    error = abs(run.model.mean.item() - run.recipe.data.mean)
    write_atomically(output, json.dumps({"step": run.step, "error": error}))
    print(f"error {error:.3f}")
