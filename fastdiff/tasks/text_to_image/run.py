"""Runs of text-to-image models, loaded to sample from."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.data.text_states import TextStates
from fastdiff.device import autocast, autocast_dtype, check_device, evaluating
from fastdiff.diffusion import Diffusion, DiffusionConfig
from fastdiff.diffusion.continuous import split_variance
from fastdiff.diffusion.sampler_config import check_sampler
from fastdiff.errors import section
from fastdiff.models.autoencoder import FOLDER, decode, load_decoder
from fastdiff.models.pretrained import naming_config, read_config
from fastdiff.models.text_encoder import TextEncoder, TextEncoderConfig
from fastdiff.models.text_to_image import TextToImage
from fastdiff.recipes import load_recipe, plain
from fastdiff.tasks.images import check_pictures, to_pil
from fastdiff.tasks.labels import labels_of
from fastdiff.tasks.run import Found, Run, check_count, find, going_by_choices, sampling_keys, stored_sampling
from fastdiff.tasks.text_to_image.drawing import Conditions, Step, draw_images, load_encoder
from fastdiff.tasks.text_to_image.recipe import TextToImageRecipe, TextToImageSamplingConfig
from fastdiff.training.setup import keep_freed_memory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from PIL.Image import Image

_OUTPUTS = ("pil", "pt", "latent")


@dataclass(frozen=True)
class TextToImageRun(Run):
    """A text-to-image model, what reads texts for it, and how it samples.

    Attributes:
        diffusion: what the model predicts, at which noise levels.
        class_names: of the data, by label; () where there are none.
        labelled: whether its diffusion transformer draws those classes by label, too: it was trained on the same ones,
            and has stayed as it was.
        sampling: how samples are denoised where nobody says otherwise.
        mixed_precision: as in `TrainingConfig`.
        text_encoder: the language model that reads texts.
        fingerprint: of the states that it gave in training.
        decoder: of a model of latents, what makes images of them.
    """

    kind: ClassVar[str] = "text_to_image"

    diffusion: Diffusion = field(default_factory=lambda: Diffusion(DiffusionConfig()))
    class_names: tuple[str, ...] = ()
    labelled: bool = False
    sampling: TextToImageSamplingConfig = field(default_factory=TextToImageSamplingConfig)
    mixed_precision: str = "auto"
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    fingerprint: str = ""
    decoder: "AutoencoderKL | None" = None

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        """What reads texts, loaded when it is first asked for.

        Raises FileNotFoundError or ModuleNotFoundError where it is missing, ValueError where it is not the one that the
        run was trained with.
        """
        encoder = load_encoder(self.text_encoder, self.class_names, next(self.model.parameters()).device)
        if encoder.fingerprint != self.fingerprint:
            raise ValueError(
                f"text_encoder: got {self.text_encoder.name!r} with the fingerprint {encoder.fingerprint[:12]}; "
                f"{self.source} was trained with {self.fingerprint[:12]}: its texts would mean something else; bring "
                "the same weights and tokenizer back"
            )
        return encoder

    def sample(
        self,
        prompts: "Sequence[str] | str | None" = None,
        *,
        classes: "Sequence[int | str] | Tensor | int | str | None" = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        progress: bool = False,
        **options: Any,
    ) -> "list[Image] | Tensor":
        """Draws images.

        Args:
            prompts: texts, one or several.
            classes: instead of prompts, labels or class names, one or several: where the diffusion transformer was
                trained on them and stayed as it was (`train: q_former`) it draws by label, without any text; else the
                class names are the prompts.
            num_images_per_prompt: images of each entry; they follow each other.
            num_inference_steps, guidance_scale, seed: None is what the run's recipe says. Image i of the call has the
                seed `seed` + i.
            output_type: "pil", "pt" or "latent".
            progress: shows a bar.
            options: other fields of `TextToImageSamplingConfig`: guidance_interval, and those of the sampler
                (`fastdiff.diffusion.SamplerOptions`).

        Returns:
            N = entries · num_images_per_prompt images. "pil": PIL images of 8 bits, grey ("L") or RGB. "pt": a float32
            tensor [N, C, H, W] on the CPU, with values around -1 … 1. "latent": what the model itself draws; a model of
            latents without a decoder gives that for "pt", too.

        Raises:
            ValueError: both or neither of prompts and classes, a prompt that is too long, not a class, a number out of
                range, an option that does not fit the sampler, guidance of a model that never learnt to draw without a
                text, or latents asked for as images; before any image is drawn.
            TypeError: an option that there is not, or a value of another type.
        """
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type: got {output_type!r}; expected one of {', '.join(map(repr, _OUTPUTS))}")
        if output_type == "pil":
            self.check_pictures()
        check_count("num_images_per_prompt", num_images_per_prompt)
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "seed": seed, **options}
        sampling = self.sampling.replaced(given)
        conditions = self.conditions(prompts, classes)
        drawn = self.draw(conditions.repeated(num_images_per_prompt), sampling, progress=progress)
        images = drawn if output_type == "latent" else self.decoded(drawn)
        return to_pil(images) if output_type == "pil" else images

    def conditions(
        self,
        prompts: "Sequence[str] | str | None" = None,
        classes: "Sequence[int | str] | Tensor | int | str | None" = None,
    ) -> Conditions:
        """What images are drawn from: texts that are read once, or labels.

        Raises:
            ValueError: both or neither, none of one, a prompt that is too long, or not a class.
            TypeError: what are no texts or labels.
        """
        if (prompts is None) == (classes is None):
            got = "neither" if prompts is None else "both"
            raise ValueError(f"prompts, classes: got {got}; expected one of them")
        if classes is not None:
            if not self.class_names:
                raise ValueError(f"classes: got {classes!r}; the run's data has no classes; pass prompts")
            labels = labels_of(classes, self.class_names)
            texts = [self.class_names[label] for label in labels]
            if self.labelled:
                return Conditions(tuple(texts), labels=torch.tensor(labels, dtype=torch.int64))
        else:
            texts = [prompts] if isinstance(prompts, str) or not isinstance(prompts, Iterable) else list(prompts)
        if not texts:
            raise ValueError(f"{'prompts' if classes is None else 'classes'}: got none; expected one or more")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"prompts: got {texts!r}; expected texts")
        different = list(dict.fromkeys(texts))
        with section("text_encoder"):  # whose max_length it is
            self.encoder.check(different)
        states = TextStates.pad(self.encoder.encode(different))
        rows = torch.tensor([different.index(text) for text in texts])
        return Conditions(tuple(texts), {name: value[rows] for name, value in states.items()})

    def check_sampling(self, sampling: TextToImageSamplingConfig, count: int = 1) -> None:
        """Raises ValueError where `count` samples cannot be drawn so.

        That is: a sampler that does not fit the diffusion, or guidance of a model that never learnt to draw without a
        text.
        """
        check_sampler(sampling, self.diffusion, count)
        config = self.model.config
        learnt = self.model.knows_no_text() and (config.conditioning == "q_former" or config.text_dropout_prob > 0)
        if sampling.guidance_scale != 1 and not learnt:
            raise ValueError(
                f"guidance_scale: got {sampling.guidance_scale:g}; {self.source} was trained with text_dropout_prob 0 "
                "and never learnt to draw without a text; expected 1"
            )

    @going_by_choices
    def draw(
        self,
        conditions: Conditions,
        sampling: TextToImageSamplingConfig,
        *,
        batch_size: int = 100,
        progress: bool = False,
        keep: Callable[[Tensor], object] | None = None,
        callback: Step | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Samples, one a condition: float32 [N, C, H, W] on the CPU, latents where it is a model of latents.

        Sample i depends on its condition and on its seed alone, whatever `batch_size` (rounding aside): seed + i, or
        `seeds[i]`. `keep` gets the samples drawn so far after each batch but the last. `callback` is that of
        `fastdiff.diffusion.sample`, for each batch.

        Raises ValueError as `check_sampling`.
        """
        self.check_sampling(sampling, len(conditions))
        device = next(self.model.parameters()).device
        if device.type == "cpu":  # else each step maps activations anew
            keep_freed_memory()
        dtype = autocast_dtype(self.mixed_precision, device.type, self.model)
        seeds = [sampling.seed + index for index in range(len(conditions))] if seeds is None else list(seeds)
        parts: list[Tensor] = []
        with tqdm(total=len(conditions), unit="image", desc="sampling", disable=not progress) as bar:
            for start in range(0, len(conditions), batch_size):
                part = conditions[start : start + batch_size]
                mine = seeds[start : start + batch_size]
                images = draw_images(self.model, self.diffusion, part, sampling, mine, dtype, callback)
                parts.append(images.cpu())
                bar.update(len(part))
                if keep is not None and start + batch_size < len(conditions):
                    keep(torch.cat(parts))
        return torch.cat(parts)

    @torch.no_grad()
    @going_by_choices
    def predicted(self, conditions: Conditions, noised: Tensor, t: Tensor) -> Tensor:
        """The images that the model sees in noisy ones, in one step without guidance: float32 [N, C, H, W], on the CPU.

        Args:
            conditions: N of them.
            noised: [N, C, H, W], at the times t [N].
        """
        device = next(self.model.parameters()).device
        dtype = autocast_dtype(self.mixed_precision, device.type, self.model)
        noised, t = noised.to(device), t.to(device)
        with evaluating(self.model), autocast(device, dtype):
            if conditions.labels is not None:
                predict = functools.partial(self.model.dit, class_labels=conditions.labels.to(device))
            else:
                predict = functools.partial(self.model, condition=conditions.read_by(self.model, dtype))
            prediction, _ = split_variance(predict(noised, self.diffusion.model_time(t)).float(), noised.shape[1])
        return self.diffusion.predicted_x0(prediction, noised, t).cpu()

    def decoded(self, samples: Tensor) -> Tensor:  # [N, C, H, W], float32, as `draw` gives them
        """Images of samples: what the decoder makes of latents; samples of other models are images."""
        return samples if self.decoder is None else decode(self.decoder, samples)

    def check_pictures(self) -> None:
        """Raises ValueError where samples are latents that nothing here makes pictures of."""
        check_pictures(self.source, self.model.config.dit.in_channels, self.decoder)

    def usage(self) -> str:
        prompt = (self.sampling.prompts or list(self.class_names) or ["…"])[0]
        return f'images = run.sample([{json.dumps(prompt, ensure_ascii=False)}])\nimages[0].save("sample.png")'

    @going_by_choices
    def _save(self, directory: Path) -> None:
        facts = {**dataclasses.asdict(self.text_encoder), "fingerprint": self.fingerprint}
        save_model(
            directory, self.model, self.diffusion, self.sampling, self.mixed_precision, facts, self.class_names,
            self.labelled, self.decoder,
        )  # fmt: skip


def save_model(
    directory: Path,
    model: TextToImage,
    diffusion: Diffusion,
    sampling: TextToImageSamplingConfig,
    mixed_precision: str,
    text_encoder: Mapping[str, Any],
    class_names: Sequence[str],
    labelled: bool,
    decoder: "AutoencoderKL | None",
) -> None:
    """Writes a model so that it samples by itself: with its diffusion process, what reads its texts, and its decoder.

    Args:
        text_encoder: the fields of `TextEncoderConfig`, and "fingerprint".
        class_names: of the data, by label.
        labelled: whether its diffusion transformer draws them by label.
    """
    id2label = {str(label): name for label, name in enumerate(class_names)}
    extra = sampling_keys(sampling, mixed_precision) | {"text_encoder": plain(dict(text_encoder)), "labelled": labelled}
    model.save_pretrained(directory, extra=extra | ({"id2label": id2label} if id2label else {}))
    options = diffusion.sampler_options.replaced(sampling.options(), diffusion.config)
    Diffusion(diffusion.config, options).save_pretrained(directory)
    if decoder is not None:
        decoder.save_pretrained(directory / FOLDER)


def load_run(path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None) -> TextToImageRun:
    """Loads a run of `task: text_to_image`, or a saved model; arguments and errors are those of `fastdiff.load`.

    The text encoder is loaded when a text is to be read.
    """
    device = check_device(device)
    found = find(path, "text_to_image", weights)
    model = TextToImage.from_pretrained(found.source, weights=found.weights_file)
    recipe = None if found.folder is None else load_recipe(TextToImageRecipe, found.folder.config)
    if recipe is None:
        sampling, precision = stored_sampling(found.source, TextToImageSamplingConfig)
    else:
        sampling, precision = recipe.sampling, recipe.training.mixed_precision
    return TextToImageRun(
        model=model.to(device).eval(),
        **found.origin,
        recipe=recipe,
        diffusion=Diffusion.from_pretrained(found.source),
        sampling=sampling,
        mixed_precision=precision,
        decoder=load_decoder(found.source, model.config.dit.in_channels, device),
        **_facts_of(found),
    )


def _facts_of(found: Found) -> dict[str, Any]:
    """What config.json says beside the model. Raises ValueError, naming the file, where it cannot be."""
    values = read_config(found.source)
    with naming_config(found.source, "a text-to-image model"):
        encoder = dict(values["text_encoder"])
        fingerprint = encoder.pop("fingerprint")
        names = values.get("id2label", {})
        if not isinstance(fingerprint, str) or not isinstance(names, dict):
            raise ValueError("text_encoder.fingerprint or id2label: expected a text, and an object")
        return {
            "text_encoder": TextEncoderConfig(**encoder),
            "fingerprint": fingerprint,
            "labelled": bool(values.get("labelled", False)),
            "class_names": tuple(str(names[str(label)]) for label in range(len(names))),
        }
