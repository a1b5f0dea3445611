"""Runs of diffusion transformers, loaded to sample from."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff.device import autocast_dtype, check_device
from fastdiff.diffusion import Diffusion, DiffusionConfig, SamplerOptions, sample_classes
from fastdiff.diffusion.sampler_config import check_sampler
from fastdiff.files import read_json
from fastdiff.models.autoencoder import FOLDER, decode, load_decoder
from fastdiff.models.dit import DiT
from fastdiff.models.dit_checkpoints import DIFFUSERS_CLASSES, model_folder
from fastdiff.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, check_overrides, read_config
from fastdiff.models.weights import check_counts, header_of
from fastdiff.recipes import load_recipe
from fastdiff.tasks.dit.recipe import DiTRecipe, SamplingConfig
from fastdiff.tasks.images import check_pictures, to_pil
from fastdiff.tasks.labels import labels_of, parse_labels
from fastdiff.tasks.run import Found, Run, check_count, find, going_by_choices, sampling_keys, stored_sampling
from fastdiff.training.checkpoint import load_weights
from fastdiff.training.setup import keep_freed_memory

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from PIL.Image import Image

SCHEDULER_CONFIG = "scheduler_config.json"
_HUB_FILES = (
    CONFIG_NAME, SCHEDULER_CONFIG, "model_index.json", WEIGHTS_NAME, "diffusion_pytorch_model*", "transformer/*",
    "scheduler/*", f"{FOLDER}/{CONFIG_NAME}", f"{FOLDER}/diffusion_pytorch_model*", "README.md", "samples.png",
)  # fmt: skip
# The process of the published DiT checkpoints, which is assumed of a folder that does not name its own.
_PUBLISHED = DiffusionConfig(prediction_type="epsilon", noise_levels="linear")
_LLM2DIT = replace(_PUBLISHED, time_scale=1.0)
_OUTPUTS = ("pil", "pt", "latent")


@dataclass(frozen=True)
class DiTRun(Run):
    """A DiT and how it samples.

    Attributes:
        diffusion: what the model predicts, at which noise levels.
        class_names: by label.
        sampling: how samples are denoised where nobody says otherwise.
        mixed_precision: as in `TrainingConfig`.
        decoder: of a model of latents, what makes images of them; None where its folder has none, and of other models.
    """

    kind: ClassVar[str] = "dit"

    diffusion: Diffusion = field(default_factory=lambda: Diffusion(_PUBLISHED))
    class_names: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mixed_precision: str = "auto"
    decoder: "AutoencoderKL | None" = None

    def labels(self, text: str | None) -> list[int]:
        """Labels from "0,3,7" or class names; None is every class once. Raises ValueError for what is not a class."""
        return list(range(len(self.class_names))) if text is None else parse_labels(text, self.class_names)

    def sample(
        self,
        classes: "Sequence[int | str] | Tensor | int | str | None" = None,
        *,
        num_images_per_class: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        progress: bool = False,
        **options: Any,
    ) -> "list[Image] | Tensor":
        """Draws images.

        Args:
            classes: labels or class names, one or several; None is every class once.
            num_images_per_class: images of each entry of `classes`; they follow each other.
            num_inference_steps, guidance_scale, seed: None is what the run's recipe says. Image i of the call has the
                seed `seed` + i.
            output_type: "pil", "pt" or "latent".
            progress: shows a bar.
            options: other fields of `SamplingConfig`: guidance_interval, guidance_channels, and those of the sampler
                (`fastdiff.diffusion.SamplerOptions`), such as sampler, timestep_spacing or timesteps. What is not given
                is what the recipe says, or else the model's scheduler_config.json.

        Returns:
            N = len(classes) · num_images_per_class images. "pil": PIL images of 8 bits, grey ("L") or RGB. "pt": a
            float32 tensor [N, C, H, W] on the CPU, with values around -1 … 1. "latent": what the DiT itself draws, of
            the same form; a model of latents without a decoder gives these for "pt", too.

        Raises:
            ValueError: not a class, a number out of range, an option that does not fit the sampler, or latents asked
                for as images; before any work.
            TypeError: an option that there is not, or a value of another type; before any work.
        """
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type: got {output_type!r}; expected one of {', '.join(map(repr, _OUTPUTS))}")
        if output_type == "pil":
            self.check_pictures()
        check_count("num_images_per_class", num_images_per_class)
        labels = list(range(len(self.class_names))) if classes is None else labels_of(classes, self.class_names)
        if not labels:
            raise ValueError("classes: got none; expected one or more, or None for every class")
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "seed": seed, **options}
        repeated = torch.tensor(labels).repeat_interleave(num_images_per_class)
        latents = self.draw(repeated, self.sampling.replaced(given), progress=progress)
        images = latents if output_type == "latent" else self.decoded(latents)
        return to_pil(images) if output_type == "pil" else images

    @going_by_choices
    def draw(
        self,
        labels: Sequence[int] | Tensor,
        sampling: SamplingConfig,
        *,
        batch_size: int = 100,
        progress: bool = False,
        keep: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Samples of these labels: float32 [N, C, H, W] on the CPU, latents where it is a model of latents.

        Sample i depends on its label and on seed + i alone, whatever `batch_size` (rounding aside). The network runs
        in the precision that the run would train in on this device (`fastdiff.device.autocast_dtype`). `keep` gets the
        samples drawn so far, [n, C, H, W], after each batch but the last (`fastdiff.tasks.results.AsTheyCome`).
        On a CPU the process then keeps freed memory for what it allocates next, as in training.

        Raises:
            ValueError: a sampler that does not fit the run, or a label out of range.
        """
        labels, parts = torch.as_tensor(labels), []
        check_sampler(sampling, self.diffusion, len(labels))
        device = next(self.model.parameters()).device
        if device.type == "cpu":  # else each step maps activations anew: up to a fifth of the CPU time
            keep_freed_memory()
        with tqdm(total=len(labels), unit="image", desc="sampling", disable=not progress) as bar:
            for start in range(0, len(labels), batch_size):
                part = labels[start : start + batch_size]
                images = sample_classes(
                    self.model,
                    self.diffusion,
                    part.to(device),
                    num_inference_steps=sampling.num_inference_steps,
                    seed=sampling.seed + start,
                    guidance_scale=sampling.guidance_scale,
                    guidance_interval=sampling.guidance_interval,
                    guidance_channels=sampling.guidance_channels,
                    autocast_dtype=autocast_dtype(self.mixed_precision, device.type, self.model),
                    **sampling.options(),
                )
                parts.append(images.cpu())
                bar.update(len(part))
                if keep is not None and start + batch_size < len(labels):
                    keep(torch.cat(parts))
        return torch.cat(parts)

    def decoded(self, samples: Tensor) -> Tensor:  # [N, C, H, W], float32, as `draw` gives them
        """Images of samples: what the decoder makes of latents; samples of other models are images."""
        return samples if self.decoder is None else decode(self.decoder, samples)

    def check_pictures(self) -> None:
        """Raises ValueError where samples are latents that nothing here makes pictures of."""
        check_pictures(self.source, self.model.config.in_channels, self.decoder)

    def usage(self) -> str:
        latents = self.decoder is None and self.model.config.in_channels not in (1, 3)
        show = ', output_type="pt")  # latents' if latents else ')\nimages[0].save("sample.png")'
        return f'images = run.sample(["{self.class_names[0]}"]{show}'

    @going_by_choices
    def _save(self, directory: Path) -> None:
        save_model(directory, self.model, self.diffusion, self.class_names, self.sampling, self.mixed_precision)
        if self.decoder is not None:
            self.decoder.save_pretrained(directory / FOLDER)


def save_model(
    directory: Path,
    model: DiT,
    diffusion: Diffusion,
    class_names: Sequence[str],
    sampling: SamplingConfig,
    mixed_precision: str,
) -> None:
    """Writes a DiT so that it samples by itself: with its diffusion process, class names and ways of sampling."""
    id2label = {str(label): name for label, name in enumerate(class_names)}
    extra = sampling_keys(sampling, mixed_precision) | ({"id2label": id2label} if id2label else {})
    model.save_pretrained(directory, extra=extra)
    options = diffusion.sampler_options.replaced(sampling.options(), diffusion.config)
    if model.config.learn_sigma and options.sampler == "ddpm" and options.variance_type is None:
        options = replace(options, variance_type="learned_range")  # diffusers' scheduler does not see the model
    Diffusion(diffusion.config, options).save_pretrained(directory)


def load_run(
    path: str | Path, *, weights: str = "ema", device: torch.device | str | None = None, **fields: Any
) -> DiTRun:
    """Loads a DiT; arguments and errors are those of `fastdiff.load`.

    Of a run, the newest checkpoint or the one named. Of anything else the folder or file is read as
    `DiT.from_pretrained` does. A pipeline of diffusers (DiTPipeline) loads whole: its scheduler says how samples are
    drawn, its vae makes images of them, and they are drawn with the defaults of its call: 50 steps, guidance 4 of all
    channels. A facebookresearch/DiT file is sampled as that repository's sample.py: ddpm, 250 steps, guidance 4 of the
    first 3 channels (`guidance_channels`); one of LLM2DiT as there: ddpm, 1000 steps, no guidance. All run in the dtype
    of their weights: float32, or the `dtype` given.

    Where a scheduler_config.json is missing, the process of the published DiT checkpoints is assumed, with a warning
    that says all of this. `fields` are those of `DiT.from_pretrained`, such as
    `dtype`, or the `num_heads` of a facebookresearch file.
    """
    device = check_device(device)
    found = find(path, "dit", weights, _HUB_FILES)
    if found.folder is not None:
        check_overrides(fields, ())
        return _load_checkpoint(found, device)
    own = {} if found.state is None else {"weights": found.weights_file}
    model = DiT.from_pretrained(found.source, **own, **fields)
    decoder = None if found.source.is_file() else load_decoder(found.source, model.config.in_channels, device)
    diffusion, sampling = _sampled_as(found, model)
    stored, mixed_precision = stored_sampling(found.source, SamplingConfig)
    if sampling is not None:  # as public code draws: in the dtype of the weights
        stored, mixed_precision = sampling, "no"
    if not model.config.null_label:
        stored = replace(stored, guidance_scale=1.0)
    return DiTRun(
        model=model.to(device),
        **found.origin,
        diffusion=diffusion,
        class_names=_names_of(found.source, model.config.num_classes),
        sampling=stored,
        mixed_precision=mixed_precision,
        decoder=decoder,
    )


def _load_checkpoint(found: Found, device: torch.device) -> DiTRun:
    recipe = load_recipe(DiTRecipe, found.folder.config)
    check_counts(asdict(recipe.model), header_of([found.source / found.weights_file]), found.folder.config)
    model = DiT(recipe.model)
    load_weights(model, found.source / found.weights_file)
    return DiTRun(
        model=model.to(device).eval(),
        **found.origin,
        recipe=recipe,
        diffusion=Diffusion(recipe.diffusion),
        class_names=tuple(found.state["task"]["class_names"]),
        sampling=recipe.sampling,
        mixed_precision=recipe.training.mixed_precision,
    )


def _sampled_as(found: Found, model: DiT) -> tuple[Diffusion, SamplingConfig | None]:
    """The diffusion of what lies in a folder or file, and how another project samples it by default, if it is one's."""
    path, folder = found.source, model_folder(found.source)
    sampling, guidance, process = None, 4.0 if model.config.null_label else 1.0, _PUBLISHED
    if path.is_file() and model.config.stem == "conv":  # only LLM2DiT's files have one
        sampling, process = SamplingConfig(num_inference_steps=1000, guidance_scale=1.0), _LLM2DIT
        repository, options = "LLM2DiT", SamplerOptions("ddpm", "strided", variance_type="fixed_large")
    elif path.is_file():
        sampling = SamplingConfig(num_inference_steps=250, guidance_scale=guidance, guidance_channels=3)
        repository = "facebookresearch/DiT's sample.py"
        options = SamplerOptions("ddpm", "respacing", variance_type=None if model.config.learn_sigma else "fixed_large")
    elif read_config(folder).get("_class_name") in DIFFUSERS_CLASSES:
        sampling = SamplingConfig(num_inference_steps=50, guidance_scale=guidance)
        repository, options = "diffusers' DiTPipeline", SamplerOptions("ddim", "leading")
    if any((path / name).is_file() for name in (SCHEDULER_CONFIG, f"scheduler/{SCHEDULER_CONFIG}")):
        return Diffusion.from_pretrained(path), sampling
    if found.state is not None:  # of fastdiff 0.1.0, whose config.yaml alone has the process
        raise FileNotFoundError(
            f"{path}: got a checkpoint without {SCHEDULER_CONFIG}; expected it in its run's folder, whose config.yaml "
            "names the diffusion process; put it back there"
        )
    told = f"{path}: no {SCHEDULER_CONFIG} beside the weights; assuming the process of the published DiT checkpoints "
    told += "(1000 levels, linear betas, predicted noise)"
    if sampling is None:
        options = SamplerOptions()
    else:
        channels = "all channels" if sampling.guidance_channels is None else "the first 3 channels"
        told += (
            f", sampled as by {repository} ({options.sampler}, {sampling.num_inference_steps} steps, timestep_spacing "
            f"{options.timestep_spacing!r}, guidance {sampling.guidance_scale:g} of {channels})"
        )
    warnings.warn(told, stacklevel=4)
    return Diffusion(process, options), sampling


def _names_of(path: Path, num_classes: int) -> tuple[str, ...]:
    """The classes' names by id2label in config.json or in a pipeline's model_index.json; else their numbers."""
    values: dict[str, Any] = {}
    if (path / "model_index.json").is_file():
        values = read_json(path / "model_index.json")
    elif (path / CONFIG_NAME).is_file():
        values = read_config(path)
    names = values.get("id2label")
    if not isinstance(names, dict):
        return tuple(str(label) for label in range(num_classes))
    if set(names) != {str(label) for label in range(num_classes)}:
        raise ValueError(f"{path}: id2label: got {len(names)} names; expected those of 0 to {num_classes - 1}")
    return tuple(str(names[key]) for key in sorted(names, key=int))
