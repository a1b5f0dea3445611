"""The two-layer perceptron of a transformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import backends
from fastdiff.nn.head import plain_weights, unhooked
from fastdiff.ops import bias_activation
from fastdiff.ops._checks import autocast_dtype, choose_backend
from fastdiff.ops.bias_activation import ACTIVATIONS
from fastdiff.ops.conv_activation import conv_activation


def linear_activation(
    linear: nn.Module,  # dim -> hidden_dim
    x: Tensor,  # [..., dim]
    activation: str,
    up: nn.Module | None = None,  # dim -> hidden_dim
) -> Tensor:  # [..., hidden_dim]
    """activation(linear(x)), or with `up` activation(linear(x)) · up(x).

    Where the layers are plain nn.Linear, their biases, the activation and the product with `up` are one pass over what
    the matrix products return (`fastdiff.ops.bias_activation`). Elsewhere the modules are called.
    """
    plain = plain_weights(linear) if _fuses(x) else None
    up_plain = None if up is None or plain is None else plain_weights(up)
    if plain is None or (up is not None and up_plain is None):
        result = ACTIVATIONS[activation](linear(x))
        return result if up is None else result * up(x)
    weight, bias = plain
    gated = F.linear(x, weight)
    if up is None:
        return bias_activation(gated, bias, activation)
    return bias_activation(gated, bias, activation, up=F.linear(x, up_plain[0]), up_bias=up_plain[1])


def _fuses(x: Tensor) -> bool:
    if torch.compiler.is_compiling() and x.device.type == "cuda":  # Inductor fuses it by itself
        return False
    return choose_backend("bias_activation", x.device.type, (autocast_dtype(x),)) != "reference"


def swiglu_width(dim: int, ratio: float = 4.0, multiple_of: int = 256) -> int:
    """The hidden width of a SwiGLU with as many weights as an MLP of width ratio · dim: 2/3 of that, rounded up.

    As in Llama (Touvron et al. 2023).
    """
    return multiple_of * -(-int(2 * int(ratio * dim) / 3) // multiple_of)


class Mlp(nn.Module):
    """Linear → activation → Linear, `dim` → `hidden_dim` → `dim`.

    `activation` is "gelu" (exact), "gelu_tanh" or "silu"; anything else raises ValueError.
    """

    def __init__(self, dim: int, hidden_dim: int, *, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
        return self.fc2(linear_activation(self.fc1, x, self.activation))


class ConvMlp(nn.Module):
    """Linear → depthwise 3×3 convolution over the grid of tokens → activation → Linear.

    The convolution pads with zeros (LocalViT, Li et al. 2021, "LocalViT: Bringing Locality to Vision Transformers").
    `activation` is "gelu" (exact), "gelu_tanh" or "silu"; anything else raises ValueError.
    """

    def __init__(self, dim: int, hidden_dim: int, *, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: got {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.conv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, N, dim]
        grid: tuple[int, int],  # rows and columns of the tokens, N in all
    ) -> Tensor:  # [B, N, dim]
        if self._fuses(x):
            (weight, bias), conv = plain_weights(self.fc1), self.conv
            hidden = F.linear(x, weight).unflatten(1, grid)
            return self.fc2(conv_activation(hidden, conv.weight, conv.bias, self.activation, x_bias=bias).flatten(1, 2))
        hidden = self.fc1(x).unflatten(1, grid).permute(0, 3, 1, 2)  # [B, C, H, W], channels last in memory
        hidden = self.conv(hidden).permute(0, 2, 3, 1).flatten(1, 2)
        return self.fc2(ACTIVATIONS[self.activation](hidden))

    def _fuses(self, x: Tensor) -> bool:
        """Whether the convolution and its neighbours run as one operator: on a CPU, where nobody has wrapped them."""
        plain = type(self.conv) is nn.Conv2d and unhooked(self.conv) and plain_weights(self.fc1) is not None
        plain = plain and backends.requested() not in ("cuda", "triton")  # asked for by name, without such an operator
        return plain and choose_backend("conv_activation", x.device.type, (autocast_dtype(x),)) != "reference"
