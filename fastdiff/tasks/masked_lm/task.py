"""Training of masked diffusion language models on text: its task. The recipe is in masked_lm_recipe.py."""

import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data.stream import EpochStream
from fastdiff.data.text import TextData, load_text_data
from fastdiff.data.text_batches import document_windows, window_length
from fastdiff.data.text_codec import TextCodec
from fastdiff.device import autocast, autocast_dtype
from fastdiff.diffusion.masked import MaskedDiffusion
from fastdiff.errors import section
from fastdiff.models.masked_lm import IGNORED_LABEL
from fastdiff.nn import annealed_attention_mask
from fastdiff.recipes import plain
from fastdiff.tasks.masked_lm.held_out import likelihood_arguments, windows_of_pairs, without_first_token
from fastdiff.tasks.masked_lm.recipe import MaskedLMRecipe
from fastdiff.tasks.masked_lm.run import save_model
from fastdiff.tasks.masked_lm.start import build_model, load_start
from fastdiff.training.randomness import derive_seed, generator
from fastdiff.training.task import Batch
from fastdiff.visualization.text import TextSample

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _TIMES, _LENGTH, _MASKS, _FULL, _ATTENTION = 2, 3, 4, 5, 6, 7


class MaskedLMTask:
    """Masked diffusion of text, as the trainer sees it: pretraining, instruction tuning, conditional text, adaptation.

    The loss of MDLM (Sahoo et al. 2024), LLaDA (Nie et al. 2025) and DiffuGPT (Gong et al. 2025), as the recipe says.

    Args:
        recipe: the run's recipe.
        data: the text, where it is loaded already.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: the text or model is missing, or they do not fit each other;
            one line.
    """

    unit = "samples"
    partial_gradients = False

    def __init__(self, recipe: MaskedLMRecipe, data: TextData | None = None):
        self.config, training = recipe, recipe.training
        # a checkpoint that cannot be used is known before any text is read
        start = None if recipe.model.init_from is None else load_start(recipe)
        if data is None:
            with section("data"):
                data = load_text_data(recipe.data, recipe.tokenizer if start is None else start.tokenizer)
        self.data, self.tokenizer = data, data.tokenizer
        self.pairs = data.train.conditions is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_model(recipe, self.tokenizer, start)
        check_fit(recipe, data, self.model.config)
        self.process = MaskedDiffusion(recipe.diffusion, self.model.config.mask_token_id)
        self.stream = None
        if self.pairs:
            seed = derive_seed(training.seed, _ORDER)
            self.stream = EpochStream(len(data.train.targets), training.batch_size, seed)
        self._step_batch = lru_cache(maxsize=1)(self._draw_batch)  # accumulation asks for a step part by part

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step: masked ids, labels, weights, and what the model and `weight` need beside them."""
        mine = slice(slots.start, slots.stop)
        shared = ("attention_pattern",)  # [1, W, W]
        return {name: t if name in shared else t[mine] for name, t in self._step_batch(step).items()}

    def _draw_batch(self, step: int) -> Batch:
        """A whole step's batch: a process takes its part of what one process would have drawn."""
        recipe, seed, size = self.config, self.config.training.seed, self.config.training.batch_size
        length = window_length(recipe.data, generator(seed, step, _LENGTH))
        batch, maskable, is_end = self._clean(step, length)
        clean = batch["input_ids"]
        t = self.process.sample_times(size, generator(seed, step, _TIMES))
        full = torch.rand(size, generator=generator(seed, step, _FULL)) < recipe.objective.fully_masked_fraction
        t = torch.where(full, 1.0, t)
        # an adapted model's mask token may be an ordinary one: where text has it, it is not a label
        maskable = maskable & (clean != self.process.mask_token_id)
        if recipe.objective.end_masking == "visible":
            maskable = maskable & ~first_of_each_row(is_end)
        masked = self.process.corrupt(clean, t, maskable, generator(seed, step, _MASKS))
        mask = masked.mask
        if recipe.objective.end_masking == "always":
            mask = mask | (is_end & maskable)
        counted = mask
        if recipe.objective.loss_on_first_token is False:
            counted, maskable = (without_first_token(each) for each in (mask, maskable))
        weight = masked.weight
        if recipe.objective.normalizer == "answer":
            weight = weight / maskable.sum(1).clamp(min=1)
        batch |= {
            "input_ids": clean.masked_fill(mask, self.process.mask_token_id),
            "labels": clean.masked_fill(~counted, IGNORED_LABEL),
            "row_weight": weight[:, None],
            "maskable": maskable.sum(1),
        }
        if self.model.config.timestep_embedding:
            batch["timesteps"] = t
        if step < recipe.objective.annealing_steps:
            seen = step / recipe.objective.annealing_steps
            source = generator(seed, step, _ATTENTION)
            batch["attention_pattern"] = annealed_attention_mask(clean.shape[1], seen, generator=source)
        return batch

    def _clean(self, step: int, length: int) -> tuple[Batch, Tensor, Tensor | None]:
        """Clean text and what belongs to it, what may be masked [B, W], and of pairs where their ends are [B, W]."""
        if not self.pairs:
            ids = document_windows(self.data.train.targets, length, self._starts(step, length))
            return {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool), None
        windows = windows_of_pairs(self.config, self.model.config, self.data.train, self.stream.indices(step), length)
        batch = {"input_ids": windows.input_ids}
        if not windows.attention_mask.all():
            batch["attention_mask"] = windows.attention_mask
        if windows.condition_ids is not None:
            batch |= {"encoder_input_ids": windows.condition_ids, "encoder_attention_mask": windows.condition_mask}
        return batch, windows.maskable, windows.is_end

    def _starts(self, step: int, length: int) -> Tensor:
        seed, size = self.config.training.seed, self.config.training.batch_size
        starts = self.data.train.targets.num_tokens - length + 1
        return torch.randint(starts, (size,), generator=generator(seed, step, _ORDER))

    def weight(self, batch: Batch) -> float:
        """This batch's part of the recipe's normaliser."""
        normalizer = self.config.objective.normalizer
        if normalizer == "answer":
            return float(len(batch["labels"]))
        counted = batch["labels"] != IGNORED_LABEL if normalizer == "masked_tokens" else batch["maskable"]
        return float(counted.sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the weighted cross entropies of masked tokens, in nats."""
        inputs = {name: t for name, t in batch.items() if name not in ("maskable", "attention_pattern")}
        pattern = batch.get("attention_pattern")
        if pattern is not None:
            keys = inputs.get("attention_mask")
            inputs["attention_mask"] = pattern if keys is None else pattern & keys[:, None]
        return model(**inputs, loss_normalizer=1.0, return_logits=False).loss

    def sample_ids(self, step: int) -> list[int]:
        """Indices of pairs; of documents the first token of each window in the token file."""
        if self.pairs:
            return self.stream.indices(step).tolist()
        length = window_length(self.config.data, generator(self.config.training.seed, step, _LENGTH))
        return self._starts(step, length).tolist()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Model, tokenizer and ways of decoding, as `from_pretrained` of each reads them."""
        save_model(folder, model, self.tokenizer, self.config.sampling.generation)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The Monte-Carlo likelihood bound of the held-out text."""
        from fastdiff.evaluation.likelihood import likelihood_bound

        device = next(model.parameters()).device
        dtype = autocast_dtype(self.config.training.mixed_precision, device.type)
        with autocast(device, dtype):
            bound = likelihood_bound(model, **likelihood_arguments(self.config, self.model.config, self.data))
        return {
            "nats_per_token": bound.nats_per_token,
            "standard_error": bound.standard_error,
            "perplexity": bound.perplexity,
        }

    def preview(self, model: nn.Module, path: Path) -> None:
        """Generated texts, each token in the colour of the step that chose it."""
        from fastdiff.visualization import save_text_samples

        save_text_samples(self.samples(model), path, title="dark: tokens of the first steps, light: of the last")

    def samples(self, model: nn.Module) -> list[TextSample]:
        """What the recipe's `sampling` asks for."""
        from fastdiff.tasks.masked_lm.samples import draw_samples, sample_prompts

        sampling, training = self.config.sampling, self.config.training
        return draw_samples(
            model,
            self.tokenizer,
            sample_prompts(TextCodec(self.tokenizer, self.model.config), sampling.prompts, self.data.held_out),
            {"seed": training.seed, **sampling.generation},
            max_length=self.config.data.max_length,
            pairs=self.pairs,
            dtype=autocast_dtype(training.mixed_precision, model.head_weight.device.type),
        )

    def data_sets(self) -> dict[str, TextData]:
        """The text."""
        return {"data": self.data}

    def facts(self) -> dict[str, Any]:
        """Nothing but the kind: tokenizer and data have places of their own."""
        return {"kind": "masked_lm"}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(dataclasses.asdict(self.config))


def first_of_each_row(mask: Tensor) -> Tensor:  # bool [B, W]
    """The first True of each row alone."""
    return mask & (mask.cumsum(1) == 1)


def check_fit(recipe: MaskedLMRecipe, data: TextData, config: Any) -> None:
    """Raises ValueError where the parts of a recipe do not fit each other or the text."""
    longest = recipe.data.max_length + (config.num_encoder_layers > 0)  # BoS
    if data.train.conditions is not None and not config.num_encoder_layers:
        longest += int(max(part.conditions.document_lengths.max() for part in (data.train, data.held_out)))
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"model.max_position_embeddings: got {config.max_position_embeddings}; samples have up to {longest} "
            "tokens: set it to that, or data.max_length or data.max_prompt_length lower"
        )
    if data.train.conditions is None and data.train.targets.num_tokens < recipe.data.max_length:
        raise ValueError(
            f"data.max_length: got {recipe.data.max_length}; the text has {data.train.targets.num_tokens} tokens"
        )
    if data.train.conditions is None and recipe.objective.end_masking != "as_text":
        raise ValueError(
            f"objective.end_masking: got {recipe.objective.end_masking!r}, which is for pairs; this text has documents"
        )
    if config.eos_token_id is None:
        raise ValueError("tokenizer.name: it has no EoS token, which closes texts; choose another")
