"""Cases of masked_linear_cross_entropy for the harness."""

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.kernels.masked_linear_cross_entropy import reference
from ops.harness import F32, Case, Dtypes, Inputs, Operator


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _inputs(shape, vocab, bias=True, fraction=0.4, row_weight=True, suppress="", smoothing=0.0, stride=1):
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


def _cases() -> list[Case]:
    make = _inputs
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
        Case("two-chunks", make((2, 450, 64), 1031, fraction=0.8)),
        Case("many-chunks", make((3, 1100, 16), 101, fraction=0.9)),
    ]


def _run(**kw) -> tuple[Tensor]:
    eighths = kw.pop("eighths", None)
    suppress = tuple(int(i) for i in kw.pop("suppress", "").split())
    row_weight = None if eighths is None else eighths / 8
    return (ops.masked_linear_cross_entropy(**kw, row_weight=row_weight, suppress_tokens=suppress)[0],)


def _reference(hidden, weight, targets, mask, bias, eighths, suppress, label_smoothing) -> tuple[Tensor]:
    suppressed = torch.tensor([int(i) for i in suppress.split()]) if suppress else None
    row_weight = None if eighths is None else eighths.flatten() / 8
    rows = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.flatten(), mask.flatten(), row_weight)
    return reference.masked_linear_cross_entropy(*rows, suppressed, label_smoothing)[:1]


def _shorten(inputs: Inputs, length: int) -> Inputs:
    rows = ("hidden", "targets", "mask", "eighths")
    return {k: v[:, :length].contiguous() if k in rows else v for k, v in inputs.items()}


MASKED_LOSS = Operator(
    "masked_linear_cross_entropy",
    _run,
    _reference,
    _cases(),
    result_dtype=lambda dtypes, i, n: F32,
    many="two-chunks",
    lengths=(440, 400, 350),
    shorten=_shorten,
    batch=None,  # the loss is one number of the whole batch
)
