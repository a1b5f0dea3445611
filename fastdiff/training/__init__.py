"""The engine: one trainer for every kind of task, exact resume, atomic checkpoints."""

from fastdiff.lazy import exports

__all__ = ["Outcome", "Task", "Trainer", "TrainingConfig", "TrainingError"]

__getattr__ = exports(
    __name__,
    {
        "Outcome": "fastdiff.training.trainer",
        "Task": "fastdiff.training.task",
        "Trainer": "fastdiff.training.trainer",
        "TrainingConfig": "fastdiff.training.config",
        "TrainingError": "fastdiff.errors",
    },
)
