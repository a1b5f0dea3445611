"""Cases of self_attention for the harness."""

import torch

from fastdiff.kernels.self_attention import reference
from fastdiff.ops.self_attention import self_attention
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _case(name: str, batch: int, tokens: int, heads: int, dim: int, layout: str = "packed", **options: float) -> Case:
    """`layout`: "unaligned" begins one element into its memory, "sliced" has other numbers between its heads."""

    def make(dtypes: Dtypes, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(tokens)
        shape = (batch, tokens, 3, heads, dim)
        if layout == "sliced":
            wide = torch.randn(batch, tokens, 3, heads, 2 * dim, generator=generator)
            return {"qkv": wide.to(device, dtypes.stream)[..., :dim], **options}
        flat = torch.randn(batch * tokens * 3 * heads * dim + 1, generator=generator).to(device, dtypes.stream)[1:]
        return {"qkv": (flat if layout == "unaligned" else flat.clone()).view(shape), **options}

    return Case(name, make, cancels=tokens == 1)  # one token: the softmax is 1, query's and key's gradients are 0


def _exact(qkv: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor]:
    return (reference.self_attention(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale),)


SELF_ATTENTION = Operator(
    "self_attention",
    lambda **inputs: (self_attention(**inputs),),
    _exact,
    [
        _case("one", 1, 1, 1, 1),
        _case("one-token", 2, 1, 2, 24),
        _case("odd", 2, 3, 3, 7),
        _case("fifteen", 1, 15, 2, 33, scale=0.7),
        _case("demo", 2, 49, 2, 64),
        _case("prime", 1, 67, 1, 40, "unaligned"),  # two blocks of rows
        _case("wide", 1, 20, 1, 200, "sliced"),
        _case("large", 2, 257, 2, 72),  # blocks of rows and of columns, the last of them short
        _case("no-tokens", 2, 0, 2, 16),
        _case("no-batch", 0, 5, 2, 16),
        _case("many-heads", 3, 150, 3, 16),
    ],
    # seen: 4.0e-7, 2.9e-3, 3.3e-4 (gradients: 4.9e-7, 4.3e-3, 4.4e-4)
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16)],
    many="many-heads",
    batch="many-heads",
    second=lambda inputs: {"qkv": inputs["qkv"][1:2]},
    shorten=lambda inputs, tokens: {"qkv": inputs["qkv"][:, :tokens].contiguous()},
)
