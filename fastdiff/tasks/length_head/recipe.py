"""The recipe of a length head: what is trained on which finished language model."""

from dataclasses import dataclass, field
from typing import Literal

from fastdiff.data.text_config import TextDataConfig
from fastdiff.training.config import TrainingConfig


@dataclass
class LengthHeadRecipe:
    """Everything a run of fastdiff.train that trains a length head is made from.

    Attributes:
        task: names the kind of recipe.
        run: folder of a finished run of pairs, one of its checkpoints, or a folder or hub id of any language model that
            fastdiff.generate takes (then `data` must be given). The model is read, never changed.
        weights: which weights of a run: the averaged ones ("ema") or those that the optimizer has.
        head: "classifier" (asks of each token of the window: has the answer ended?) or "regression" (the length from
            the mean embedding of the prompt).
        window: mask tokens behind the prompt; a step of the classifier draws from data.min_length … window. null is
            data.max_length.
        data: pairs to learn from instead of the run's own.
        training: the course of training.
    """

    task: Literal["length_head"] = "length_head"
    run: str = ""
    weights: Literal["ema", "model"] = "ema"
    head: Literal["classifier", "regression"] = "classifier"
    window: int | None = None
    data: TextDataConfig | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self):
        if not self.run:
            raise ValueError("run: got none; expected the folder of a finished run of pairs, such as runs/mdlm_numbers")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window: got {self.window}; expected at least 1 token")
