"""`fastdiff.sample` on a text-to-image model."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.files import output_path
from fastdiff.tasks.labels import parse_labels
from fastdiff.tasks.options import SamplingOptions, at_least
from fastdiff.tasks.prompts import read_prompt_file
from fastdiff.tasks.results import AsTheyCome, results_folder
from fastdiff.tasks.text_to_image.drawing import Conditions, Frames
from fastdiff.tasks.text_to_image.run import TextToImageRun, load_run


@dataclass
class SampleOptions(SamplingOptions):
    """Draws images of texts in a grid (PNG), each text under its images; finished ones are in it while others are
    drawn. With --config it draws a picture for each entry of a file.

    Attributes:
        prompt: a text to draw; may be repeated; default: the run's own prompts
        prompt_file: texts to draw, one on each line; or .jsonl, one object on each line with the field "prompt"
        classes: instead of texts, labels or class names, with commas; a diffusion transformer that knows them draws
            them without any text
        images_per_prompt: number of images of each text (default: 4, or 1 of more than 8 texts)
        animate: write a GIF of the denoising beside the PNG
        config: a YAML file with entries, each a picture: classes or prompts, a sweep of guidance, attention maps, steps
            of denoising, noise levels, a progression over checkpoints; or the name of one that comes with fastdiff,
            llm2dit
        output: path of the PNG, with --config of a folder; default: samples-seed-N.png in the folder of the run or
            saved model, or a folder there with the name of the file of entries
    """

    prompt: list[str] | None = field(default=None, metadata={"action": "append"})
    prompt_file: str | None = None
    classes: str | None = None
    images_per_prompt: int | None = None
    animate: bool = False
    config: str | None = None
    output: str | None = None

    def __post_init__(self):
        at_least("images_per_prompt", self.images_per_prompt, 1)
        names = ("prompt", "prompt_file", "classes", "images_per_prompt", "animate")
        given = [name for name in names if getattr(self, name)]
        if self.config is not None and given:
            raise ValueError(
                f"--config: got it beside --{given[0].replace('_', '-')}; expected one of them: the file's entries say "
                "what is drawn"
            )
        if self.classes is not None and (self.prompt or self.prompt_file):
            raise ValueError("--classes: got it beside --prompt; expected one of them")


def sample_prompted(path: str, options: SampleOptions) -> None:
    """Draws samples, writes the grid and prints its path."""
    if options.config is not None:
        from fastdiff.tasks.text_to_image.studies import draw_studies

        return draw_studies(path, options)
    from fastdiff.visualization import save_captioned_gif, save_captioned_grid

    prompts = _prompts(options)
    run = load_run(path, weights=options.weights, device=options.device)
    run.check_pictures()
    sampling = options.applied_to(run.sampling)
    run.check_sampling(sampling)
    output = output_path(options.output, results_folder(path, run.folder) / f"samples-seed-{sampling.seed}.png")
    gif = output_path(None, output.with_suffix(".gif")) if options.animate else None
    conditions = _conditions(run, prompts, options.classes)
    each = options.images_per_prompt or (4 if len(conditions) <= 8 else 1)
    title, total = sampling.described(run.step), len(conditions) * each

    def write(drawn: Tensor) -> Path:
        images = run.decoded(drawn)
        rest = images.new_ones(total - len(images), *images.shape[1:])  # white
        so_far = "" if not len(rest) else f", {len(images)} of {total} samples"
        return save_captioned_grid(torch.cat([images, rest]), conditions.texts, output, title=title + so_far)

    frames = Frames()
    drawn = run.draw(
        conditions.repeated(each), sampling, progress=True, keep=AsTheyCome(write),
        callback=frames if options.animate else None,
    )  # fmt: skip
    print(write(drawn))
    if options.animate:
        steps = torch.stack([run.decoded(step) for step in frames.steps()])
        print(save_captioned_gif(steps, conditions.texts, gif, title=title))


def _prompts(options: SampleOptions) -> list[str]:
    if options.prompt_file is None:
        return options.prompt or []
    of_file = read_prompt_file(options.prompt_file)
    if not of_file:
        raise ValueError(f"--prompt-file: got {options.prompt_file!r}, which has no prompt; expected one on each line")
    return [*(options.prompt or []), *of_file]


def _conditions(run: TextToImageRun, prompts: list[str], classes: str | None) -> Conditions:
    if classes is not None:
        return run.conditions(classes=parse_labels(classes, run.class_names))
    if not prompts and not run.sampling.prompts:
        raise ValueError("--prompt, --classes: got neither; expected one of them")
    return run.conditions(prompts or run.sampling.prompts)
