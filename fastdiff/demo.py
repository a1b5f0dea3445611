"""Five minutes of training, from nothing to labelled pictures: `fastdiff demo` (or `make demo`).

Measures what the machine does in a second, trains the recipe dit_mnist in the size whose steps fit into the time, for
as many as do, and scores what comes out. Everything lies in runs/demo/ afterwards.
"""

import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastdiff.arguments import ArgumentParser
from fastdiff.cli import quiet_libraries
from fastdiff.commands import command
from fastdiff.errors import TrainingError
from fastdiff.files import write_atomically
from fastdiff.recipes import parse_recipe
from fastdiff.version import __version__

_RECIPE = "dit_mnist"
_BACKENDS = ("auto", "reference")  # fastdiff's kernels, and the same model on plain PyTorch operators
_SAMPLES = 500
_FEWEST_STEPS = 20
_MEANINGFUL_STEPS = 800  # a run of fewer does not draw what people would call digits
_MEASURING = 20.0  # seconds for measuring the rates, at most; a slow machine measures less
_TRAINED = 0.7  # class accuracy below which nobody would call the model trained (five minutes give 98 %, chance 10 %)
# what has to be typed before `fastdiff` can be, where the environment was not entered
_ENTER = "" if shutil.which("fastdiff") else ". .venv/bin/activate && "
# `make demo` installs and builds first
_PHASES = ("install", "build", "measure", "train", "classify")


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the demo's model.

    Attributes:
        model: fields of `fastdiff.models.DiTConfig` that differ from the recipe's.
        steps: optimizer steps that it needs; where fewer fit into the time, a smaller one draws better digits.
        guidance_scale: what its samples are best guided by.
    """

    model: dict[str, int]
    steps: int
    guidance_scale: float


# Measured on MNIST-5k. Six layers have a class accuracy of 92 % after 1 500 steps (guidance 2), four layers 97 % after
# the 2 250 that take as long; after 5 000 steps six layers have the smaller Fréchet distance. Fewer steps want more
# guidance.
SIZES = (
    Size({}, 5000, 1.75),
    Size({"depth": 4}, 1600, 2.25),
    Size({"depth": 4, "hidden_size": 64, "num_heads": 1}, 0, 3.0),
)


def fit_size(
    sizes: Sequence[Size], images_per_second: Callable[[Size], float], batch_size: int, seconds: float
) -> Size:
    """The largest size whose steps fit into the time; the smallest where none does.

    Args:
        sizes: the largest first.
        images_per_second: measures the rate of a size's training.
        batch_size: images of a step.
        seconds: of training.
    """
    return next(
        (size for size in sizes[:-1] if seconds * images_per_second(size) / batch_size >= size.steps), sizes[-1]
    )


def sized(recipe: Any, size: Size) -> Any:
    """The recipe with a model of that size."""
    sampling = dataclasses.replace(recipe.sampling, guidance_scale=size.guidance_scale)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **size.model), sampling=sampling)


def announce(phase: str, what: str) -> None:
    """A line that says which of the demo's phases begins."""
    print(f"[{_PHASES.index(phase) + 1}/{len(_PHASES)}] {phase}: {what}", flush=True)


def measure_rates(
    recipe: Any, data: Any, *, rounds: int, steps: int, seconds: float, names: Sequence[str] = _BACKENDS
) -> dict[str, float]:
    """Images per second of whole training steps, by backend of `names`: medians over interleaved rounds.

    The backends take turns, so that both meet the same state of the machine; the first round warms up. At least one
    more round is measured, and no further one is begun when `seconds` are over.
    """
    from fastdiff.backends import use_backend
    from fastdiff.tasks.dit.task import DiTTask
    from fastdiff.training import Trainer

    taken: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=(rounds + 1) * len(names) * steps, unit="step") as bar:
        training = dataclasses.replace(recipe.training, output_dir=folder, overwrite=True, resume=False)
        trainer = Trainer(DiTTask(dataclasses.replace(recipe, training=training), data), training)
        begun = time.perf_counter()
        for index in range(rounds + 1):
            if index > 1 and time.perf_counter() - begun > seconds:
                break
            for name in names:
                with use_backend(name):
                    start = time.perf_counter()
                    for step in range(index * steps, (index + 1) * steps):
                        trainer.train_step(step)
                        bar.update()
                    if index > 0:
                        taken[name].append(time.perf_counter() - start)
        trainer.folder.unlock()
    return {name: steps * recipe.training.batch_size / statistics.median(times) for name, times in taken.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from fastdiff.device import computes_bf16
    from fastdiff.tuning import cpu_name

    return {
        "cpu": cpu_name(),
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
    from fastdiff.evaluation.classifier import check_classifier_cache
    from fastdiff.tasks.dit.recipe import DiTRecipe
    from fastdiff.tasks.dit.task import DiTTask

    parser = ArgumentParser(prog="fastdiff demo", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=280.0, help="seconds of training, at most")
    parser.add_argument("--output-dir", type=str, default="runs/demo", help="the run's folder; a run in it is replaced")
    parser.add_argument("--recipe", type=str, default=_RECIPE, help="what to train: a recipe of a DiT")
    arguments = parser.parse_args(argv)
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds: got {arguments.seconds}; expected a positive number")
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
    check_classifier_cache(data)
    announce("measure", f"training steps on {len(data.train)} real images of {data.name}")
    training_start = time.perf_counter()
    sizes = SIZES if arguments.recipe == _RECIPE else (Size({}, 0, recipe.sampling.guidance_scale),)
    trainer, outcome, rates = _fit_and_train(recipe, sizes, data, arguments.seconds, about)
    training_seconds = time.perf_counter() - training_start
    if outcome.interrupted:
        print(f"stopped after step {outcome.steps}; checkpoint: {outcome.checkpoint}")
        raise SystemExit(130)
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
        arguments.seconds,
    )


def _fit_and_train(
    recipe: Any, sizes: Sequence[Size], data: Any, seconds: float, about: dict[str, Any]
) -> tuple[Any, Any, dict[str, float]]:
    """Trains the size that fits the machine for about `seconds`: the trainer, its outcome, and the rates measured.

    Where the machine does far less than was measured, a smaller size begins anew in the time that is left.
    """
    batch_size, begun = recipe.training.batch_size, time.perf_counter()

    def rate_of(size: Size) -> float:
        return measure_rates(sized(recipe, size), data, rounds=2, steps=4, seconds=_MEASURING / 8, names=("auto",))[
            "auto"
        ]

    size = fit_size(sizes, rate_of, batch_size, seconds)
    smaller = sizes[sizes.index(size) + 1 :]
    fitted = sized(recipe, size)
    rates = measure_rates(fitted, data, rounds=7, steps=6, seconds=min(_MEASURING / 2, seconds))
    planned = max(_FEWEST_STEPS, int(seconds * rates["auto"] / batch_size))
    training = dataclasses.replace(
        recipe.training,
        max_steps=planned,
        checkpoint_every=10 * planned,
        keep_last=1,
        warmup_steps=min(recipe.training.warmup_steps, planned // 5),
    )
    print(
        f"{rates['auto']:.0f} images/s with fastdiff's kernels, {rates['reference']:.0f} with reference kernels",
        flush=True,
    )
    shape = f"{fitted.model.depth} layers of {fitted.model.hidden_size}"
    announce("train", f"{shape}, about {planned} steps in {seconds / 60:.1f} minutes")
    if planned < _MEANINGFUL_STEPS:
        print(
            f"this machine is slow or busy (load {about['load_before']} on {about['cores']} cores): so few steps make "
            "no readable digits; Ctrl-C and try again when it is idle, or give it longer with --seconds",
            flush=True,
        )
    trainer, outcome = _train(fitted, training, data, seconds, int(0.7 * size.steps) if smaller else 0)
    if outcome is None:
        print("the machine became slower: a smaller model is trained in the time that is left", flush=True)
        left = seconds - (time.perf_counter() - begun)
        return _fit_and_train(recipe, smaller, data, left, about)
    return trainer, outcome, rates


def _train(recipe: Any, training: Any, data: Any, seconds: float, least: int = 0) -> tuple[Any, Any]:
    """Trains for about `seconds`: the trainer and its outcome, which is None where fewer than `least` steps would fit.

    A short measurement does not tell what a long run does, so the number of steps is set anew after a tenth of the way,
    by the rate of that tenth. Nothing done until then depends on it: the learning rate falls over the second half.
    """
    from fastdiff.tasks.dit.task import DiTTask
    from fastdiff.training.trainer import Trainer

    def trainer_for(settings: Any) -> Trainer:
        return Trainer(DiTTask(dataclasses.replace(recipe, training=settings), data), settings)

    start, tenth = time.perf_counter(), max(training.max_steps // 10, 1)
    trainer = trainer_for(training)
    outcome = trainer.train(stop_at=tenth, seconds=seconds)
    if outcome.interrupted:
        return trainer, outcome
    if outcome.steps < tenth:
        return _ended(trainer_for, training, outcome)
    left = 0.97 * (seconds - (time.perf_counter() - start))  # the rest is for checkpoints and pictures
    steps = tenth + max(tenth, int(left * outcome.samples_per_second / training.batch_size))
    if steps < least:
        return trainer, None
    steps = max(_FEWEST_STEPS, steps)
    training = dataclasses.replace(training, max_steps=steps, resume=True, overwrite=False)
    print(f"{steps} steps in all, by the rate of the first {tenth}", flush=True)
    trainer = trainer_for(training)
    outcome = trainer.train(seconds=1.3 * left + 10)
    if outcome.finished or outcome.interrupted:
        return trainer, outcome
    return _ended(trainer_for, training, outcome)


def _ended(trainer_for: Callable[[Any], Any], training: Any, outcome: Any) -> tuple[Any, Any]:
    """The time is over, as the machine became slower: what there is counts; this only draws the pictures."""
    trainer = trainer_for(dataclasses.replace(training, max_steps=outcome.steps, resume=True, overwrite=False))
    return trainer, dataclasses.replace(trainer.train(), samples_per_second=outcome.samples_per_second)


def _finish(
    folder: Path, data: Any, speed: dict[str, Any], about: dict[str, Any], start: float, recipe_seconds: float
) -> None:
    """Scores samples, writes report.json and prints the table."""
    from fastdiff.evaluation import evaluate_samples, load_or_train_classifier
    from fastdiff.tasks.dit.run import load_run

    announce("classify", f"{_SAMPLES} samples, by a classifier that is trained on the real images and cached")
    run = load_run(folder, device="cpu")
    classifier = load_or_train_classifier(data)
    labels = torch.arange(_SAMPLES) % len(data.class_names)
    # seeds beyond those of samples.png
    sampling = dataclasses.replace(run.recipe.sampling, seed=run.recipe.sampling.seed + 10_000)
    report = evaluate_samples(run.draw(labels, sampling, progress=True), labels, data, classifier)
    scores = report.to_dict()
    ratio = report.samples.frechet_distance / report.held_out.frechet_distance
    total = time.perf_counter() - start
    details = {
        "class_accuracy": report.samples.class_accuracy,
        "frechet_ratio_to_held_out": ratio,
        "guidance_scale": sampling.guidance_scale,
        "num_inference_steps": sampling.num_inference_steps,
        **scores,
        "speed": speed,
        "total_seconds": total,
        "machine": about,
    }
    write_atomically(folder / "report.json", json.dumps(details, indent=1) + "\n")
    # as `fastdiff evaluate` writes it, for the model card
    evaluation = {"run": str(folder), "step": run.step, "weights": "ema", **scores}
    write_atomically(folder / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")
    print(
        f"\n{report.to_markdown()}\n\n"
        f"| images/s of training | |\n| --- | ---: |\n"
        f"| fastdiff kernels | {speed['fastdiff_images_per_second']:.0f} |\n"
        f"| reference kernels, same model | {speed['reference_images_per_second']:.0f} |\n"
        f"| speed-up | {speed['speedup']:.2f}x |\n\n"
        f"guidance {sampling.guidance_scale:g}; {about['training_seconds']:.0f} s of training, {total:.0f} s in all; "
        f"pictures: {folder / 'samples.png'}, {folder / 'loss.png'}; numbers: {folder / 'report.json'}"
    )
    _tell_what_is_next(folder, report.samples.class_accuracy, about["training_steps"], recipe_seconds)


def _tell_what_is_next(folder: Path, accuracy: float, steps: int, seconds: float) -> None:
    """The next command, whole. Raises TrainingError where the model is not trained."""
    if accuracy < _TRAINED:
        raise TrainingError(
            f"the model is not trained: it made {steps} steps, and {accuracy:.0%} of its samples are of their class; "
            f"run it again when the machine is less busy, or longer: {_ENTER}fastdiff demo --seconds {4 * seconds:.0f}"
        )
    print(f"\nnext: {_ENTER}fastdiff sample {folder} --labels 3,1,4 --seed 7")


if __name__ == "__main__":
    main()
