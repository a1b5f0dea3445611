"""`fastdiff.sample` on a QGFD model."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.device import autocast_dtype
from fastdiff.files import output_path
from fastdiff.recipes import load_recipe
from fastdiff.tasks.labels import parse_labels
from fastdiff.tasks.options import DataOptions, SamplingOptions, at_least
from fastdiff.tasks.qgfd.recipe import QGFDRecipe, QGFDSamplingConfig
from fastdiff.tasks.qgfd.run import QGFDRun, load_run
from fastdiff.tasks.qgfd.samples import (
    SUFFIXES,
    Samples,
    Shown,
    default_labels,
    draw_samples,
    encode_prompts,
    label_count,
    sampling_title,
    save_samples,
)
from fastdiff.tasks.results import AsTheyCome, results_folder
from fastdiff.tasks.run import finding_data
from fastdiff.training.run_folder import locate


@dataclass
class SampleOptions(DataOptions, SamplingOptions):
    """Draws samples as the modality wants: a picture (PNG), and beside it, under the same name, TXT, WAV, GIF or CSV.
    Finished samples are in the files while others are drawn.

    Attributes:
        modality: the one to draw, of a run with several; default: each of them
        labels: labels or class names, with commas; default: every class
        images_per_label: number of samples for each label (default: 8 images, one sound or video)
        num_samples: number of samples of a modality without labels: texts, rows of a table
        length: length of each sample, in tokens, audio samples or frames
        prompt: prompt for text models that take one; default: held-out prompts
        output: path of the PNG; other files get the same name with their own suffix; default: samples-seed-N.png in the
            folder of the run or saved model (of a model on the hub: in the current folder)
    """

    modality: str | None = None
    labels: str | None = None
    images_per_label: int | None = None
    num_samples: int | None = None
    length: int | None = None
    prompt: str | None = None
    output: str | None = None

    @staticmethod
    def unfit(path: str) -> set[str]:
        """Options that mean nothing for a run: another modality's, or a choice where there is only one."""
        config = locate(path)[0].config
        if not config.is_file():
            return set()
        recipe = load_recipe(QGFDRecipe, config)
        there = set(recipe.modalities)
        labelled = there & {"image", "audio", "video"} if recipe.objective.condition_on_labels else set()
        fits = {
            "modality": len(there) > 1,
            "labels": bool(labelled),
            "images_per_label": bool(labelled),
            "num_samples": bool(there - labelled),
            "length": bool(there & {"text", "audio", "video"}),
            "prompt": "text" in there and recipe.text_data.sample != "documents",
        }
        return {name for name, fit in fits.items() if not fit}

    def __post_init__(self):
        for name in ("images_per_label", "num_samples", "length"):
            at_least(name, getattr(self, name), 1)


def sample_qgfd(path: str, options: SampleOptions) -> None:
    """Draws samples of each modality asked for, writes their files and prints the paths."""
    run = load_run(path, weights=options.weights, device=options.device)
    sampling = options.applied_to(run.sampling)
    modalities = run.model.config.modalities if options.modality is None else (options.modality,)
    labelled = [name for name in modalities if label_count(run.model, name)]
    if options.labels is not None and labelled:
        modalities = labelled
    for option, fitting in (("images_per_label", labelled), ("num_samples", set(modalities) - set(labelled))):
        if getattr(options, option) is not None and not fitting:
            other = "--num-samples" if option == "images_per_label" else "--images-per-label"
            raise ValueError(
                f"--{option.replace('_', '-')}: got it for {', '.join(modalities)}, which it does not fit; expected "
                f"{other}"
            )
    if options.length is not None and len(modalities) > 1:
        raise ValueError(f"--length: got {options.length}, whose unit differs by modality; say which with --modality")
    output = output_path(
        options.output, results_folder(path, run.folder) / f"samples-seed-{sampling.seed}.png", SUFFIXES
    )
    wanted = [(name, *_wanted(run, name, options)) for name in modalities]
    for name, shown, count, labels in wanted:
        stem: Path = output.with_suffix("") if output.suffix in SUFFIXES else output
        alone = len(modalities) == 1
        stem = stem if alone else stem.with_name(f"{stem.name}_{name}")
        write = functools.partial(_write, run, sampling, name, shown, stem, count, alone)
        samples = draw_samples(
            run.model, name, count, sampling, labels=labels, prompts=shown.prompts, length=options.length,
            dtype=autocast_dtype(run.mixed_precision, next(run.model.parameters()).device.type, run.model),
            progress=True, keep=AsTheyCome(write),
        )  # fmt: skip
        for path in write(samples):
            print(path)


def _write(
    run: QGFDRun, sampling: QGFDSamplingConfig, name: str, shown: Shown, stem: Path, count: int, alone: bool,
    samples: Samples,
) -> list[Path]:  # fmt: skip
    """Writes the samples of a modality drawn so far, of `count` in all: the paths."""
    title = sampling_title(samples, sampling, run.step, None if alone else name)
    if len(samples) < count:
        title += f", {len(samples)} of {count} samples"
    return save_samples(samples, run.model, name, shown, stem, title)


def _wanted(run: QGFDRun, modality: str, options: SampleOptions) -> tuple[Shown, int, torch.Tensor | None]:
    """What a modality's samples are shown with, how many there are, their labels. Raises where options do not fit."""
    config = run.model.adapter(modality).config  # raises for a modality that the run does not have
    names = tuple(run.facts[modality]["class_names"])
    conditional = modality == "text" and config.conditional
    if options.prompt is not None and not conditional:
        raise ValueError(f"--prompt: the run's {modality} is not conditioned on a text; leave it out")
    if options.labels is not None and not label_count(run.model, modality):
        raise ValueError(f"--labels: the run's {modality} is not conditioned on classes; leave it out")
    if modality == "tabular" or (conditional and options.prompt is None):
        # real rows to draw beside the samples', held-out prompts
        with finding_data():
            source = run.source_of(modality, options.accept_changed_data, options.data_path)
        shown = Shown.of_source(source)
    else:
        prompts = encode_prompts(run.tokenizer, [options.prompt]) if conditional else None
        shown = Shown(names, run.tokenizer, conditional, run.schema, prompts=prompts)
    if not label_count(run.model, modality):
        return shown, *default_labels(run.model, modality, shown, options.num_samples)
    _, labels = default_labels(run.model, modality, shown, options.images_per_label)
    if options.labels is not None:
        each = len(labels) // len(names)
        labels = torch.tensor(parse_labels(options.labels, names)).repeat_interleave(each)
    return shown, len(labels), labels
