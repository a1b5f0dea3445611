"""Training: one trainer for every task, exact resume, atomic checkpoints; the diffusion task and its recipe."""

from fastdiff.errors import TrainingError
from fastdiff.training.config import TrainingConfig
from fastdiff.training.task import Task
from fastdiff.training.trainer import Outcome, Trainer

__all__ = ["Outcome", "Task", "Trainer", "TrainingConfig", "TrainingError"]
