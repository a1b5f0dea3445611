"""The operators that the harness runs, with their cases."""

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.kernels.adaln import reference as adaln_reference
from fastdiff.kernels.masked_loss import reference as masked_loss_reference
from ops.harness import F32, Case, Dtypes, Inputs, Operator


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


def _adaln_inputs(shape, shift, scale, gate, norm, affine, unaligned):
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
        return inputs | {"norm": norm}

    return make


def _adaln_cases(gated: bool) -> list[Case]:
    cases = []

    def add(name, shape, shift, scale, gate="BD", norm="layer", affine=False, unaligned=0):
        make = _adaln_inputs(shape, shift, scale, gate if gated else None, norm, affine, unaligned)
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


# ------------------------------------------------------------------------------------------ the masked loss
def _masked_loss_inputs(shape, vocab, bias=True, fraction=0.4, row_weight=True, suppress="", smoothing=0.0, stride=1):
    """hidden [B, L, D]; row_weight comes as int64 eighths: it has no gradient."""

    def make(dtypes: Dtypes, device: str) -> Inputs:
        *lead, dim = shape
        generator = torch.Generator().manual_seed(sum(shape) + vocab)
        head_dtype = dtypes.other if dtypes.autocast else dtypes.stream
        mask = torch.rand(lead, generator=generator) < fraction
        ids = [i for i in range(vocab) if str(i) not in suppress.split()]
        targets = torch.tensor(ids)[torch.randint(len(ids), lead, generator=generator)]
        eighths = torch.randint(20, lead, generator=generator)  # some are 0
        return {
            "hidden": _randn((*lead, dim * stride), dtypes.stream, device, 1)[..., ::stride],
            "weight": _randn((vocab, dim), head_dtype, device, 2) / dim**0.5,
            "bias": _randn((vocab,), head_dtype, device, 3) if bias else None,
            "targets": torch.where(mask, targets, -100).to(device),
            "mask": mask.to(device),
            "eighths": eighths.to(device) if row_weight else None,
            "suppress": suppress,
            "label_smoothing": smoothing,
        }

    return make


def _masked_loss_cases() -> list[Case]:
    make = _masked_loss_inputs
    return [
        Case("plain", make((2, 9, 16), 37)),
        Case("one-id", make((2, 3, 8), 1, fraction=2.0)),  # its loss and its gradients are 0
        Case("prime", make((3, 7, 13), 1009, suppress="1008", smoothing=0.1)),
        Case("suppressed", make((2, 9, 16), 50, suppress="0 7 8 9 49")),
        Case("smoothing", make((2, 9, 16), 50, smoothing=0.2, row_weight=False)),
        Case("no-bias", make((2, 9, 16), 130, bias=False)),
        Case("no-mask", make((2, 9, 16), 130, fraction=-1.0)),
        Case("all-masked", make((2, 9, 16), 130, fraction=2.0, row_weight=False)),
        Case("one-row", make((1, 1, 7), 300, fraction=2.0)),
        Case("no-rows", make((2, 0, 7), 30)),
        Case("strided", make((2, 9, 12), 77, stride=2)),
        # sizes at which MKL's own products do not depend on the number of threads; at some smaller ones they do
        Case("two-chunks", make((2, 450, 64), 1031, fraction=0.8)),
        Case("many-chunks", make((3, 1100, 16), 101, fraction=0.9)),
    ]


def _masked_loss(**kw) -> tuple[Tensor]:
    eighths = kw.pop("eighths", None)
    suppress = tuple(int(i) for i in kw.pop("suppress", "").split())
    row_weight = None if eighths is None else eighths / 8
    return (ops.masked_linear_cross_entropy(**kw, row_weight=row_weight, suppress_tokens=suppress)[0],)


def _masked_loss_reference(hidden, weight, targets, mask, bias, eighths, suppress, label_smoothing) -> tuple[Tensor]:
    suppressed = torch.tensor([int(i) for i in suppress.split()]) if suppress else None
    row_weight = None if eighths is None else eighths.flatten() / 8
    rows = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.flatten(), mask.flatten(), row_weight)
    return masked_loss_reference.masked_linear_cross_entropy(*rows, suppressed, label_smoothing)[:1]


MASKED_LOSS = Operator(
    "masked_linear_cross_entropy",
    _masked_loss,
    _masked_loss_reference,
    _masked_loss_cases(),
    result_dtype=lambda dtypes, i, n: F32,
    few="two-chunks",
    of_tokens=("hidden", "targets", "mask", "eighths"),
    batch_case=None,  # the loss is one number of the whole batch
)
OPERATORS = [ADALN, GATED, MASKED_LOSS]
