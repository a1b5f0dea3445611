"""Small heads that predict from a frozen language model how long its answer will be; their folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.pretrained import CONFIG_NAME, WEIGHTS_NAME, Pretrained, read_config
from fastdiff.version import __version__

_MODEL_TYPE = "fastdiff_length_head"  # transformers' key, so that a loader of language models can name what it refuses


@dataclass
class LengthHeadConfig:
    """Kind and size of a length head.

    Attributes:
        head: "classifier" (`EndClassifier`) or "regression" (`LengthRegressor`).
        hidden_size: Width of the language model's states.
    """

    head: str
    hidden_size: int

    def __post_init__(self) -> None:
        if self.head not in LENGTH_HEADS:
            raise ValueError(f"head: got {self.head!r}; expected {' or '.join(LENGTH_HEADS)}")
        if not isinstance(self.hidden_size, int) or self.hidden_size < 1:
            raise ValueError(f"hidden_size: got {self.hidden_size!r}; expected a whole number of 1 or more")


class LengthHead(Pretrained):
    """What the heads share. `LengthHead.from_pretrained` loads either kind.

    config.json may hold further plain values, such as the `model_hash` of the frozen model
    (`fastdiff.generation.length`).
    """

    config_class = LengthHeadConfig
    title = "a length head"
    extra_keys = None
    kind: str

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.config = LengthHeadConfig(self.kind, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @classmethod
    def from_config(cls, config: LengthHeadConfig) -> "LengthHead":
        kind = LENGTH_HEADS[config.head]
        if not issubclass(kind, cls):
            raise ValueError(f"head: got {config.head!r}; expected {cls.kind!r}")
        return kind(config.hidden_size)

    @classmethod
    def header(cls) -> dict[str, Any]:
        return {"model_type": _MODEL_TYPE, "fastdiff_version": __version__}

    @classmethod
    def _values_of(cls, config: dict[str, Any], path: Path) -> dict[str, Any]:
        if config.get("model_type") != _MODEL_TYPE:
            raise ValueError(
                f"{path / CONFIG_NAME}: not the configuration of a length head; expected a run of "
                "recipes/eos_head_*.yaml"
            )
        return {name: config.get(name) for name in ("head", "hidden_size")}


class EndClassifier(LengthHead):
    """Has the answer ended at this token of a fully masked window? LayerNorm and a linear layer.

    The linear layer starts at zero, so that an untrained head says 0.5 everywhere.

    Args:
        hidden_size: D, the width of the language model's states.
    """

    kind = "classifier"

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:  # float [..., D] -> float32 [...]
        """Logits of P(length ≤ offset), one for each state that predicts the window's token at that offset."""
        return self.out(self.norm(states.to(next(self.out.parameters()).dtype))).squeeze(-1).float()


class LengthRegressor(LengthHead):
    """Expected length of an answer from the mean embedding of its prompt's tokens; LayerNorm and two layers.

    It predicts log(1 + length): errors count by their share of the length. The order of the prompt's tokens is lost.

    Args:
        hidden_size: D, the width of the language model's embeddings.
    """

    kind = "regression"

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    def forward(self, prompt_mean: Tensor, logarithm: bool = False) -> Tensor:  # float [B, D] -> float32 [B]
        """Tokens before the EoS, at least 0; with `logarithm` log(1 + tokens) as predicted, which training compares."""
        x = self.hidden(self.norm(prompt_mean.to(next(self.out.parameters()).dtype)))
        log_length = self.out(nn.functional.gelu(x)).squeeze(-1).float()
        return log_length if logarithm else torch.expm1(log_length).clamp(min=0)


LENGTH_HEADS: Mapping[str, type[LengthHead]] = {head.kind: head for head in (EndClassifier, LengthRegressor)}


def save_length_head(head: LengthHead, folder: str | Path, /, **about: Any) -> None:
    """`head.save_pretrained(folder, extra=about)`.

    Args:
        about: plain values for config.json: `model_hash` of the frozen model (`fastdiff.generation.length`), which
            `fastdiff.tasks.length_head.run.load_length_head` compares, and what else users may want to know.
    """
    head.save_pretrained(folder, extra=about)


def read_length_head(folder: str | Path, weights: str = WEIGHTS_NAME) -> tuple[LengthHead, dict[str, Any]]:
    """The head in a folder, frozen and in eval mode, and its config.json. Errors as `LengthHead.from_pretrained`."""
    head = LengthHead.from_pretrained(folder, weights=weights)
    return head.requires_grad_(False), read_config(folder)
