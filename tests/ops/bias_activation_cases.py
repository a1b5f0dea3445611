"""Cases of bias_activation for the harness."""

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.kernels.bias_activation import reference
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _case(
    name: str,
    *shape: int,
    activation: str = "gelu",
    bias: bool = True,
    gated: bool = False,
    up_bias: bool = False,
    skip: int = 0,
) -> Case:
    """`skip`: elements before x begins in memory, so that its rows are not aligned."""

    def make(dtypes: Dtypes, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(shape[-1])

        def normal(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator).mul(2).to(device, dtype)

        count = torch.Size(shape).numel()
        inputs: Inputs = {"x": normal(skip + count, dtype=dtypes.stream)[skip:].view(shape), "activation": activation}
        inputs["bias"] = normal(shape[-1], dtype=dtypes.other) if bias else None
        if gated:
            inputs["up"] = normal(*shape, dtype=dtypes.stream)
            inputs["up_bias"] = normal(shape[-1], dtype=dtypes.other) if up_bias else None
        return inputs

    return Case(name, make)


def _streams(inputs: Inputs, cut) -> Inputs:
    return {k: cut(v).contiguous() if k in ("x", "up") else v for k, v in inputs.items()}


def _reference(**inputs) -> tuple[Tensor]:
    return (reference.bias_activation(**inputs),)


BIAS_ACTIVATION = Operator(
    "bias_activation",
    lambda **inputs: (ops.bias_activation(**inputs),),
    _reference,
    [
        _case("one", 1, 1),
        _case("odd", 2, 3, 77, activation="gelu_tanh"),
        _case("silu", 5, 1152, activation="silu"),
        _case("unaligned", 2, 5, 384, skip=1),
        _case("no-bias", 2, 37, 40, activation="gelu_tanh", bias=False),
        _case("large", 2, 35, 1536),
        _case("swiglu", 3, 7, 200, activation="silu", bias=False, gated=True),
        _case("gated-gelu", 2, 33, 77, gated=True, up_bias=True),
        _case("gated-tanh", 65, 64, activation="gelu_tanh", gated=True),
        _case("no-rows", 2, 0, 24, gated=True, up_bias=True),
        _case("no-columns", 3, 0),
        _case("many-rows", 3, 150, 100, gated=True, up_bias=True),  # enough for several threads, and many segments
    ],
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16), Dtypes(BF16, F32)],
    many="many-rows",
    batch="many-rows",
    shorten=lambda inputs, tokens: _streams(inputs, lambda t: t[:, :tokens]),
    second=lambda inputs: _streams(inputs, lambda t: t[1:2]),
)
