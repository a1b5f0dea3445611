"""Cases of eos_log_prob and eos_log_prob_from_logits for the harness, and how their results are compared."""

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.kernels.eos_log_prob import reference
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator


def _randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ids(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The two lists that the reference takes."""
    end, suppressed = set(inputs["end_token_ids"]), set(inputs.get("suppress_tokens", ()))
    return torch.tensor(sorted(end)), torch.tensor(sorted(end | suppressed))


def compare(results, exact, inputs: Inputs, tolerance: float) -> None:
    """One by one, in relative terms: near 0 and far below it all digits count; a head's logits have their own error."""
    result, truth = results[0].double().cpu(), exact[0]
    absolute = 0.0 if "logits" in inputs else 1e-5  # seen: 3.3e-6, from the products' order of sums
    same = (result == truth) | (result.isnan() & truth.isnan())
    bad = ((result - truth).abs() > tolerance * truth.abs() + absolute) & ~same
    assert not bad.any(), f"{result[bad][:3]} for {truth[bad][:3]}"


def _logits_cases() -> list[Case]:
    cases = []

    def add(name, shape, end, scale=3.0, layout="plain", **settings):
        seed = len(cases)

        def make(dtypes: Dtypes, device: str) -> Inputs:
            if layout == "strided":
                wide = (shape[0], shape[1] + 2, shape[2] + 3)
                logits = (_randn(wide, seed) * scale).to(device, dtypes.stream)[:, 1:-1, 2:-1]
            else:
                flat = torch.cat([torch.zeros(1), (_randn(shape, seed) * scale).flatten()]).to(device, dtypes.stream)
                logits = flat[1:].view(shape) if layout == "unaligned" else flat[1:].view(shape).clone()
            return {"logits": logits, "end_token_ids": end, **settings}

        cases.append(Case(name, make))

    add("one-id", (2, 3, 1), (0,))  # it is the end: 0
    for vocab in (5, 127, 1023, 1024, 1025, 5000):
        add(f"vocab{vocab}", (2, 3, vocab), (vocab - 1,))
        add(f"vocab{vocab}-several", (2, 3, vocab), (0, vocab // 2, vocab - 2), suppress_tokens=(1, vocab - 1))
    add("every-id-is-an-end", (2, 3, 1300), tuple(range(1300)))
    add("all-but-one-suppressed", (2, 3, 1030), (1029,), suppress_tokens=tuple(range(1028)))
    add("peaked", (4, 7, 3000), (5, 2999), scale=20.0)
    add("flat", (1, 4, 20000), (7,), scale=0.1)
    add("far-apart", (4, 7, 3000), (5, 2999), scale=3000.0)
    add("strided", (2, 3, 1500), (0, 1499), layout="strided")
    add("unaligned", (2, 3, 1501), (0, 1500), layout="unaligned")
    add("no-rows", (2, 0, 50), (3,))
    add("no-batch", (0, 2, 50), (3,))
    add("many-rows", (3, 64, 300), (7, 8))
    add("batch", (3, 5, 2000), (1999, 3), suppress_tokens=(4,))
    return cases


def _head_cases() -> list[Case]:
    cases = []

    def add(name, lead, dim, vocab, end, bias=False, stride=1, **settings):
        seed = 3 * len(cases)

        def make(dtypes: Dtypes, device: str) -> Inputs:
            weight = _randn((vocab, dim), seed + 1) * (4 / dim**0.5)
            return {
                "hidden": _randn((*lead, dim * stride), seed).to(device, dtypes.stream)[..., ::stride],
                "weight": weight.to(device, dtypes.stream),
                "bias": _randn((vocab,), seed + 2).to(device, dtypes.stream) if bias else None,
                "end_token_ids": end,
                **settings,
            }

        cases.append(Case(name, make))

    for vocab in (1, 5, 1023, 1024, 2049, 5000):
        add(f"vocab{vocab}", (2, 3), 24, vocab, (vocab - 1,))
    add("several", (2, 3), 24, 3000, (2999, 0, 1500), bias=True, suppress_tokens=(1, 1024))
    add("dim1", (1, 4), 1, 300, (7,))
    add("dim77", (1, 4), 77, 3000, (5, 2048), bias=True, suppress_tokens=(0, 128, 2999))
    add("strided", (2, 3), 24, 300, (7,), bias=True, stride=2)
    add("no-rows", (0, 3), 24, 50, (7,))
    add("one-row", (1, 1), 24, 3000, (7,))
    add("many-rows", (3, 200), 16, 1300, (7, 1299))  # more than a tile holds
    return cases


def _second(inputs: Inputs) -> Inputs:
    return inputs | {"logits": inputs["logits"][1:2]}


def _shorten(inputs: Inputs, length: int) -> Inputs:
    return {k: v[:, :length].contiguous() if k in ("logits", "hidden") else v for k, v in inputs.items()}


_COMMON = {
    "result_dtype": lambda dtypes, i, n: F32,
    "differentiable": False,
    "compare": compare,
    "many": "many-rows",
    "lengths": (60, 40, 33),
    "shorten": _shorten,
}
EOS_LOGITS = Operator(
    "eos_log_prob_from_logits",
    lambda logits, **kw: (ops.eos_log_prob_from_logits(logits, **kw),),
    lambda **kw: (reference.eos_log_prob_from_logits(kw["logits"], *_ids(kw)),),
    _logits_cases(),
    tolerance={F32: 2e-7, BF16: 2e-7, F16: 2e-7},  # seen: 6.9e-8
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16)],
    batch="batch",
    second=_second,
    **_COMMON,
)
EOS_HEAD = Operator(
    "eos_log_prob",
    lambda hidden, weight, **kw: (ops.eos_log_prob(hidden, weight, **kw),),
    lambda **kw: (reference.eos_log_prob(kw["hidden"], kw["weight"], kw["bias"], *_ids(kw)),),
    _head_cases(),
    tolerance={F32: 1e-6},
    dtypes=[Dtypes(F32, F32)],  # logits are rounded to 16-bit dtypes: compared in test_eos_log_prob.py
    batch=None,  # torch's product gives a row other last bits in another batch
    **_COMMON,
)
