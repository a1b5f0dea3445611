"""Training of length heads on a finished language model: their task. The recipe is in length_head_recipe.py."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data.stream import EpochStream
from fastdiff.data.text import load_text_data
from fastdiff.data.text_batches import pair_windows, window_length
from fastdiff.data.text_parts import TextData, TextPart
from fastdiff.device import autocast, autocast_dtype
from fastdiff.errors import section
from fastdiff.generation.length.calibration import model_hash
from fastdiff.generation.length.probe import mean_embedding
from fastdiff.models.length_heads import LENGTH_HEADS, read_length_head, save_length_head
from fastdiff.recipes import plain
from fastdiff.tasks.kinds import kind_of
from fastdiff.tasks.length_head.recipe import LengthHeadRecipe
from fastdiff.tasks.masked_lm.held_out import evenly_spaced, text_of_run
from fastdiff.tasks.masked_lm.run import LanguageModel, load_language_model
from fastdiff.training.randomness import derive_seed, generator
from fastdiff.training.run_folder import RunFolder
from fastdiff.training.task import Batch, to_device

_ORDER, _LENGTH = 2, 3  # purposes of derived seeds (the trainer's own is 1)
_VALIDATED, _ROWS = 512, 32  # held-out pairs measured, and how many at once


class LengthHeadTask:
    """A head that learns the lengths of answers from a frozen language model, as the trainer sees it.

    The classifier learns 1[length ≤ offset] at every offset of a fully masked window of random length (binary cross
    entropy, the mean over offsets), the regression log(1 + length) (Huber's loss). An answer that does not fit into the
    window with its EoS has not ended anywhere in it. The regression cannot see the window, so for it that is always the
    longest one, and longer answers count as that long.

    Only the head is trained, averaged and stored; `frozen` stays as it was loaded, in eval mode.

    Args:
        recipe: the run's recipe.
        data: the pairs, where they are loaded already.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: model or pairs are missing or do not fit each other, or the
            run to resume was trained on another model; one line.
    """

    unit = "samples"
    partial_gradients = False

    def __init__(self, recipe: LengthHeadRecipe, data: TextData | None = None):
        self.config = recipe
        loaded = _load_frozen(recipe)
        self.frozen = loaded.model.requires_grad_(False).eval()
        self.model_hash = model_hash(self.frozen)
        _check_resumed(recipe, self.model_hash)
        source = loaded.recipe.data if recipe.data is None else recipe.data
        if data is None:
            with section("data"):
                if recipe.data is None:
                    data = text_of_run(loaded, recipe.training.accept_changed_data)
                else:
                    data = load_text_data(source, loaded.tokenizer)
        self.data, self.pad_token_id = data, loaded.tokenizer.pad_token_id or 0
        self.window = source.max_length if recipe.window is None else recipe.window
        self.windows = dataclasses.replace(
            source, min_length=min(source.min_length, self.window), max_length=self.window
        )
        _check_fit(recipe, self.frozen.config, data, self.window)
        training = recipe.training
        self.stream = EpochStream(len(data.train), training.batch_size, derive_seed(training.seed, _ORDER))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = LENGTH_HEADS[recipe.head](self.frozen.config.hidden_size)

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step: prompts with masked windows, where these lie, and the lengths of the answers."""
        window = window_length(self.windows, generator(self.config.training.seed, step, _LENGTH))
        window = self.window if self.config.head == "regression" else window
        return self._pairs(self.data.train, self.stream.indices(step)[slots.start : slots.stop], window)

    def _pairs(self, part: TextPart, indices: Tensor, window: int) -> Batch:
        config = self.frozen.config
        rows = pair_windows(
            part,
            indices,
            window,
            "eos_fill",  # all of the window is attended to; what stands in it is replaced
            eos_token_id=self.pad_token_id,
            pad_token_id=self.pad_token_id,
            separate_conditions=config.num_encoder_layers > 0,
            bos_token_id=config.bos_token_id,
        )
        starts = rows.maskable.to(torch.int8).argmax(dim=1)
        prompt_mask = rows.attention_mask & ~rows.maskable
        return {
            "input_ids": rows.input_ids.masked_fill(rows.maskable, config.mask_token_id),
            "attention_mask": rows.attention_mask,
            "columns": starts[:, None] + torch.arange(window),
            "prompt_ids": rows.input_ids if rows.condition_ids is None else rows.condition_ids,
            "prompt_mask": prompt_mask if rows.condition_mask is None else rows.condition_mask,
            # one that does not fit with its EoS is beyond every offset
            "lengths": part.targets.document_lengths[indices].clamp(max=window),
        }

    def weight(self, batch: Batch) -> float:
        """The number of samples."""
        return float(len(batch["lengths"]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the samples' losses."""
        return self._losses(model, self._features(batch), batch).sum()

    def _losses(self, head: nn.Module, features: Tensor, batch: Batch) -> Tensor:  # float32 [n]
        lengths = batch["lengths"]
        if self.config.head == "regression":
            return F.huber_loss(head(features, logarithm=True), lengths.float().log1p(), reduction="none")
        offsets = torch.arange(batch["columns"].shape[1], device=lengths.device)
        ended = (lengths[:, None] <= offsets).float()
        return F.binary_cross_entropy_with_logits(head(features), ended, reduction="none").mean(1)

    @torch.no_grad()
    def _features(self, batch: Batch) -> Tensor:
        """What the head sees: states [n, W, D] that predict the window's tokens, or mean prompt embeddings [n, D]."""
        device = batch["input_ids"].device
        model = self.frozen.to(device)
        dtype = autocast_dtype(self.config.training.mixed_precision, device.type)
        with autocast(device, dtype):
            if self.config.head == "regression":
                return mean_embedding(model, batch["prompt_ids"], batch["prompt_mask"])
            inputs = {}
            if model.config.num_encoder_layers:
                inputs["encoder_hidden_states"] = model.encode(batch["prompt_ids"], batch["prompt_mask"])
                inputs["encoder_attention_mask"] = batch["prompt_mask"]
            if model.config.timestep_embedding:
                inputs["timesteps"] = torch.ones(len(batch["input_ids"]), device=device)
            columns = (batch["columns"] - int(model.config.logit_shift)).clamp(min=0)
            return model.hidden_states(batch["input_ids"], batch["attention_mask"], output_columns=columns, **inputs)

    def sample_ids(self, step: int) -> list[int]:
        """Indices of pairs."""
        return self.stream.indices(step).tolist()

    def save(self, model: nn.Module, folder: Path) -> None:
        """The head, with what model it belongs to."""
        save_length_head(model, folder, run=self.config.run, window=self.window, model_hash=self.model_hash)

    @torch.no_grad()
    def predictions(self, model: nn.Module) -> tuple[Tensor, Tensor, float]:
        """Held-out pairs, evenly spaced: expected lengths float32 [N], true ones int64 [N], and the mean loss.

        In the longest window; lengths beyond it count as its own. The classifier's expected length is the sum of
        P(length > offset).
        """
        device = next(model.parameters()).device
        predicted, lengths, total = [], [], 0.0
        for indices in evenly_spaced(len(self.data.held_out), _VALIDATED).split(_ROWS):
            batch = to_device(self._pairs(self.data.held_out, indices, self.window), device)
            features = self._features(batch)
            total += self._losses(model, features, batch).sum().item()
            output = model(features)
            if self.config.head == "classifier":
                output = (1 - output.sigmoid().cummax(1).values).sum(1)
            predicted.append(output.clamp(max=self.window).cpu())
            lengths.append(batch["lengths"].cpu())
        return torch.cat(predicted), torch.cat(lengths), total / sum(map(len, lengths))

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out loss and root mean square error in tokens, beside that of the training lengths' mean for all."""
        predicted, lengths, loss = self.predictions(model)
        mean = self.data.train.targets.document_lengths.clamp(max=self.window).double().mean()
        return {"loss": loss, "rmse_tokens": _rmse(predicted, lengths), "rmse_of_the_mean_tokens": _rmse(mean, lengths)}

    def preview(self, model: nn.Module, path: Path) -> None:
        """Expected against true lengths of held-out answers."""
        from fastdiff.visualization import save_length_scatter

        predicted, lengths, _ = self.predictions(model)
        title = f"{self.config.head}: {len(lengths)} held-out answers, RMSE {_rmse(predicted, lengths):.2f} tokens"
        save_length_scatter(predicted.tolist(), lengths.tolist(), path, title=title)

    def data_sets(self) -> dict[str, TextData]:
        """The pairs, which may be those of the language model's run."""
        return {"data": self.data}

    def facts(self) -> dict[str, Any]:
        """What was trained, on which model and pairs."""
        return {
            "kind": "length_head",
            "head": self.config.head,
            "run": self.config.run,
            "model_hash": self.model_hash,
            "window": self.window,
        }

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(dataclasses.asdict(self.config))


def _load_frozen(recipe: LengthHeadRecipe) -> LanguageModel:
    """The language model that a recipe names; raises where there is none, or none of pairs."""
    if recipe.data is None and not Path(recipe.run).is_dir():  # a hub id would need data too
        raise FileNotFoundError(
            f"run: got {recipe.run!r}, which is not a folder; train it first, or name a finished run"
        )
    if kind_of(recipe.run) != "masked_lm":
        raise ValueError(
            f"run: got {recipe.run!r}, not a run of text; a length head needs a language model's run of pairs"
        )
    loaded = load_language_model(recipe.run, weights=recipe.weights, device="cpu")
    if recipe.data is None and loaded.recipe is None:
        raise ValueError(
            f"run: got {recipe.run!r}, which is not a run of fastdiff.train and has no pairs of its own; name them as "
            "data, for example --data.name jsonl --data.sample pairs --data.path pairs.jsonl"
        )
    source = loaded.recipe.data if recipe.data is None else recipe.data
    if source.sample == "documents":
        got = f"the documents ({source.name})" + (f" of the run {recipe.run!r}" if recipe.data is None else "")
        raise ValueError(
            f"data.sample: got {got}, which have no answers whose length could be learned; name pairs as data"
        )
    return loaded


def _check_resumed(recipe: LengthHeadRecipe, model_hash: str) -> None:
    """Raises ValueError where the run to go on with was trained on another frozen model."""
    newest = RunFolder(recipe.training.output_dir).latest() if recipe.training.resume else None
    if newest is not None and read_length_head(newest)[1].get("model_hash") != model_hash:
        raise ValueError(
            f"{newest} was trained on another model than {recipe.run!r} is now ({recipe.weights} weights); name the "
            "checkpoint that it was trained on as run, or train anew with --training.overwrite true"
        )


def _check_fit(recipe: LengthHeadRecipe, config: Any, data: TextData, window: int) -> None:
    """Raises ValueError where prompts and window are too long for the model."""
    longest = window + 1  # BoS
    if not config.num_encoder_layers:
        longest = window + int(max(part.conditions.document_lengths.max() for part in (data.train, data.held_out)))
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"window: got {window}; prompts and window have up to {longest} tokens, the model of {recipe.run!r} "
            f"{config.max_position_embeddings} positions: set window lower"
        )


def _rmse(predicted: Tensor, lengths: Tensor) -> float:
    return (predicted.double() - lengths).square().mean().sqrt().item()
