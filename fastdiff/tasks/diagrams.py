"""Diagrams of a run: its model, one block of it inside, its diffusion process. They are files of SVG."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.masked import MaskedDiffusionConfig
from fastdiff.diffusion.sampler_config import SamplerConfig
from fastdiff.diffusion.sampling import make_steps
from fastdiff.files import write_atomically
from fastdiff.tasks.results import results_folder
from fastdiff.tasks.run import Run

if TYPE_CHECKING:
    from fastdiff.visualization.diagrams.process import Process

FOLDER = "diagrams"  # in a run's folder
_SCHEDULED = ("count", "ancestral")  # rules whose steps are known before decoding


def save_diagrams(path: str, output: str | None = None) -> list[Path]:
    """Draws what lies at a path; gives the files: model.svg, block.svg and process.svg.

    block.svg is left out for a model without blocks, process.svg for one without a diffusion process.

    Args:
        path: as of `fastdiff.load`.
        output: a folder; it is made where there is none. None is "diagrams" in the run's folder, or, for a model on the
            hub, in the current one.

    Raises what `fastdiff.load` raises; NotADirectoryError where `output` is a file, before work.
    """
    from fastdiff.tasks.kinds import load
    from fastdiff.training.run_folder import locate
    from fastdiff.visualization.diagrams import draw_blocks, draw_model, draw_process, probe

    folder = Path(output) if output else results_folder(path, _run_folder(locate(path)[0])) / FOLDER
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"--output {str(folder)!r}: got a file; expected the name of a folder")
    run = load(path, device="cpu")
    trace, sizes = probe(run.model)
    words = {"title": type(run.model).__name__, "subtitle": _origin(run)}
    process = process_of(run)
    drawn = {
        "model.svg": draw_model(run.model, trace, sizes, **words),
        "block.svg": draw_blocks(run.model, trace, sizes, **words),
        "process.svg": None if process is None else draw_process(process, **words),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / name: content for name, content in drawn.items() if content is not None}
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)


def _run_folder(folder: Any) -> Any:
    return folder if folder.config.is_file() else None


def _origin(run: Run) -> str:
    """Where a model came from, in a line."""
    name = str(run.source if run.folder is None else run.folder.path)
    step = f"step {run.step}" if run.step is not None else ""
    weights = {"ema": "averaged weights", "model": "last weights"}.get(run.weights or "", "")
    return " · ".join(filter(None, (name, step, weights)))


def process_of(run: Run) -> "Process | None":
    """The diffusion process of a run, with the steps that it samples by; None for a run without one.

    A Gaussian one is the run's or its model's `diffusion`. A masked one is its recipe's `diffusion`, or, where there is
    no recipe, that of the model's mask schedule.
    """
    diffusion = getattr(run, "diffusion", getattr(run.model, "diffusion", None))
    if isinstance(diffusion, Diffusion):
        return _noise(diffusion, getattr(run, "sampling", None))
    config = getattr(run.recipe, "diffusion", None)
    schedule = getattr(getattr(run.model, "config", None), "mask_schedule", None)
    if not isinstance(config, MaskedDiffusionConfig):
        if schedule is None:
            return None
        config = MaskedDiffusionConfig(schedule=schedule, exponent=run.model.config.mask_schedule_exponent)
    return _masks(config, getattr(run, "decoding", {}))


def _noise(diffusion: Diffusion, sampling: SamplerConfig | None) -> "Process":
    from fastdiff.visualization.diagrams import noise_process

    sampling = SamplerConfig() if sampling is None else sampling
    steps = make_steps(diffusion, sampling.num_inference_steps, sampling.options())
    sampler = steps.options.sampler_of(diffusion.config)
    facts = [f"sampler {sampler}, {sampling.num_inference_steps} steps"]
    if sampling.guidance_scale != 1:
        low, high = sampling.guidance_interval
        where = "" if (low, high) == (0, 1) else f" where the share of noise is {low:g} to {high:g}"
        facts.append(f"classifier-free guidance {sampling.guidance_scale:g}{where}")
    return noise_process(diffusion, [*diffusion.noise_share(steps.times).tolist(), 0.0], facts)


def _masks(config: MaskedDiffusionConfig, decoding: dict[str, Any]) -> "Process":
    from fastdiff.generation.config import MaskedDiffusionGenerationConfig
    from fastdiff.visualization.diagrams import mask_process

    options = MaskedDiffusionGenerationConfig(**decoding)
    blocks = f" in {options.num_blocks} blocks of {options.block_length}" if options.num_blocks > 1 else ""
    tokens = "as many tokens as are predicted, up to" if options.length == "auto" else "new tokens:"
    facts = [f"{tokens} {options.max_new_tokens}{blocks}"]
    rule = options.unmasking_rule
    if options.rule_number is not None:
        facts.append(f"rule {rule} {options.rule_number:g}: as many tokens a step as it admits")
    else:
        facts.append(f"rule {rule}, schedule {options.unmasking_schedule}")
    facts += [f"order: {options.unmasking_order}"] if rule != "ancestral" else []
    facts.append(
        f"temperature {options.temperature:g}" if options.temperature else "temperature 0: the likeliest token"
    )
    if options.guidance_scale != 1:
        facts.append(f"classifier-free guidance {options.guidance_scale:g}")
    return mask_process(config, _masks_left(options) if rule in _SCHEDULED else [], facts)


def _masks_left(options: Any) -> list[float]:
    """The share of new tokens that is masked before each step that commits any, and after the last."""
    from fastdiff.generation.schedule import mask_rates, transfer_counts

    left, total = [1.0], options.max_new_tokens
    block = min(options.block_length or total, total)
    eps = options.eps
    if eps is None:
        eps = 1e-3 if options.unmasking_schedule == "dream" else 0.0
    for start in range(0, total, max(block, 1)):
        masks = min(block, total - start)
        steps = options.steps_per_block or masks
        if options.unmasking_rule == "ancestral":  # on average
            name = options.unmasking_schedule
            rates = mask_rates(steps, "linear" if name in ("even", "dream") else name, eps)[1:].tolist()
            left += [(total - start - masks + rate * masks) / total for rate in rates]
        else:
            for count in transfer_counts(masks, steps, options.unmasking_schedule, eps):
                left.append(left[-1] - count / total)
    return [max(share, 0.0) for share in left]
