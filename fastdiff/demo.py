"""Five minutes of training, from nothing to labelled pictures: `python -m fastdiff.demo` (or `make demo`).

Measures what the machine does in a second, trains recipes/dit_mnist.yaml for as many steps as fit into the time, and
scores what comes out. Everything lies in runs/demo/ afterwards.
"""

import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.cli import command, quiet_libraries
from fastdiff.recipes import ArgumentParser, parse_recipe
from fastdiff.version import __version__

_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "dit_mnist.yaml"
_BACKENDS = ("auto", "reference")  # fastdiff's kernels, and the same model on plain PyTorch operators
_SAMPLES = 500
_FEWEST_STEPS = 20


def measure_rates(recipe: Any, data: Any, *, rounds: int, steps: int) -> dict[str, float]:
    """Images a second of whole training steps, by backend: medians over interleaved rounds.

    The backends take turns, so that both meet the same state of the machine; the first round warms up.
    """
    from fastdiff.backends import use_backend
    from fastdiff.tasks.dit.task import DiTTask
    from fastdiff.training import Trainer

    seconds: dict[str, list[float]] = {name: [] for name in _BACKENDS}
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(recipe.training, output_dir=folder, overwrite=True, resume=False)
        trainer = Trainer(DiTTask(dataclasses.replace(recipe, training=training), data), training)
        for index in range(rounds + 1):
            for name in _BACKENDS:
                with use_backend(name):
                    start = time.perf_counter()
                    for step in range(index * steps, (index + 1) * steps):
                        trainer.train_step(step)
                    if index > 0:
                        seconds[name].append(time.perf_counter() - start)
    return {name: steps * recipe.training.batch_size / statistics.median(times) for name, times in seconds.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from fastdiff.device import computes_bf16

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a kernel that does not tell
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": computes_bf16("cpu"),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fastdiff": __version__,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    from fastdiff.tasks.dit.recipe import DiTRecipe
    from fastdiff.tasks.dit.task import DiTTask

    parser = ArgumentParser(prog="fastdiff demo", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=280.0, help="of training, at most")
    parser.add_argument("--output-dir", type=str, default="runs/demo", help="the run's folder; a run in it is replaced")
    parser.add_argument("--recipe", type=str, default=str(_RECIPE), help="what to train")
    arguments = parser.parse_args(argv)
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds is {arguments.seconds}; expected a positive number")
    if arguments.recipe == str(_RECIPE) and not _RECIPE.is_file():  # recipes/ is no part of the installed package
        raise FileNotFoundError(
            "the demo's recipe recipes/dit_mnist.yaml is not beside the installed package; run the demo from a "
            "checkout of fastdiff, or pass --recipe"
        )
    quiet_libraries()
    start, about = time.perf_counter(), machine()
    recipe = parse_recipe(
        DiTRecipe,
        [
            arguments.recipe,
            "--training.output_dir",
            arguments.output_dir,
            "--training.overwrite",
            "true",
            "--training.device",
            "cpu",
        ],
    )
    data = DiTTask(recipe).data
    print(f"{len(data.train)} real images of {data.name}; measuring training steps …", flush=True)
    rates = measure_rates(recipe, data, rounds=7, steps=6)
    planned = max(_FEWEST_STEPS, int(arguments.seconds * rates["auto"] / recipe.training.batch_size))
    training = dataclasses.replace(
        recipe.training,
        max_steps=planned,
        checkpoint_every=10 * planned,
        keep_last=1,
        warmup_steps=min(recipe.training.warmup_steps, planned // 5),
    )
    print(
        f"{rates['auto']:.0f} images/s with fastdiff's kernels, {rates['reference']:.0f} with reference kernels; "
        f"training about {planned} steps in {arguments.seconds / 60:.1f} minutes",
        flush=True,
    )
    training_start = time.perf_counter()
    trainer, outcome = _train(recipe, training, data, arguments.seconds)
    training_seconds = time.perf_counter() - training_start
    if not outcome.finished:
        print(f"stopped after step {outcome.steps}; checkpoint: {outcome.checkpoint}")
        return
    speed = {
        "fastdiff_images_per_second": rates["auto"],
        "reference_images_per_second": rates["reference"],
        "speedup": rates["auto"] / rates["reference"],
        "while_training_images_per_second": outcome.samples_per_second,
        "mixed_precision": trainer.accelerator.mixed_precision,
    }
    _finish(
        Path(arguments.output_dir),
        data,
        speed,
        {**about, "training_steps": outcome.steps, "training_seconds": training_seconds},
        start,
    )


def _train(recipe: Any, training: Any, data: Any, seconds: float) -> tuple[Any, Any]:
    """Trains for about `seconds`: the trainer and its outcome.

    A short measurement does not tell what a long run does, so the number of steps is set anew at a quarter of the way,
    by the rate of that quarter. Nothing done until then depends on it: the learning rate falls over the second half.
    """
    from fastdiff.tasks.dit.task import DiTTask
    from fastdiff.training.trainer import Trainer

    def trainer_for(settings: Any) -> Trainer:
        return Trainer(DiTTask(dataclasses.replace(recipe, training=settings), data), settings)

    start, quarter = time.perf_counter(), training.max_steps // 4
    trainer = trainer_for(training)
    outcome = trainer.train(stop_at=quarter)
    if outcome.steps < quarter:  # Ctrl-C
        return trainer, outcome
    left = 0.97 * (seconds - (time.perf_counter() - start))  # the rest is for checkpoints and pictures
    steps = quarter + max(quarter, int(left * outcome.samples_per_second / training.batch_size))
    steps = max(_FEWEST_STEPS, steps)
    training = dataclasses.replace(training, max_steps=steps, resume=True, overwrite=False)
    trainer = trainer_for(training)
    return trainer, trainer.train()


def _finish(folder: Path, data: Any, speed: dict[str, Any], about: dict[str, Any], start: float) -> None:
    """Scores samples, writes report.json and prints the table."""
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier
    from fastdiff.tasks.dit.run import load_run

    run = load_run(folder, device="cpu")
    classifier = load_or_train_classifier(data)
    labels = torch.arange(_SAMPLES) % len(data.class_names)
    # seeds beyond those of samples.png
    sampling = dataclasses.replace(run.recipe.sampling, seed=run.recipe.sampling.seed + 10_000)
    report = evaluate_samples(run.draw(labels, sampling, progress=True), labels, data, classifier)
    scores = report.to_dict()
    ratio = report.samples.frechet_distance / report.held_out.frechet_distance
    total = time.perf_counter() - start
    (folder / "report.json").write_text(
        json.dumps(
            {
                "class_accuracy": report.samples.class_accuracy,
                "frechet_ratio_to_held_out": ratio,
                "guidance_scale": sampling.guidance_scale,
                "num_inference_steps": sampling.num_inference_steps,
                **scores,
                "speed": speed,
                "total_seconds": total,
                "machine": about,
            },
            indent=1,
        )
        + "\n"
    )
    print(
        f"\n{report.to_markdown()}\n\n"
        f"| images/s of training | |\n| --- | ---: |\n"
        f"| fastdiff kernels | {speed['fastdiff_images_per_second']:.0f} |\n"
        f"| reference kernels, same model | {speed['reference_images_per_second']:.0f} |\n"
        f"| speed-up | {speed['speedup']:.2f}x |\n\n"
        f"guidance {sampling.guidance_scale:g}; {about['training_seconds']:.0f} s of training, {total:.0f} s in all; "
        f"pictures: {folder / 'samples.png'}, {folder / 'loss.png'}; numbers: {folder / 'report.json'}"
    )


if __name__ == "__main__":
    main()
