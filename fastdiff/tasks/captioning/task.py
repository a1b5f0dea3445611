"""Training of a captioning model: its task. The recipe is in recipe.py."""

import dataclasses
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data import EpochStream, ImageData, load_data
from fastdiff.data.images import to_bytes
from fastdiff.data.text_batches import PairBatch, window_length
from fastdiff.data.text_codec import TextCodec
from fastdiff.data.tokenization import load_tokenizer
from fastdiff.device import autocast, autocast_dtype
from fastdiff.diffusion.masked import MaskedDiffusion
from fastdiff.errors import section
from fastdiff.models.masked_lm import IGNORED_LABEL
from fastdiff.models.vision_encoder import VisionEncoder, load_vision_encoder
from fastdiff.recipes import plain
from fastdiff.tasks.captioning.decoding import start_token, text_samples
from fastdiff.tasks.captioning.features import cached_features
from fastdiff.tasks.captioning.recipe import CaptioningRecipe, check_recipe
from fastdiff.tasks.captioning.run import save_captioner
from fastdiff.tasks.captioning.start import build_model, load_start
from fastdiff.tasks.captioning.texts import CaptionTokens, references, selected
from fastdiff.tasks.masked_lm.held_out import evenly_spaced, likelihood_process
from fastdiff.tasks.texts import TextChoice, captions_of, trained_texts
from fastdiff.training.randomness import derive_seed, generator
from fastdiff.training.task import Batch
from fastdiff.visualization.text import TextSample

# purposes of derived seeds (the trainer's own is 1)
_ORDER, _TIMES, _LENGTH, _MASKS, _FULL, _TEXTS, _DROPPED = 2, 3, 4, 5, 6, 7, 8


class CaptioningTask:
    """Masked diffusion of captions under the states of their images, as the trainer sees it.

    As in diffusion-llm: each token of a caption is masked with probability 1 - cos(pi·t/2), and the loss is the masked
    tokens' mean cross entropy; the recipe may say otherwise. The images' states are made once, before training, and
    kept in the cache.

    Args:
        recipe: the run's recipe.
        data: the images, where they are loaded already.
        encoder: the vision encoder, where it is loaded already.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: data, vision encoder, tokenizer or language model are
            missing, or do not fit each other; one line.
    """

    unit = "images"
    partial_gradients = False

    def __init__(
        self, recipe: CaptioningRecipe, data: ImageData | None = None, encoder: VisionEncoder | None = None
    ) -> None:
        check_recipe(recipe)
        self.config, training = recipe, recipe.training
        model, tokenizer = (None, None) if recipe.model.init_from is None else load_start(recipe)
        if encoder is None:
            with section("vision"):
                encoder = load_vision_encoder(recipe.vision, "cpu" if training.device == "cpu" else None)
        with section("data"):
            self.data = load_data(recipe.data) if data is None else data
        with section("captions"):
            self.captions = selected(captions_of(self.data), recipe.captions.entries)
            texts, rows = trained_texts(self.captions)
            self.choose = TextChoice(rows, self.captions.entries, recipe.captions.entry_weights)
        with section("tokenizer"):
            self.tokenizer = load_tokenizer(recipe.tokenizer, texts) if tokenizer is None else tokenizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
            self.model = build_model(recipe, self.tokenizer, encoder.hidden_size, model)
        check_fit(recipe, self.model.config)
        self.start = start_token(TextCodec(self.tokenizer, self.model.config))
        self.tokens = CaptionTokens(texts, self.tokenizer)
        least = recipe.captions.min_length or recipe.captions.max_length
        self.lengths = dataclasses.replace(recipe.captions, min_length=least)
        self.features = cached_features(self.data, encoder, recipe.vision)
        self.vision_facts = {**dataclasses.asdict(recipe.vision), "fingerprint": encoder.fingerprint}
        self.process = MaskedDiffusion(recipe.diffusion, self.model.config.mask_token_id)
        self.stream = EpochStream(len(self.data.train), training.batch_size, derive_seed(training.seed, _ORDER))
        self._step_tokens = lru_cache(maxsize=1)(self._draw_tokens)  # accumulation asks for a step part by part

    def batch(self, step: int, slots: range) -> Batch:
        """Some slots of a step: masked ids, labels, weights, and the images' states [n, M, C] with what hides them."""
        mine = slice(slots.start, slots.stop)
        tokens = {name: t[mine] for name, t in self._step_tokens(step).items()}
        states = self.features.train.images(self.stream.indices(step)[mine])
        batch = {**tokens, "encoder_hidden_states": states}
        dropped = self.config.objective.condition_dropout_prob
        if dropped:  # a row whose states are all hidden is as one without an image
            kept = self._draws(step, _DROPPED)[mine] >= dropped
            batch["encoder_attention_mask"] = kept[:, None].expand(-1, states.shape[1]).contiguous()
        return batch

    def _draws(self, step: int, purpose: int) -> Tensor:  # [batch_size]: a process takes its part of what one draws
        seed, size = self.config.training.seed, self.config.training.batch_size
        return torch.rand(size, generator=generator(seed, step, purpose))

    def _draw_tokens(self, step: int) -> Batch:
        """The captions of a whole step's batch, masked."""
        recipe, seed, size = self.config, self.config.training.seed, self.config.training.batch_size
        length = window_length(self.lengths, generator(seed, step, _LENGTH))
        texts = self.choose(self.stream.indices(step), self._draws(step, _TEXTS))
        windows = self._windows(self.tokens, texts, length)
        clean = windows.input_ids
        maskable = windows.maskable & (clean != self.process.mask_token_id)  # an adapted model's may be in a text
        t = self.process.sample_times(size, generator(seed, step, _TIMES))
        t = torch.where(self._draws(step, _FULL) < recipe.objective.fully_masked_fraction, 1.0, t)
        masked = self.process.corrupt(clean, t, maskable, generator(seed, step, _MASKS))
        weight, count = masked.weight, maskable.sum(1)
        if recipe.objective.normalizer == "answer":
            weight = weight / count.clamp(min=1)
        batch = {
            "input_ids": masked.input_ids,
            "labels": clean.masked_fill(~masked.mask, IGNORED_LABEL),
            "row_weight": weight[:, None],
            "maskable": count,
        }
        return batch | ({"timesteps": t} if self.model.config.timestep_embedding else {})

    def _windows(self, tokens: CaptionTokens, texts: Tensor, length: int) -> PairBatch:
        return tokens.windows(texts, length, self.config.captions, self.model.config, self.start)

    def weight(self, batch: Batch) -> float:
        """This batch's part of the recipe's normaliser."""
        normalizer = self.config.objective.normalizer
        if normalizer == "answer":
            return float(len(batch["labels"]))
        counted = batch["labels"] != IGNORED_LABEL if normalizer == "masked_tokens" else batch["maskable"]
        return float(counted.sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the weighted cross entropies of masked tokens, in nats."""
        inputs = {name: t for name, t in batch.items() if name != "maskable"}
        return model(**inputs, loss_normalizer=1.0, return_logits=False).loss

    def sample_ids(self, step: int) -> list[int]:
        """Indices in the training part of the data."""
        return self.stream.indices(step).tolist()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Model, tokenizer, ways of decoding and the name of the vision encoder, as `fastdiff.load` reads them."""
        save_captioner(folder, model, self.tokenizer, self.config.decoding, self.vision_facts, self.data.image_shape)

    @cached_property
    def _held_out(self) -> dict[str, Any]:
        """Arguments of `likelihood_bound`: one caption each of held-out images, evenly spaced over them."""
        recipe, config = self.config, self.model.config
        captioned = {index: texts[0] for index, texts in enumerate(references(self.captions, "held_out")) if texts}
        if not captioned:
            raise ValueError("captions.entries: the held-out images have none of these texts; name others")
        count = recipe.objective.likelihood_samples
        images = torch.tensor(list(captioned))[evenly_spaced(len(captioned), count)]
        tokens = CaptionTokens([captioned[index] for index in images.tolist()], self.tokenizer)
        windows = self._windows(tokens, torch.arange(len(images)), recipe.captions.max_length)
        return {
            "process": likelihood_process(recipe, config),
            "sequences": windows.input_ids,
            "maskable": windows.maskable & (windows.input_ids != config.mask_token_id),
            "encoder_hidden_states": self.features.held_out.images(images),
            "num_samples": count,
            "seed": recipe.training.seed,
        }

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The Monte-Carlo likelihood bound of held-out images' captions."""
        from fastdiff.evaluation.likelihood import likelihood_bound

        device = next(model.parameters()).device
        with autocast(device, autocast_dtype(self.config.training.mixed_precision, device.type)):
            bound = likelihood_bound(model, **self._held_out)
        return {
            "nats_per_token": bound.nats_per_token,
            "standard_error": bound.standard_error,
            "perplexity": bound.perplexity,
        }

    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images, each with what people say of it and its captions, coloured by step."""
        from fastdiff.visualization.captions import caption_grid

        images, known, samples = self.samples(model)
        caption_grid(images, known, samples, path)

    def samples(self, model: nn.Module) -> tuple[Tensor, list[list[str]], list[TextSample]]:
        """Held-out images, uint8 [N, C, H, W], what people say of each, and what is generated of it."""
        sampling, training = self.config.sampling, self.config.training
        images = evenly_spaced(len(self.data.held_out), sampling.num_images)
        known = references(self.captions, "held_out")
        samples = text_samples(
            model,
            self.tokenizer,
            self.features.held_out.images(images),
            {"seed": training.seed, **self.config.decoding},
            num_samples=sampling.samples_per_image,
            dtype=autocast_dtype(training.mixed_precision, next(model.parameters()).device.type),
        )
        return to_bytes(self.data.held_out.images(images)), [known[index] for index in images.tolist()], samples

    def data_sets(self) -> dict[str, ImageData]:
        """The images with their texts, and their states."""
        return {"data": self.data, "vision": self.features}

    def facts(self) -> dict[str, Any]:
        """The vision encoder."""
        return {"kind": "captioning", "vision": plain(self.vision_facts)}

    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values, tuples as lists."""
        return plain(dataclasses.asdict(self.config))


def check_fit(recipe: CaptioningRecipe, config: Any) -> None:
    """Raises ValueError where the model does not fit the captions."""
    longest = recipe.captions.max_length + 1
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"model.max_position_embeddings: got {config.max_position_embeddings}; captions have up to {longest} "
            "tokens with BoS: set it to that, or captions.max_length lower"
        )
    if config.eos_token_id is None:
        raise ValueError("tokenizer.name: it has no EoS token, which closes captions; choose another")
