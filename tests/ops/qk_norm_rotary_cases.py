"""Cases of qk_norm_rotary for the harness."""

import torch
from torch import Tensor

from fastdiff.kernels.qk_norm_rotary import reference
from fastdiff.nn.rotary import rotary_table
from fastdiff.ops.qk_norm_rotary import qk_norm_rotary
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _case(name: str, batch: int, tokens: int, heads: int, dim: int, *, turns: bool = True, skip: int = 0) -> Case:
    """`skip`: elements before qkv begins in memory, so that its rows are not aligned."""

    def make(dtypes: Dtypes, device: str) -> Inputs:
        generator, shape = torch.Generator().manual_seed(tokens), (batch, tokens, 3, heads, dim)

        def normal(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        count = torch.Size(shape).numel()
        inputs: Inputs = {"qkv": (normal(skip + count, dtype=dtypes.stream)[skip:] + 0.3).view(shape)}
        inputs["weight"] = normal(2, heads * dim, dtype=dtypes.other) + 1
        inputs["bias"] = normal(2, heads * dim, dtype=dtypes.other)
        inputs["positions"] = torch.arange(tokens, device=device) if turns else None  # no gradient flows to angles
        return inputs

    return Case(name, make, cancels=heads * dim <= 2)  # the norm of one or two numbers: they are 1 and -1


def _angles(positions: Tensor | None, dim: int) -> tuple[Tensor | None, Tensor | None]:
    if positions is None:
        return None, None
    return tuple(table[0, 0] for table in rotary_table(positions[None], dim, 100.0))


def _run(qkv: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None) -> tuple[Tensor]:
    return (qk_norm_rotary(qkv, weight, bias, *_angles(positions, qkv.shape[-1])),)


def _exact(qkv: Tensor, weight: Tensor, bias: Tensor, positions: Tensor | None) -> tuple[Tensor]:
    return (reference.qk_norm_rotary(qkv, weight, bias, *_angles(positions, qkv.shape[-1]), 1e-5),)


def _first_tokens(inputs: Inputs, tokens: int) -> Inputs:
    return inputs | {"qkv": inputs["qkv"][:, :tokens].contiguous(), "positions": inputs["positions"][:tokens].clone()}


QK_NORM_ROTARY = Operator(
    "qk_norm_rotary",
    _run,
    _exact,
    [
        _case("one", 1, 1, 1, 2),
        _case("odd", 2, 3, 3, 7, turns=False),
        _case("llm2dit", 2, 20, 8, 32),
        _case("queries", 2, 4, 8, 96, turns=False),
        _case("unaligned", 1, 5, 2, 24, skip=1),
        _case("short-halves", 2, 5, 3, 14),
        _case("wide", 1, 3, 2, 200),
        _case("no-tokens", 2, 0, 2, 16),
        _case("no-batch", 0, 5, 2, 16),
        _case("many-tokens", 3, 150, 2, 40),  # enough for several threads, and many segments
    ],
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16), Dtypes(BF16, F32)],
    many="many-tokens",
    batch="many-tokens",
    shorten=_first_tokens,
    second=lambda inputs: inputs | {"qkv": inputs["qkv"][1:2]},
)
