"""Small heads that tell an answer's length from a frozen model's states of a masked window (as in diffusion-llms)."""

import torch
from torch import Tensor, nn


class EndClassifier(nn.Module):
    """Of each token of a fully masked window: has the answer ended by there? LayerNorm and a linear layer.

    The linear layer starts at zero, so that an untrained head says 0.5 everywhere.

    Args:
        hidden_size: D, of the language model.
    """

    kind = "classifier"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Tensor) -> Tensor:  # float [..., D] -> float32 [...]
        """Logits of P(length ≤ offset), one a state that predicts the window's token at that offset."""
        return self.out(self.norm(states.to(self.out.weight.dtype))).squeeze(-1).float()


class LengthRegressor(nn.Module):
    """Expected length of an answer from the mean embedding of its prompt's tokens; LayerNorm and two layers.

    It predicts log(1 + length): errors count by their share of the length. The order of the prompt's tokens is lost.

    Args:
        hidden_size: D, of the language model's embeddings.
    """

    kind = "regression"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)

    def forward(self, prompt_mean: Tensor, logarithm: bool = False) -> Tensor:  # float [B, D] -> float32 [B]
        """Tokens before the EoS, at least 0; with `logarithm` log(1 + tokens) as predicted, which training compares."""
        x = self.hidden(self.norm(prompt_mean.to(self.out.weight.dtype)))
        log_length = self.out(nn.functional.gelu(x)).squeeze(-1).float()
        return log_length if logarithm else torch.expm1(log_length).clamp(min=0)


LENGTH_HEADS = {head.kind: head for head in (EndClassifier, LengthRegressor)}
