from dataclasses import dataclass, field
from typing import Literal

from fastdiff.training.config import TrainingConfig


@dataclass
class BellConfig:
    """The data.

    Attributes:
        mean: mean of the numbers to learn from.
    """

    mean: float = 3.0


@dataclass
class ToyRecipe:
    """Everything a run is made from.

    Attributes:
        task: tells it from other recipes.
        data: the numbers.
        training: the course of training.
    """

    task: Literal["toy"] = "toy"
    data: BellConfig = field(default_factory=BellConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
