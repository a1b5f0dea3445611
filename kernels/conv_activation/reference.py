"""A depthwise 3×3 convolution with its activation in plain PyTorch: what every other backend is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.kernels.bias_activation.reference import FUNCTIONS


def conv_activation(
    x: Tensor,  # [B, H, W, C]
    weight: Tensor,  # [C, 1, 3, 3]
    bias: Tensor | None,  # [C]
    activation: str,
    x_bias: Tensor | None = None,  # [C]
) -> Tensor:  # like x
    """act(conv(x + x_bias) + bias) in fp32 (float64 for float64), rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias, x_bias = (None if t is None else t.to(wide) for t in (weight, bias, x_bias))
    padded = F.pad(x.to(wide) if x_bias is None else x.to(wide) + x_bias, (0, 0, 1, 1, 1, 1))
    rows, columns = x.shape[1:3]
    mixed = padded.new_zeros(x.shape) if bias is None else bias.expand(x.shape)
    for i in range(3):
        for j in range(3):
            mixed = mixed + padded[:, i : i + rows, j : j + columns] * weight[:, 0, i, j]
    return FUNCTIONS[activation](mixed).to(x.dtype)
