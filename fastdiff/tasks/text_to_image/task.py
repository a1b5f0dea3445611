"""Training of a text-to-image model: its task. The recipe is in recipe.py."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data import EpochStream, ImageData, load_data
from fastdiff.data.images import flip_some, shift_and_scale
from fastdiff.data.text_states import TextStates, cached_text_states
from fastdiff.device import autocast_dtype
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.errors import section
from fastdiff.models.autoencoder import decode
from fastdiff.models.text_encoder import TextEncoder
from fastdiff.nn.attention_maps import EntropyTerm
from fastdiff.recipes import plain
from fastdiff.tasks.latents import load_latents
from fastdiff.tasks.text_to_image.drawing import Conditions, draw_images, load_encoder
from fastdiff.tasks.text_to_image.recipe import TextToImageRecipe, check_fit, check_recipe
from fastdiff.tasks.text_to_image.run import save_model
from fastdiff.tasks.text_to_image.start import build_model, load_start
from fastdiff.tasks.texts import TextChoice, captions_of, shown_texts, trained_texts
from fastdiff.training.randomness import derive_seed, generator, normal_noise
from fastdiff.training.task import Batch

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _TIMES, _DROPPED, _NOISE, _FLIPS, _TEXTS, _SHIFTS = 2, 3, 4, 5, 6, 7, 8
_CONDITION = ("text_states", "text_mask", "text_rows", "dropped")  # of a batch, what the model is conditioned on


class TextToImageTask:
    """Denoising of images, or of their latents, under texts, as the trainer sees it.

    The texts' states are made once, before training, and kept in the cache.

    Args:
        recipe: the run's recipe.
        data: the images, where they are loaded already.
        encoder: the text encoder, where it is loaded already.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: data, text encoder, autoencoder or DiT are missing, or do
            not fit each other; one line.
    """

    unit = "images"
    partial_gradients = False

    def __init__(
        self, recipe: TextToImageRecipe, data: ImageData | None = None, encoder: TextEncoder | None = None
    ) -> None:
        check_recipe(recipe)
        start = load_start(recipe)
        self.config = recipe = dataclasses.replace(recipe, model=start.config)
        with section("data"):
            self.data = load_data(recipe.data) if data is None else data
        captions, training = captions_of(self.data), recipe.training
        weights = recipe.objective.entry_weights
        texts, rows = trained_texts(captions, [name for name, weight in weights.items() if not weight])
        with section("objective"):
            self.choose = TextChoice(rows, captions.entries, weights)
        prompts = recipe.sampling.prompts or shown_texts(captions)
        recipe.sampling = dataclasses.replace(recipe.sampling, prompts=prompts)
        if encoder is None:
            encoder = load_encoder(recipe.text_encoder, self.data.class_names)
        with section("text_encoder"):  # whose max_length it is
            encoder.check([*prompts, *texts])
        self.decoder, self.latents = None, None
        fits = functools.partial(check_fit, recipe, name=self.data.name)
        if recipe.latents is None:
            fits(self.data.image_shape)
        else:
            self.decoder, self.latents = load_latents(recipe.latents, self.data, check=fits)
        self.images = self.data.train if self.latents is None else self.latents.train
        self.states = cached_text_states(texts, encoder.encode, encoder.fingerprint)
        self.prompts, self.prompt_states = tuple(prompts), self._states_of(prompts, texts, encoder)
        self.encoder_facts = {**dataclasses.asdict(recipe.text_encoder), "fingerprint": encoder.fingerprint}
        self.diffusion = Diffusion(recipe.diffusion)
        self.stream = EpochStream(len(self.images), training.batch_size, derive_seed(training.seed, _ORDER))
        # a frozen DiT still draws the classes that it was trained on
        self.labelled = recipe.train == "q_former" and start.draws_classes(self.data.class_names)
        self.model = build_model(recipe, start, encoder.hidden_size, encoder.num_states)
        # a DiT that knows no empty condition never gets one
        self.given = _CONDITION if self.model.knows_no_text() else _CONDITION[:-1]
        weight = recipe.objective.attention_entropy_weight
        self.entropy = EntropyTerm(self.model, weight) if weight else None

    def _states_of(self, prompts: Sequence[str], texts: Sequence[str], encoder: TextEncoder) -> dict[str, Tensor]:
        """Those of prompts, as `TextStates.pad` gives them; what the cache has is not read again."""
        known = {text: index for index, text in enumerate(texts)}
        others = [prompt for prompt in prompts if prompt not in known]
        read = dict(zip(others, encoder.encode(others), strict=True)) if others else {}
        return TextStates.pad([read[each] if each in read else self.states.states(known[each]) for each in prompts])

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step: x0 and noise [n, C, H, W], dropped and t [n]; the states of the different texts with
        their mask, and which of them each image has (text_rows [n])."""
        seed, size = self.config.training.seed, self.config.training.batch_size
        mine = slice(slots.start, slots.stop)

        def draws(purpose: int, *each: int) -> Tensor:  # of the whole batch: a process takes its part of what one draws
            return torch.rand(size, *each, generator=generator(seed, step, purpose))[mine]

        indices = self.stream.indices(step)[mine]
        x0 = self.images.images(indices)
        if self.config.data.horizontal_flip:
            x0 = flip_some(x0, draws(_FLIPS))
        shift, scale = self.config.data.random_shift or 0.0, self.config.data.random_scale or 0.0
        if shift or scale:
            x0 = shift_and_scale(x0, draws(_SHIFTS, 3), shift, scale)
        texts, text_rows = self.choose(indices, draws(_TEXTS)).unique(return_inverse=True)
        return {
            "x0": x0,
            **self.states.batch(texts),
            "text_rows": text_rows,
            "dropped": draws(_DROPPED) < self.config.objective.text_dropout_prob,
            "t": self.diffusion.sample_times(size, generator(seed, step, _TIMES), torch.device("cpu"))[mine],
            "noise": normal_noise(slots, x0.shape[1:], seed, step, _NOISE),
        }

    def weight(self, batch: Batch) -> float:
        """The number of images."""
        return float(len(batch["x0"]))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the images' losses."""
        predict = functools.partial(model, **{name: batch[name] for name in self.given})
        loss = self.diffusion.loss(predict, batch["x0"], batch["t"], batch["noise"]).sum()
        return loss if self.entropy is None else loss + self.entropy() * len(batch["x0"])

    def sample_ids(self, step: int) -> list[int]:
        """Indices in the training part of the data."""
        return self.stream.indices(step).tolist()

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model as `fastdiff.load` reads it: with what reads its texts, its decoder and its ways of sampling."""
        recipe = self.config
        save_model(
            folder, model, self.diffusion, recipe.sampling, recipe.training.mixed_precision, self.encoder_facts,
            self.data.class_names, self.labelled, self.decoder,
        )  # fmt: skip

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Nothing: fastdiff.evaluate scores samples, which takes classifiers."""
        return {}

    def preview(self, model: nn.Module, path: Path) -> None:
        """A grid of the recipe's prompts, or of held-out texts, each under its pictures."""
        from fastdiff.visualization import save_captioned_grid  # matplotlib: a second that other uses need not wait

        sampling, device = self.config.sampling, next(model.parameters()).device
        conditions = Conditions(self.prompts, self.prompt_states).repeated(sampling.images_per_prompt)
        seeds = [sampling.seed + index for index in range(len(conditions))]
        dtype = autocast_dtype(self.config.training.mixed_precision, device.type)
        drawn = draw_images(model, self.diffusion, conditions, sampling, seeds, dtype).cpu()
        images = drawn if self.decoder is None else decode(self.decoder, drawn)
        save_captioned_grid(images, self.prompts, path, title=sampling.described())

    def data_sets(self) -> dict[str, ImageData]:
        """The images, and their latents where the model draws those."""
        return {"data": self.data} | ({} if self.latents is None else {"latents": self.latents})

    def facts(self) -> dict[str, Any]:
        """The classes' names, by label, and the text encoder."""
        return {"class_names": list(self.data.class_names), "text_encoder": plain(self.encoder_facts)}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(self.config.to_dict())
