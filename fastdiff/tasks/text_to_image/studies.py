"""`fastdiff.sample RUN --config FILE`: a picture for each entry of a file."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiff.data import ImageData
from fastdiff.device import autocast_dtype
from fastdiff.diffusion.prompt_attention import nearest_steps, prompt_attention
from fastdiff.diffusion.steps import fresh_noise
from fastdiff.errors import one_line
from fastdiff.nn.attention_maps import cross_attentions
from fastdiff.shipped import find_entries
from fastdiff.tasks.results import results_folder
from fastdiff.tasks.run import find
from fastdiff.tasks.text_to_image.drawing import Conditions, Frames
from fastdiff.tasks.text_to_image.entries import Entry, read_entries
from fastdiff.tasks.text_to_image.evaluate import load_data_of, spread, texts_of
from fastdiff.tasks.text_to_image.recipe import TextToImageSamplingConfig
from fastdiff.tasks.text_to_image.run import TextToImageRun, load_run
from fastdiff.training.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from fastdiff.tasks.text_to_image.samples import SampleOptions


@dataclass(frozen=True)
class Study:
    """An entry made ready: what is drawn (beside what), how, and where it goes."""

    entry: Entry
    conditions: Conditions
    beside: Conditions | None
    sampling: TextToImageSamplingConfig
    folder: Path

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.entry.name}.png"

    def title(self, run: TextToImageRun) -> str:
        """What stands above the picture."""
        told = self.sampling.described(run.step, guided=self.entry.scales is None)
        return f"{self.entry.name.replace('_', ' ')}: {told}"


def draw_studies(path: str, options: "SampleOptions") -> None:
    """Draws the picture of each entry, and prints their paths. All entries are looked at before the first is drawn."""
    file = find_entries(options.config)
    entries = read_entries(file)
    run = load_run(path, weights=options.weights, device=options.device)
    run.check_pictures()
    sampling = options.applied_to(run.sampling)
    folder = Path(options.output) if options.output else results_folder(path, run.folder) / file.stem
    load_data = functools.cache(functools.partial(load_data_of, run))
    studies = []
    for number, entry in enumerate(entries, 1):
        try:
            studies.append(_ready(run, entry, sampling, folder, load_data))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: entry {number} ({entry.name}): {one_line(error)}") from error
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {str(folder)!r} is a file; expected the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for study in studies:
        for written in _draw(run, study):
            print(written)


def _ready(
    run: TextToImageRun,
    entry: Entry,
    sampling: TextToImageSamplingConfig,
    folder: Path,
    load_data: Callable[[], ImageData],
) -> Study:
    sampling = sampling.replaced(entry.sampling())
    conditions, beside = _conditions(run, entry, load_data)
    for scale in entry.scales or [sampling.guidance_scale]:
        run.check_sampling(sampling.replaced({"guidance_scale": scale}), len(conditions) * entry.images_per_prompt)
    if entry.progression and run.folder is None:
        raise ValueError("progression: got true for a model without checkpoints; expected a run of fastdiff.train")
    for checkpoint in list_checkpoints(run.folder.checkpoints) if entry.progression else ():
        find(checkpoint, run.kind, run.weights or "ema")  # raises where one is damaged
    if entry.attention_timesteps is not None:
        cross_attentions(run.model)  # raises where there are none
        nearest_steps([0], entry.attention_timesteps, run.diffusion)  # raises for one outside the schedule
    return Study(entry, conditions, beside, sampling, folder)


def _conditions(
    run: TextToImageRun, entry: Entry, load_data: Callable[[], ImageData]
) -> tuple[Conditions, Conditions | None]:
    """What is drawn, and what at the right of it where there are two sides."""
    if entry.combinations is not None:
        sides = [run.conditions(texts) for texts in _texts_of_combinations(load_data(), entry)]
    else:
        given = {"classes": entry.classes, "prompts": entry.prompts}
        sides = [run.conditions(**{name: value}) for name, value in given.items() if value is not None]
    return sides[0], sides[1] if entry.sides else None


def _texts_of_combinations(data: ImageData, entry: Entry) -> list[list[str]]:
    """Of each side a text of each of some combinations of the run's data, spread evenly over them; as many of each."""
    names = [name for name in ("class", "color") if name in getattr(data, "attributes", {})]
    sides = ("seen", "unseen") if entry.combinations == "both" else (entry.combinations,)
    known = [data.combinations(names, seen=side == "seen") if names else [] for side in sides]
    count = min(entry.count, *map(len, known))
    texts = [[text for each in spread(side, count) for text in texts_of(data, each)[:1]] for side in known]
    if not all(texts):
        raise ValueError(f"combinations: got {entry.combinations!r}; the run's data {data.name} has none of these")
    shortest = min(map(len, texts))
    return [side[:shortest] for side in texts]


def _draw(run: TextToImageRun, study: Study) -> list[Path]:
    entry = study.entry
    if entry.sides:
        return [_side_by_side(run, study)]
    if entry.scales is not None:
        return [_sweep(run, study)]
    for name, draw in _TABLES.items():
        if getattr(entry, name):
            return [draw(run, study)]
    return _grid(run, study)


def _grid(run: TextToImageRun, study: Study) -> list[Path]:
    from fastdiff.visualization import save_captioned_gif, save_captioned_grid

    entry, frames = study.entry, Frames()
    conditions = study.conditions.repeated(entry.images_per_prompt)
    drawn = run.draw(conditions, study.sampling, progress=True, callback=frames if entry.animate else None)
    title = study.title(run)
    written = [save_captioned_grid(run.decoded(drawn), study.conditions.texts, study.picture, title=title)]
    if entry.animate:
        steps = torch.stack([run.decoded(step) for step in frames.steps()])
        gif = study.picture.with_suffix(".gif")
        written.append(save_captioned_gif(steps, study.conditions.texts, gif, title=title))
    if entry.attention_timesteps is not None:
        written += _attention(run, study)
    return written


def _attention(run: TextToImageRun, study: Study) -> list[Path]:
    """Heatmaps of what each query, or each image token, attends to in a prompt, and the arrays."""
    from fastdiff.visualization.attention import save_prompt_attention, save_token_maps

    device, sampling = next(run.model.parameters()).device, study.sampling
    attention = prompt_attention(
        run.model, run.diffusion, **study.conditions.states, attention_timesteps=study.entry.attention_timesteps,
        num_inference_steps=sampling.num_inference_steps, guidance_scale=sampling.guidance_scale,
        guidance_interval=sampling.guidance_interval, seed=sampling.seed,
        autocast_dtype=autocast_dtype(run.mixed_precision, device.type, run.model),
        **{name: value for name, value in sampling.options().items() if value is not None},
    )  # fmt: skip
    texts, folder = study.conditions.texts, study.folder / f"{study.entry.name}_maps"
    tokens = [run.encoder.tokens(text) for text in texts]
    written = save_prompt_attention(attention, texts, tokens, folder, average=study.entry.attention_average)
    if attention.depends_on_time:
        images = run.decoded(attention.samples.cpu())
        for timestep in attention.maps:
            path = folder / f"tokens_t{timestep:g}.png"
            written.append(save_token_maps(attention, timestep, texts, tokens, path, images=images))
    share, even = attention.sink_share(), attention.even_share()
    print(f"{study.entry.name}: the first token has {share:.1%} of the attention; evenly it would have {even:.1%}")
    return written


def _side_by_side(run: TextToImageRun, study: Study) -> Path:
    """A row of two cells for each of both sides' conditions; images in the same place have the same noise."""
    from fastdiff.visualization import save_captioned_grid

    sides, each = (study.conditions, study.beside), study.entry.images_per_prompt
    drawn = [run.decoded(run.draw(side.repeated(each), study.sampling, progress=True)) for side in sides]
    cells = torch.stack([images.unflatten(0, (-1, each)) for images in drawn], dim=1)  # [rows, 2, each, C, H, W]
    captions = [text for row in zip(*(side.texts for side in sides), strict=True) for text in row]
    if study.entry.combinations is not None:
        headings = ("seen in training", "never seen")
    else:
        headings = ("by label" if study.conditions.labels is not None else "by class name", "by prompt")
    return save_captioned_grid(cells.flatten(0, 2), captions, study.picture, headings=headings, title=study.title(run))


def _table(run: TextToImageRun, study: Study, columns: list[Tensor], names: list[str]) -> Path:
    """A row a text, a column each of `columns` ([N, C, H, W], as `draw` gives them)."""
    from fastdiff.visualization import save_picture_table

    each = study.entry.images_per_prompt
    images = torch.stack([run.decoded(column) for column in columns], dim=1)
    rows = [text if index % each == 0 else "" for index, text in enumerate(study.conditions.repeated(each).texts)]
    return save_picture_table(images, rows, names, study.picture, title=study.title(run))


def _sweep(run: TextToImageRun, study: Study) -> Path:
    conditions = study.conditions.repeated(study.entry.images_per_prompt)
    columns = [run.draw(conditions, dataclasses.replace(study.sampling, guidance_scale=scale), progress=True)
               for scale in study.entry.scales]  # fmt: skip
    return _table(run, study, columns, [f"guidance {scale:g}" for scale in study.entry.scales])


def _denoising(run: TextToImageRun, study: Study) -> Path:
    frames = Frames()
    run.draw(study.conditions.repeated(study.entry.images_per_prompt), study.sampling, progress=True, callback=frames)
    steps = frames.steps()
    count = min(study.entry.denoising_steps, len(steps))
    chosen = [round((index + 1) * len(steps) / count) - 1 for index in range(count)]
    return _table(run, study, [steps[index] for index in chosen], [f"step {index + 1}" for index in chosen])


@torch.no_grad()
def _noise_levels(run: TextToImageRun, study: Study) -> Path:
    """Of each text two rows: its image noised so far, and the image that the model predicts from that."""
    from fastdiff.visualization import save_picture_table

    conditions, sampling = study.conditions.repeated(study.entry.images_per_prompt), study.sampling
    clean = run.draw(conditions, sampling, progress=True)
    generators = [torch.Generator().manual_seed(sampling.seed + index) for index in range(len(clean))]
    noise = fresh_noise(generators, clean.shape[1:], torch.device("cpu"))
    rows = [[], []]
    for share in study.entry.noise_levels:
        level = run.diffusion.time_at(share)
        t = level.expand(len(clean))
        noised = run.diffusion.add_noise(clean, noise, t)
        rows[0].append(run.decoded(noised))
        rows[1].append(run.decoded(run.predicted(conditions, noised, t)))
    pairs = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).flatten(0, 1)
    names = [name for text in conditions.texts for name in (text, "→ predicted from it")]
    heads = [f"t = {share:g}" for share in study.entry.noise_levels]
    return save_picture_table(pairs, names, heads, study.picture, title=study.title(run))


def _progression(run: TextToImageRun, study: Study) -> Path:
    conditions, columns, names = study.conditions.repeated(study.entry.images_per_prompt), [], []
    for checkpoint in list_checkpoints(run.folder.checkpoints):
        weights = {} if run.weights is None else {"weights": run.weights}
        at = load_run(checkpoint, device=next(run.model.parameters()).device, **weights)
        columns.append(at.draw(conditions, study.sampling, progress=True))
        names.append(f"step {at.step}")
    return _table(run, study, columns, names)


_TABLES: dict[str, Callable[[TextToImageRun, Study], Path]] = {
    "denoising_steps": _denoising,
    "noise_levels": _noise_levels,
    "progression": _progression,
}
