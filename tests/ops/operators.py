"""The operators that the harness runs, with their cases."""

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.kernels.adaln import reference as adaln_reference
from ops.bias_activation_cases import BIAS_ACTIVATION
from ops.conv_activation_cases import CONV_ACTIVATION
from ops.eos_log_prob_cases import EOS_HEAD, EOS_LOGITS
from ops.harness import Case, Dtypes, Inputs, Operator
from ops.masked_linear_cross_entropy_cases import MASKED_LOSS
from ops.qgfd_cases import QGFD
from ops.qk_norm_rotary_cases import QK_NORM_ROTARY
from ops.scale_shift_cases import SCALE_SHIFT
from ops.self_attention_cases import SELF_ATTENTION
from ops.token_sampling_cases import HEAD, SAMPLE


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _modulation(
    kind: str, batch: int, tokens: int, dim: int, dtype: torch.dtype, device: str, seed: int
) -> Tensor | None:
    """kind: "none", "D", "1D", "BD", "BFD:<frames>", "BND", "1ND"; with "/" a strided chunk of a wider projection."""
    kind, _, chunk = kind.partition("/")
    kind, _, frames = kind.partition(":")
    if kind == "none":
        return None
    lead = {
        "D": (),
        "1D": (1,),
        "BD": (batch,),
        "BFD": (batch, int(frames or 1)),
        "BND": (batch, tokens),
        "1ND": (1, tokens),
    }[kind]
    if not chunk:
        return _randn((*lead, dim), dtype, device, seed)
    return _randn((*lead, 3 * dim), dtype, device, seed).chunk(3, -1)[1]


def _adaln_inputs(shape, shift, scale, gate, norm, affine, unaligned, saturate):
    def make(dtypes: Dtypes, device: str) -> Inputs:
        batch, tokens, dim = shape

        def stream(dtype: torch.dtype, seed: int) -> Tensor:
            flat = _randn((batch * tokens * dim + unaligned,), dtype, device, seed)
            return flat[unaligned:].view(shape)

        inputs: Inputs = {"residual" if gate else "x": stream(dtypes.stream, 1)}
        if gate:
            inputs["branch"] = stream(dtypes.other, 2)
            inputs["gate"] = _modulation(gate, *shape, dtypes.other, device, 3)
        inputs["shift"] = _modulation(shift, *shape, dtypes.other, device, 4)
        inputs["scale"] = _modulation(scale, *shape, dtypes.other, device, 5)
        if affine:
            inputs["weight"] = _randn((dim,), dtypes.other, device, 6) + 1
            inputs["bias"] = _randn((dim,), dtypes.other, device, 7)
        return inputs | {"norm": norm} | ({"saturate": True} if saturate else {})

    return make


def _adaln_cases(gated: bool) -> list[Case]:
    cases = []

    def add(name, shape, shift, scale, gate="BD", norm="layer", affine=False, unaligned=0, saturate=False):
        make = _adaln_inputs(shape, shift, scale, gate if gated else None, norm, affine, unaligned, saturate)
        cases.append(Case(name, make, cancels=shape[-1] == 1))

    for dim in (1, 7, 384, 768, 1152, 3072, 5120):
        # RMSNorm of one element is a sign; LayerNorm of one element is zero, whatever it is.
        add(f"dim{dim}", (2, 3, dim), "BD", "BD")
        add(f"dim{dim}-rms", (1, 5, dim), "1ND", "BND/chunk", "D", "rms", affine=True)
    for kind in ("D", "1D", "BD", "BFD:3", "BND", "1ND", "BD/chunk", "BFD:3/chunk", "BND/chunk", "1ND/chunk"):
        add(f"modulation-{kind.replace('/', '-')}", (3, 6, 40), kind, kind, kind)
    add("none", (2, 5, 24), "none", "none")
    add("shift-only", (2, 5, 24), "BD", "none", "1D", affine=True)
    add("scale-only", (2, 5, 24), "none", "BND", "BND", affine=True)
    add("frames-differ", (2, 12, 24), "BFD:2", "BFD:3", "BFD:4", affine=True)
    add("many-segments", (2, 150, 40), "BD", "1D", "BFD:2", affine=True)
    add("unaligned", (2, 5, 33), "BD/chunk", "BD/chunk", unaligned=1)
    if gated:  # nothing is clipped here; test_adaln.py has what is
        add("saturate", (2, 12, 40), "BFD:2", "BD", "BFD:3", affine=True, saturate=True)
    add("no-batch", (0, 5, 24), "1D", "BD", "1ND", affine=True)
    add("no-tokens", (2, 0, 24), "BD", "D", "BND", affine=True)
    return cases


def _adaln_reference(**kw) -> tuple[Tensor]:
    return (adaln_reference.adaln(kw.pop("x"), kw.pop("shift"), kw.pop("scale"), **kw),)


def _gated_reference(**kw) -> tuple[Tensor, Tensor]:
    operands = [kw.pop(k) for k in ("residual", "branch", "gate", "shift", "scale")]
    return adaln_reference.gated_residual_adaln(*operands, **kw)


ADALN = Operator("adaln", lambda **kw: (ops.adaln(**kw),), _adaln_reference, _adaln_cases(gated=False))
GATED = Operator(
    "gated_residual_adaln", lambda **kw: ops.gated_residual_adaln(**kw), _gated_reference, _adaln_cases(gated=True)
)
OPERATORS = [
    ADALN,
    GATED,
    SAMPLE,
    HEAD,
    MASKED_LOSS,
    EOS_LOGITS,
    EOS_HEAD,
    QGFD,
    SCALE_SHIFT,
    SELF_ATTENTION,
    BIAS_ACTIVATION,
    CONV_ACTIVATION,
    QK_NORM_ROTARY,
]
