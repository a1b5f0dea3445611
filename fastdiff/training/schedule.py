"""The learning rate as a pure function of the step, so that it needs no state in a checkpoint."""

import dataclasses
import math

from fastdiff.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The learning rate of the step with this number (the first is 0)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "cosine":
        start = min(config.warmup_steps, config.max_steps - 1)
        progress = max(0.0, (step - start) / (config.max_steps - start))
        factor = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    elif config.schedule == "constant_then_linear":
        decay_steps = max(1.0, config.decay_fraction * config.max_steps)
        factor = min(1.0, max(0.0, (config.max_steps - step) / decay_steps))
    else:
        factor = 1.0
    return config.learning_rate * warmup * factor


def rate_jump(config: TrainingConfig, planned: int, step: int) -> str | None:
    """What to say where a run of `planned` steps goes on after `step` of them with another max_steps; None for nothing.

    A schedule that depends on max_steps then gives the next step another learning rate than it would have had.
    """
    if step >= config.max_steps or planned == config.max_steps:
        return None
    would_be = learning_rate(dataclasses.replace(config, max_steps=planned), min(step, planned - 1))
    rate = learning_rate(config, step)
    if abs(rate - would_be) <= 0.01 * config.learning_rate:
        return None
    return (
        f"training.max_steps: got {config.max_steps}, and the run was planned for {planned}: by the schedule "
        f"{config.schedule!r} the learning rate goes from {would_be:.3g} to {rate:.3g} at step {step + 1}; the "
        "schedule 'constant' alone is the same for any number of steps"
    )
