"""Cases of conv_activation for the harness."""

import torch
from torch import Tensor

from fastdiff.kernels.conv_activation import reference
from fastdiff.ops.conv_activation import conv_activation
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _case(
    name: str, *shape: int, activation: str = "gelu", bias: bool = True, x_bias: bool = True, skip: int = 0
) -> Case:
    """`skip`: elements before x begins in memory, so that its rows are not aligned."""

    def make(dtypes: Dtypes, device: str) -> Inputs:
        generator, channels = torch.Generator().manual_seed(shape[-1]), shape[-1]

        def normal(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        count = torch.Size(shape).numel()
        return {
            "x": normal(skip + count, dtype=dtypes.stream)[skip:].view(shape),
            "weight": normal(channels, 1, 3, 3, dtype=dtypes.other),
            "bias": normal(channels, dtype=dtypes.other) if bias else None,
            "x_bias": normal(channels, dtype=dtypes.other) if x_bias else None,
            "activation": activation,
        }

    return Case(name, make)


def _grids(inputs: Inputs, cut) -> Inputs:
    return inputs | {"x": cut(inputs["x"]).contiguous()}


CONV_ACTIVATION = Operator(
    "conv_activation",
    lambda **inputs: (conv_activation(**inputs),),
    lambda **inputs: (reference.conv_activation(**inputs),),
    [
        _case("one", 1, 1, 1, 1),
        _case("one-column", 2, 5, 1, 24, activation="silu"),
        _case("odd", 2, 3, 7, 77, activation="gelu_tanh"),
        _case("latent", 2, 8, 8, 192),
        _case("unaligned", 1, 4, 6, 33, skip=1),
        _case("no-bias", 2, 5, 5, 40, bias=False),
        _case("plain", 2, 2, 9, 64, activation="silu", bias=False, x_bias=False),
        _case("no-samples", 0, 3, 3, 24),
        _case("no-rows", 2, 0, 3, 24),
        _case("no-channels", 2, 3, 3, 0),
        _case("many-samples", 19, 5, 6, 40, activation="gelu_tanh"),  # three segments of sums
    ],
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16), Dtypes(BF16, F32)],
    many="many-samples",
    batch="many-samples",
    lengths=(5, 4, 2),
    shorten=lambda inputs, rows: _grids(inputs, lambda x: x[:, :rows]),
    second=lambda inputs: _grids(inputs, lambda x: x[1:2]),
)
