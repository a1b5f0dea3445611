"""bias_activation in plain PyTorch: what every other backend is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(v: Tensor) -> Tensor:
    return F.gelu(v, approximate="tanh")


FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}


def bias_activation(
    x: Tensor,  # [..., D]
    bias: Tensor | None,  # [D]
    activation: str,
    up: Tensor | None = None,  # like x
    up_bias: Tensor | None = None,  # [D]
) -> Tensor:  # like x
    """act(x + bias) · (up + up_bias) in fp32 (float64 for float64), rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    result = FUNCTIONS[activation](x.to(wide) if bias is None else x.to(wide) + bias.to(wide))
    if up is not None:
        result = result * (up.to(wide) if up_bias is None else up.to(wide) + up_bias.to(wide))
    return result.to(x.dtype)
