"""The part of a recipe that says how to train, whatever is trained."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fastdiff.errors import named


@dataclass
class TrainingConfig:
    """How to train.

    Attributes:
        output_dir: the run's folder: config.yaml, checkpoints/, metrics.jsonl, validation.jsonl, loss.png, samples.png.
        batch_size: samples per optimizer step, over all processes and accumulation steps.
        accumulation_steps: parts in which each process works through its share of a batch, to save memory.
        max_steps: optimizer steps.
        learning_rate: AdamW's learning rate, reached after the warm-up.
        betas: AdamW's decay rates of the moments.
        weight_decay: AdamW's weight decay, on matrices alone (not on biases, gains and embeddings of one dimension).
        warmup_steps: steps over which the learning rate rises linearly from 0.
        schedule: the learning rate after the warm-up: "cosine" falls to 0 at max_steps, "constant" stays,
            "constant_then_linear" stays and then falls linearly to 0 over the last part of the run.
        decay_fraction: the last part of "constant_then_linear", as a share of max_steps.
        max_grad_norm: gradients are scaled down to this norm; 0 turns clipping off.
        ema_decay: decay of the moving average of the weights that sampling uses; reached gradually in the first steps.
        mixed_precision: "bf16" computes under autocast, weights stay float32; "no" is float32; "auto" takes bf16
            where a GPU has instructions for it, and on a CPU that has them the one in which the run's own training
            step is faster (measured in two seconds when the run begins, once a machine).
        choices: what a run on a CPU goes by (fastdiff.tuning): training writes here what it measured, and a resumed run
            keeps it. Where a recipe gives them, nothing is measured.
        device: "auto" takes a GPU where there is one; "cpu" does not.
        seed: seed of everything random: initial weights, order of the data, noise, times, label dropout.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        keep_last: how many checkpoints are kept.
        resume: go on from the run folder's newest checkpoint (from the start where it has none).
        accept_changed_data: resume although the data is not what the run was trained on; a line says what changed.
        overwrite: delete the run that output_dir holds; to be given on the command line, not in a file.
        log_every: steps between lines of progress; metrics.jsonl has every step.
        preview_every: steps between pictures of samples, with measures on held-out data where the task has them; 0:
            at the end alone.
        trackers: accelerate's trackers, for example [tensorboard] or [wandb].
        project: the project's name that trackers show.
    """

    output_dir: str = "runs/run"
    batch_size: int = 32
    accumulation_steps: int = 1
    max_steps: int = 1000
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant", "constant_then_linear"] = "cosine"
    decay_fraction: float = 0.5
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    choices: dict[str, int | str] = field(default_factory=dict)
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0
    checkpoint_every: int = 1000
    keep_last: int = 2
    resume: bool = False
    accept_changed_data: bool = False
    overwrite: bool = False
    log_every: int = 10
    preview_every: int = 0
    trackers: list[str] = field(default_factory=list)
    project: str = "fastdiff"

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(f"{named('output_dir')}: got ''; expected the name of a folder")
        for name in ("batch_size", "accumulation_steps", "max_steps", "checkpoint_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected at least 1")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "preview_every", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected 0 or more")
        if self.seed >= 2**64:
            raise ValueError(f"{named('seed')}: got {self.seed}; expected at most {2**64 - 1} (torch has no larger)")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"{named('betas')}: got {list(self.betas)}; expected two numbers, each at least 0 and below 1"
            )
        for name in ("ema_decay", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{named(name)}: got {getattr(self, name)}; expected a number from 0 to 1")
        if self.resume and self.overwrite:
            raise ValueError(f"{named('resume')}: got true, and {named('overwrite')} too; pass one of them")
