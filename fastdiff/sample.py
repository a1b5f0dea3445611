"""Draws samples of a run: `python -m fastdiff.sample runs/x --labels 0,3,7 --guidance-scale 2`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.cli import command, quiet_libraries, run_parser, sampling_options
from fastdiff.files import output_path

_QGFD = ("modality", "length", "prompt")  # options of QGFD runs alone


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.training.runs import run_kind

    parser = run_parser(
        "sample",
        "Draws samples of a run. A diffusion transformer's come as a labelled grid (PNG); those of a QGFD model as its "
        "modality wants: a picture (PNG) and beside it, under the same name, TXT, WAV, GIF or CSV.",
    )
    add = parser.add_argument
    add("--labels", type=str | None, help="labels or class names, with commas; default: every class")
    add("--images-per-label", type=int | None, help="samples of each label (default: 8 images, one sound or video)")
    add("--num-samples", type=int | None, help="samples of a modality without labels: texts, rows of a table")
    add("--modality", type=str | None, help="of a QGFD run with several; default: each of them")
    add("--length", type=int | None, help="QGFD: of each sample, in tokens, audio samples or frames")
    add("--prompt", type=str | None, help="QGFD: what text is conditioned on, where it is; default: held-out prompts")
    add(
        "--output", type=str | None,
        help="of the PNG; files beside it have another suffix; default: samples-seed-N.png in the run's folder",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    for name in ("images_per_label", "num_samples", "length"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least 1")
    quiet_libraries()
    if run_kind(arguments.run) == "qgfd":
        return _sample_qgfd(arguments)
    for name in (*_QGFD, "num_samples"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for runs of QGFD models; {arguments.run} is none")
    _sample_images(arguments)


def _sample_images(arguments: Any) -> None:
    from fastdiff.training.runs import load_run
    from fastdiff.visualization import save_sample_grid

    run = load_run(arguments.run, weights=arguments.weights, device=arguments.device)
    sampling = sampling_options(arguments, run.recipe.sampling)
    labels = torch.tensor(run.labels(arguments.labels)).repeat_interleave(arguments.images_per_label or 8)
    output = output_path(arguments.output, run.folder.path / f"samples-seed-{sampling.seed}.png")
    images = run.draw(labels, sampling, progress=True)
    title = f"step {run.step}, guidance {sampling.guidance_scale:g}, {sampling.num_inference_steps} steps"
    print(save_sample_grid(images, labels, run.class_names, output, title=title))


def _sample_qgfd(arguments: Any) -> None:
    from fastdiff.device import autocast_dtype
    from fastdiff.training.qgfd_runs import load_qgfd_run
    from fastdiff.training.qgfd_samples import SUFFIXES, draw_samples, label_count, sampling_title, save_samples

    run = load_qgfd_run(arguments.run, weights=arguments.weights, device=arguments.device)
    sampling = sampling_options(arguments, run.recipe.sampling)
    modalities = run.recipe.modalities if arguments.modality is None else (arguments.modality,)
    labelled = [name for name in modalities if label_count(run.model, name)]
    if arguments.labels is not None and labelled:
        modalities = labelled
    for option, fitting in (("images_per_label", labelled), ("num_samples", set(modalities) - set(labelled))):
        if getattr(arguments, option) is not None and not fitting:
            other = "--num-samples" if option == "images_per_label" else "--images-per-label"
            raise ValueError(f"--{option.replace('_', '-')} does not fit {', '.join(modalities)}; expected {other}")
    if arguments.length is not None and len(modalities) > 1:
        raise ValueError(f"--length is {arguments.length}, whose unit differs by modality; say which with --modality")
    output = output_path(arguments.output, run.folder.path / f"samples-seed-{sampling.seed}.png")
    wanted = [(name, *_wanted(run, name, arguments)) for name in modalities]
    for name, shown, count, labels in wanted:
        samples = draw_samples(
            run.model, name, count, sampling, labels=labels, prompts=shown.prompts, length=arguments.length,
            dtype=autocast_dtype(run.recipe.training.mixed_precision, next(run.model.parameters()).device.type),
            progress=True,
        )  # fmt: skip
        stem: Path = output.with_suffix("") if output.suffix in SUFFIXES else output
        alone = len(modalities) == 1
        stem = stem if alone else stem.with_name(f"{stem.name}_{name}")
        title = sampling_title(samples, sampling, run.step, None if alone else name)
        for path in save_samples(samples, run.model, name, shown, stem, title):
            print(path)


def _wanted(run: Any, modality: str, arguments: Any) -> tuple[Any, int, torch.Tensor | None]:
    """What a modality's samples are shown with, how many there are, their labels. Raises where options do not fit."""
    from fastdiff.training.qgfd_samples import Shown, default_labels, encode_prompt, label_count
    from fastdiff.training.runs import parse_labels

    config = run.model.adapter(modality).config  # raises for a modality that the run does not have
    names = tuple(run.facts[modality]["class_names"])
    conditional = modality == "text" and config.conditional
    if arguments.prompt is not None and not conditional:
        raise ValueError(f"--prompt is for text that is conditioned on a text; the run's {modality} is not")
    if arguments.labels is not None and not label_count(run.model, modality):
        raise ValueError(f"--labels is for classes; the run's {modality} is not conditioned on any")
    if modality == "tabular" or (conditional and arguments.prompt is None):
        shown = Shown.of_source(run.source(modality))  # real rows to draw beside the samples', held-out prompts
    else:
        prompts = encode_prompt(run.tokenizer, arguments.prompt) if conditional else None
        shown = Shown(names, run.tokenizer, conditional, run.schema, prompts=prompts)
    if not label_count(run.model, modality):
        return shown, *default_labels(run.model, modality, shown, arguments.num_samples)
    _, labels = default_labels(run.model, modality, shown, arguments.images_per_label)
    if arguments.labels is not None:
        each = len(labels) // len(names)
        labels = torch.tensor(parse_labels(arguments.labels, names)).repeat_interleave(each)
    return shown, len(labels), labels


if __name__ == "__main__":
    main()
