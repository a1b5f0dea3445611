"""Cases of scale_shift for the harness."""

import torch

from fastdiff.kernels.scale_shift import reference
from fastdiff.ops.scale_shift import scale_shift
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _case(name: str, batch: int, tokens: int, dim: int, skip: int = 0) -> Case:
    """`skip`: elements before x begins in memory, so that its rows are not aligned."""

    def make(dtypes: Dtypes, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(dim)
        flat, *modulation = (
            torch.randn(size, generator=generator).to(device, dtypes.stream)
            for size in ((skip + batch * tokens * dim,), (batch, dim), (batch, dim))
        )
        return {"x": flat[skip:].view(batch, tokens, dim), "scale": modulation[0], "shift": modulation[1]}

    return Case(name, make)


SCALE_SHIFT = Operator(
    "scale_shift",
    lambda **inputs: (scale_shift(**inputs),),
    lambda **inputs: (reference.scale_shift(**inputs),),
    [
        _case("one", 1, 1, 1),
        _case("odd", 2, 3, 77),
        _case("unaligned", 2, 5, 384, skip=1),
        _case("large", 2, 7, 1152),
        _case("no-tokens", 2, 0, 24),
        _case("no-batch", 0, 5, 24),
        _case("many-rows", 3, 150, 100),  # enough for several threads, in the backward pass as well
    ],
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16)],
    many="many-rows",
    batch="many-rows",
    second=lambda inputs: {name: t[1:2] for name, t in inputs.items()},
)
