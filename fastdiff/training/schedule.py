"""The learning rate as a pure function of the step, so that it needs no state in a checkpoint."""

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
