"""Runs of QGFD diffusion models, loaded to sample from or to take their adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastdiff.data import TableSchema
from fastdiff.device import check_device
from fastdiff.models.qgfd.backbone import QGFDSelfAttention
from fastdiff.models.qgfd.model import QGFDModel
from fastdiff.recipes import load_recipe
from fastdiff.training.checkpoint import load_weights, read_state, step_of
from fastdiff.training.qgfd_data import Source, load_source
from fastdiff.training.qgfd_recipe import QGFDRecipe
from fastdiff.training.run_folder import RunFolder
from fastdiff.training.runs import locate_checkpoint, run_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of an adapter that is taken from another run
_TRAINED_ANEW = ("label_embedding.", "token_head.", "condition_encoder.")


@dataclass(frozen=True)
class QGFDRun:
    """A run's model and what its samples are shown with.

    Attributes:
        folder: the run's folder.
        checkpoint: the checkpoint loaded.
        recipe: what it was trained by.
        model: in eval mode.
        facts: of each modality, as the checkpoint has them: "data", "fingerprint", "class_names".
        tokenizer: of text, else None.
        schema: of a table, else None.
    """

    folder: RunFolder
    checkpoint: Path
    recipe: QGFDRecipe
    model: QGFDModel
    facts: dict[str, dict[str, Any]]
    tokenizer: "PreTrainedTokenizerBase | None"
    schema: TableSchema | None

    @property
    def step(self) -> int:
        """Optimizer steps behind the checkpoint."""
        return step_of(self.checkpoint)

    def source(self, modality: str) -> Source:
        """The data that a modality was trained on.

        Raises what `load_source` raises, and ValueError where it is not what it was.
        """
        source = load_source(self.recipe, modality, self.tokenizer)
        if source.data.fingerprint != self.facts[modality]["fingerprint"]:
            raise ValueError(
                f"{modality}_data: the data set {source.data.name} is not what the run {str(self.folder.path)!r} was "
                "trained on: its content has changed; bring the old data back, or train anew"
            )
        return source


def load_qgfd_run(
    path: str | Path, *, weights: Literal["ema", "model"] = "ema", device: torch.device | str | None = None
) -> QGFDRun:
    """Loads the newest checkpoint of a run of `task: qgfd`, or the one named.

    Args:
        path: a run's folder, or one of its checkpoints.
        weights: the averaged ones ("ema") or those that the optimizer has.
        device: None takes a GPU where there is one.

    Raises:
        FileNotFoundError: no run or no checkpoint there.
        ValueError: a run of another kind, a damaged checkpoint, or a device that this machine does not have.
    """
    device = check_device(device)
    if not Path(path).is_dir():
        raise FileNotFoundError(f"run {str(path)!r} is not a folder; expected the output_dir of a run")
    if run_kind(path) != "qgfd":
        raise ValueError(f"{path} is not a run of a QGFD model (task: qgfd)")
    folder, checkpoint = locate_checkpoint(path)
    recipe, state = load_recipe(QGFDRecipe, folder.config), read_state(checkpoint)
    model = QGFDModel.from_pretrained(checkpoint)
    if weights == "ema":
        load_weights(model, checkpoint / "ema.safetensors")
    tokenizer = None
    if "text" in recipe.modalities:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    schema = TableSchema.from_pretrained(checkpoint) if "tabular" in recipe.modalities else None
    facts = state["task"]["modalities"]
    return QGFDRun(folder, checkpoint, recipe, model.to(device).eval(), facts, tokenizer, schema)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a finished run, for the second stage of latent diffusion."""

    run: QGFDRun

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        """Of text: token embeddings are of use with it alone."""
        return self.run.tokenizer

    def copy_to(self, model: QGFDModel) -> None:
        """Gives a model's adapters these weights and freezes them; what they condition on stays trainable.

        Raises ValueError where an adapter's shapes or attention differ.
        """
        for name, adapter in model.adapters.items():
            other = self.run.model.adapters[name]
            mine, theirs = adapter.state_dict(), other.state_dict()
            mine, theirs = (
                {key: tensor for key, tensor in state.items() if not key.startswith(_TRAINED_ANEW)}
                for state in (mine, theirs)
            )
            where = f"objective.adapters_from: the {name} adapter of {self.run.checkpoint}"
            if {key: t.shape for key, t in mine.items()} != {key: t.shape for key, t in theirs.items()}:
                raise ValueError(
                    f"{where} has other sizes than this recipe's; expected the same section {name}, data and "
                    f"backbone.latent_dim ({self.run.recipe.backbone.latent_dim})"
                )
            taken = [module for key, module in adapter.named_modules() if not f"{key}.".startswith(_TRAINED_ANEW)]
            attends = any(isinstance(module, QGFDSelfAttention) for module in taken)
            if attends and adapter.block_config.qgfd != other.block_config.qgfd:
                raise ValueError(
                    f"{where} diffuses attention as {other.block_config.qgfd}, this recipe's as "
                    f"{adapter.block_config.qgfd}; expected the same: train it with {name}.diffuse_attention false to "
                    "serve any backbone"
                )
            adapter.load_state_dict(theirs, strict=False)
            for key, parameter in adapter.named_parameters():
                if not key.startswith(_TRAINED_ANEW):
                    parameter.requires_grad_(False)


def load_adapters(path: str | Path, recipe: QGFDRecipe) -> Adapters:
    """The adapters of a run. Raises as `load_qgfd_run`, and ValueError where it lacks a modality of the recipe."""
    run = load_qgfd_run(path, device="cpu")
    missing = [name for name in recipe.modalities if name not in run.model.adapters]
    if missing:
        raise ValueError(
            f"objective.adapters_from: {path} has the modalities {', '.join(run.model.adapters)}; expected "
            f"{', '.join(recipe.modalities)}"
        )
    return Adapters(run)
