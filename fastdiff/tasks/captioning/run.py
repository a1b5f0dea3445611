"""Captioning models, loaded to caption images with."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastdiff.data.text_codec import TextCodec
from fastdiff.device import check_device, check_dtype
from fastdiff.files import read_json, write_atomically
from fastdiff.models.pretrained import CONFIG_NAME, naming_config, read_config
from fastdiff.models.vision_encoder import VisionEncoder, load_vision_encoder
from fastdiff.recipes import load_recipe, plain
from fastdiff.tasks.captioning.features import name_of, read_images, states_of
from fastdiff.tasks.captioning.recipe import CaptioningRecipe, VisionConfig
from fastdiff.tasks.masked_lm.run import load_length_predictor, read_model, save_model, saved_decoding
from fastdiff.tasks.run import Run, check_count, find, going_by_choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdiff.generation import Continuation, Streamer
    from fastdiff.models.masked_lm import MaskedDiffusionLM
    from fastdiff.tasks.captioning.decoding import Captioner

CLASS_NAME = "ImageCaptioner"  # `_class_name` in config.json, which tells such a folder from a language model's


@dataclass(frozen=True)
class CaptioningRun(Run):
    """A language model that captions images, and what looks at them.

    Attributes:
        tokenizer: its tokenizer.
        decoding: how captions are decoded where nobody says otherwise: fields of `MaskedDiffusionGenerationConfig`.
        vision_config: the vision encoder's name and ways.
        fingerprint: of the states that it gave in training.
        image_shape: (C, H, W) to which pictures are cropped and resized before the encoder sees them, as the data's.
    """

    kind: ClassVar[str] = "captioning"

    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, repr=False)
    decoding: dict[str, Any] = field(default_factory=dict)
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    fingerprint: str = ""
    image_shape: tuple[int, int, int] = (3, 64, 64)

    @functools.cached_property
    def vision(self) -> VisionEncoder:
        """What looks at images, loaded when it is first asked for.

        Raises FileNotFoundError or ModuleNotFoundError where it is missing, ValueError where it is not the one that the
        run was trained with.
        """
        encoder = load_vision_encoder(self.vision_config, self.model.device)
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(
                f"vision: got {self.vision_config.name!r} with the fingerprint {encoder.fingerprint[:12]}; "
                f"{self.source} was trained with {self.fingerprint[:12]}: it would see something else; bring the same "
                "weights and preprocessing back"
            )
        return encoder

    @property
    def codec(self) -> TextCodec:
        """Text to ids and back, as training had them."""
        return TextCodec(self.tokenizer, self.model.config)

    def generate(
        self,
        images: Any,
        *,
        num_samples: int = 1,
        batch_size: int = 16,
        streamer: "Streamer | None" = None,
        **options: Any,
    ) -> "list[list[Continuation]]":
        """Captions images.

        Args:
            images: paths or PIL images, several or one, of any size and mode: each is made as the run's data.
            num_samples: captions of each image; they differ where temperature is above 0.
            batch_size: captions decoded at once; it does not change them.
            streamer: called after each step of each batch, as streamer(token_ids, step); see
                `fastdiff.generation.generate`.
            options: fields of `MaskedDiffusionGenerationConfig`; what is not given is what the run's recipe says.
                guidance_scale is that of guidance on the image.

        Returns:
            For each image num_samples `Continuation`s (`.text`, `.tokens`; `.prompt` is what the image is called).

        Raises:
            FileNotFoundError, TypeError, ValueError: what is no image, no image at all, options that do not fit; the
                message names it.
        """
        images = list(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
        check_count("num_samples", num_samples)
        check_count("batch_size", batch_size)
        captioner = self.captioner(options)
        states = self.states(images)
        names = [name_of(image, number) for number, image in enumerate(images, 1)]
        make_streamer = None if streamer is None else lambda *_: streamer
        sizes = dict(num_samples=num_samples, batch_size=batch_size, streamer=make_streamer)
        return self.captions(captioner, names, states, **sizes)

    def captioner(self, options: Mapping[str, Any]) -> "Captioner":
        """What captions are written with: the run's way of decoding, with `options` instead where they are given.

        Raises ValueError, TypeError for options that do not fit.
        """
        from fastdiff.generation import MaskedDiffusionGenerationConfig
        from fastdiff.generation.config import merged_options
        from fastdiff.tasks.captioning.decoding import Captioner

        unset = {name: None for name, value in options.items() if value is None}  # what the recipe says is not wanted
        decoding = merged_options(options, self.decoding) | unset
        predictor = load_length_predictor(self, MaskedDiffusionGenerationConfig(**decoding))
        return Captioner(self.model, self.tokenizer, decoding, predictor)

    def states(self, images: Sequence[Any]) -> list[Tensor]:
        """What the vision encoder sees in paths or PIL images: [M, C] each. Raises as `generate`."""
        return states_of(read_images(images, self.image_shape), self.vision, self.vision_config)

    @going_by_choices
    def captions(
        self, captioner: "Captioner", names: Sequence[str], states: Sequence[Tensor], **options: Any
    ) -> "list[list[Continuation]]":
        """The captions of each image of `captioner(names, states, **options)`, together."""
        found: list[list[Continuation]] = [[] for _ in states]
        for batch in captioner(names, states, **options):
            for sample in batch:
                found[sample.row].append(sample)
        return found

    def usage(self) -> str:
        return 'print(run.generate(["photo.png"], seed=0)[0][0].text)'

    def _save(self, directory: Path) -> None:
        facts = {**dataclasses.asdict(self.vision_config), "fingerprint": self.fingerprint}
        save_captioner(directory, self.model, self.tokenizer, self.decoding, facts, self.image_shape)


def save_captioner(
    directory: Path,
    model: "MaskedDiffusionLM",
    tokenizer: "PreTrainedTokenizerBase",
    decoding: Mapping[str, Any],
    vision: Mapping[str, Any],
    image_shape: Sequence[int],
) -> None:
    """Writes a model so that it captions by itself, but for the weights of its vision encoder.

    Args:
        vision: the fields of `VisionConfig`, and "fingerprint".
        image_shape: (C, H, W) of the data's images.
    """
    save_model(directory, model, tokenizer, decoding)
    file = directory / CONFIG_NAME
    facts = {"_class_name": CLASS_NAME, "vision": plain(dict(vision)), "image_shape": list(image_shape)}
    write_atomically(file, json.dumps(read_json(file) | facts, indent=2) + "\n")


def load_run(
    path: str | Path,
    *,
    weights: str = "ema",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> CaptioningRun:
    """Loads a run of `task: captioning`, or a saved model; arguments and errors are those of `fastdiff.load`.

    The vision encoder is loaded when an image is to be looked at. `dtype` None is as stored.
    """
    device, dtype = check_device(device), check_dtype(dtype)
    found = find(path, "captioning", weights)
    recipe = None if found.folder is None else load_recipe(CaptioningRecipe, found.folder.config)
    model, tokenizer = read_model(found, dtype)
    values = read_config(found.source)
    with naming_config(found.source, "a captioning model"):
        vision = dict(values["vision"])
        fingerprint, shape = vision.pop("fingerprint"), tuple(values["image_shape"])
        if not isinstance(fingerprint, str) or len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
            raise ValueError("vision.fingerprint or image_shape: expected a text, and [1 or 3, height, width]")
        vision_config = VisionConfig(**vision)
    decoding = saved_decoding(found.source) if recipe is None else recipe.decoding
    return CaptioningRun(
        model=model.to(device),
        **found.origin,
        recipe=recipe,
        tokenizer=tokenizer,
        decoding=dict(decoding),
        vision_config=vision_config,
        fingerprint=fingerprint,
        image_shape=shape,
    )
