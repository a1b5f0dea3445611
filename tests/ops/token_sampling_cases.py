"""Cases of sample_tokens and lm_head_sample for the harness, and how their results are compared.

Draws are compared one by one. Two backends' exponentials differ in the last bits, so a draw may fall on the other side
of a boundary of the cumulative distribution, or top-p's cut on the other side of a token: `explain` shows that it does.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff import ops
from fastdiff.kernels.common import philox
from fastdiff.kernels.token_sampling import reference
from ops.harness import BF16, F16, F32, Case, Dtypes, Inputs, Operator

NEAR = 2e-6  # of the whole probability: how far from a boundary a draw may be that falls on its other side


def _randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _logits(shape: tuple[int, ...], scale: float = 3.0, layout: str = "plain", seed: int = 0):
    """layout: "plain", "strided" (a slice of longer rows and a wider vocabulary), "unaligned", "ties" (few values)."""

    def make(dtypes: Dtypes, device: str) -> Tensor:
        if layout == "strided":
            wide = (shape[0], shape[1] + 2, shape[2] + 3)
            return (_randn(wide, seed) * scale).to(device, dtypes.stream)[:, 1:-1, 2:-1]
        values = _randn(shape, seed) * scale
        if layout == "ties":
            values = values.round()
        flat = torch.cat([torch.zeros(1), values.flatten()]).to(device, dtypes.stream)
        return flat[1:].view(shape) if layout == "unaligned" else flat[1:].view(shape).clone()

    return make


def _sample_cases() -> list[Case]:
    cases = []

    def add(name, shape, scale=3.0, layout="plain", rows_temperature=False, **settings):
        logits = _logits(shape, scale, layout, seed=len(cases))

        def make(dtypes: Dtypes, device: str) -> Inputs:
            inputs: Inputs = {"logits": logits(dtypes, device), "seed": 11, "step": 3, **settings}
            if rows_temperature:
                rows = torch.arange(shape[0] * shape[1], device=device).view(shape[:2])
                inputs["temperature"] = torch.tensor([0.0, 0.3, 1.0, 1.7], device=device)[rows % 4]
            return inputs

        cases.append(Case(name, make))

    for vocab in (1, 5, 127, 1023, 1024, 1025, 5000):
        add(f"vocab{vocab}-greedy", (2, 3, vocab))
        add(f"vocab{vocab}", (2, 3, vocab), temperature=1.0)
        add(f"vocab{vocab}-filters", (2, 3, vocab), temperature=0.7, top_k=40, top_p=0.8)
    add("large", (1, 4, 20000), temperature=1.0)
    add("large-top_k", (1, 4, 20000), temperature=1.3, top_k=300)
    add("large-top_p", (1, 4, 20000), scale=1.0, temperature=1.0, top_p=0.9)
    add("large-top_p-peaked", (1, 4, 20000), scale=6.0, temperature=0.8, top_p=0.95)
    add("large-filters", (1, 4, 20000), scale=1.0, temperature=1.0, top_k=9000, top_p=0.5)
    add("ties-greedy", (2, 3, 700), layout="ties", scale=1.0)
    add("ties-filters", (2, 3, 700), layout="ties", scale=1.0, temperature=1.0, top_k=30, top_p=0.9)
    add("peaked", (2, 3, 3000), scale=20.0, temperature=1.0)
    add("strided", (2, 3, 1500), layout="strided", rows_temperature=True)
    add("unaligned", (2, 3, 1501), layout="unaligned", rows_temperature=True)
    add(
        "suppressed", (2, 3, 1500), temperature=1.0, suppress_tokens=(0, 1, 700, 1023, 1024, 1499), end_token_ids=(0, 5)
    )
    add("end", (2, 3, 1500), scale=6.0, temperature=0.5, end_token_ids=(3, 1499, 7), top_p=0.9)
    add("no-rows", (2, 0, 50), temperature=1.0)
    add("many-rows", (3, 64, 300), temperature=1.0, end_token_ids=(7, 8))
    add("batch", (3, 5, 2000), rows_temperature=True, top_k=50)
    return cases


def _rows_of(inputs: Inputs, logits: Tensor) -> dict:
    batch, length, vocab = logits.shape
    temperature = inputs.get("temperature", 0.0)
    temperature = temperature.double() if isinstance(temperature, Tensor) else torch.tensor(temperature).double()
    suppress, end = inputs.get("suppress_tokens"), inputs.get("end_token_ids")
    ids = torch.arange(batch)[:, None].expand(batch, length), torch.arange(length).expand(batch, length)
    ids = [inputs.get(n, d).expand(batch, length) for n, d in zip(("sequence_ids", "positions"), ids, strict=True)]
    return {
        "logits": logits.reshape(-1, vocab),
        "temperature": temperature.expand(batch, length).reshape(-1),
        "top_k": inputs.get("top_k") or 0,
        "top_p": inputs.get("top_p") or 1.0,
        "suppress_tokens": None if suppress is None else torch.tensor(suppress),
        "end_token_ids": None if end is None else torch.tensor(end),
        "seed": torch.tensor(inputs["seed"]),
        "step": torch.tensor(inputs["step"]),
        "sequence_ids": ids[0].reshape(-1),
        "positions": ids[1].reshape(-1),
    }


def _exact(inputs: Inputs, logits: Tensor) -> tuple[Tensor, ...]:
    """`sample_tokens` of the reference on [B, L, V], with or without end_log_prob as the public function gives it."""
    results = reference.sample_tokens(**_rows_of(inputs, logits))
    results = results if inputs.get("end_token_ids") is not None else results[:4]
    return tuple(t.view(logits.shape[:2]) for t in results)


def explain(rows: dict, row: int, token: int, near: float) -> None:
    """Asserts that a token which differs from the reference's lies across a boundary that the draw is next to."""
    z = rows["logits"][row].double().clone()
    if rows["suppress_tokens"] is not None:
        z[rows["suppress_tokens"]] = -torch.inf
    temperature = rows["temperature"][row]
    assert temperature > 0, "greedy choices have no boundary"
    weights = ((z - z.max()) / temperature).exp()
    threshold = reference.keep_threshold(z[None], weights[None], rows["top_k"], rows["top_p"])[0, 0]
    ids = [rows[name][row : row + 1] for name in ("sequence_ids", "positions")]
    words = philox.philox(rows["seed"], *ids, rows["step"], philox.DRAW_TOKEN)
    u = philox.uniform53(words)[0]
    # The cut, and the cuts next to it where top_p falls within `near` of their mass.
    values = z[torch.isfinite(z)].unique()
    base = weights.sum() if not rows["top_k"] else weights[z >= z.topk(min(rows["top_k"], len(z))).values[-1]].sum()
    place = int((values == threshold).nonzero()) if bool((values == threshold).any()) else 0
    for cut in values[max(place - 1, 0) : place + 2]:
        if cut != threshold and abs(weights[z >= torch.maximum(cut, threshold)].sum() / base - rows["top_p"]) > near:
            continue
        kept = torch.where(z >= cut, weights, 0.0)
        cumulative = kept.cumsum(0) / kept.sum()
        low = cumulative[token - 1] if token else torch.zeros(())
        if kept[token] > 0 and low - near <= u <= cumulative[token] + near:
            return
    raise AssertionError(f"row {row}: token {token} is not next to the draw {u.item():.9f}")


def compare_samples(results, exact, rows: dict, relative: float, absolute: float, near: float = NEAR) -> None:
    """Tokens one by one; statistics to |error| <= relative · |exact| + absolute, log_prob where tokens are equal.

    A certain row's log_prob and entropy are small and keep their digits, hence the relative term.
    """
    token, expected = results[0].flatten().cpu(), exact[0].flatten()
    for row in (token != expected).nonzero()[:, 0].tolist():
        explain(rows, row, int(token[row]), near)
    same = token == expected
    for i, (result, truth) in enumerate(zip(results[1:], exact[1:], strict=True)):
        result, truth = result.flatten().double().cpu(), truth.flatten()
        if i == 0:
            result, truth = result[same], truth[same]
        bad = (result - truth).abs() > relative * truth.abs() + absolute
        assert not bad.any(), f"result {i + 1}: {result[bad][:3]} for {truth[bad][:3]}"


def _compare_logits(results, exact, inputs: Inputs, tolerance: float) -> None:
    compare_samples(results, exact, _rows_of(inputs, inputs["logits"]), tolerance, 1e-8)


def _compare_head(results, exact, inputs: Inputs, tolerance: float) -> None:
    logits = functional.linear(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    compare_samples(results, exact, _rows_of(inputs, logits), tolerance, 1e-5, near=1e-4)


def _head_cases() -> list[Case]:
    cases = []

    def add(name, rows, dim, vocab, bias=False, **settings):
        number = len(cases)

        def make(dtypes: Dtypes, device: str) -> Inputs:
            inputs: Inputs = {"seed": 5, "step": 0, **settings}
            inputs["hidden"] = _randn((*rows, dim), 2 * number).to(device, dtypes.stream)
            inputs["weight"] = (_randn((vocab, dim), 2 * number + 1) * (4 / dim**0.5)).to(device, dtypes.stream)
            if bias:
                inputs["bias"] = _randn((vocab,), number).to(device, dtypes.stream)
            return inputs

        cases.append(Case(name, make))

    for vocab in (1, 5, 1023, 2048, 2049, 5000):
        add(f"vocab{vocab}-greedy", (2, 3), 24, vocab, bias=True)
        add(f"vocab{vocab}", (2, 3), 24, vocab, temperature=1.0, end_token_ids=(0, vocab - 1))
    add("dim1", (1, 4), 1, 300, temperature=1.0)
    add("dim77", (1, 4), 77, 3000, bias=True, temperature=0.6, suppress_tokens=(0, 128, 2999), end_token_ids=(5,))
    add("filters", (2, 3), 24, 3000, temperature=1.0, top_k=100, top_p=0.9, end_token_ids=(5,))
    add("no-rows", (0, 3), 24, 50)
    add("many-rows", (3, 64), 16, 300, temperature=1.0)
    add("batch", (3, 5), 24, 1500, bias=True, temperature=1.0)
    return cases


def _tuple(sample: ops.TokenSample) -> tuple[Tensor, ...]:
    return sample if sample.end_log_prob is not None else sample[:4]


def _dtype(dtypes: Dtypes, index: int, count: int) -> torch.dtype:
    return torch.int64 if index == 0 else F32


def _second(inputs: Inputs) -> Inputs:
    length = next(v for k, v in inputs.items() if k in ("logits", "hidden")).shape[1]
    cut = {k: v[1:2] for k, v in inputs.items() if k in ("logits", "hidden", "temperature") and isinstance(v, Tensor)}
    device = next(v.device for v in inputs.values() if isinstance(v, Tensor))
    ids = {"sequence_ids": torch.ones(1, length, dtype=torch.int64, device=device)}
    return inputs | cut | ids


def _shorten(inputs: Inputs, length: int) -> Inputs:
    return {k: v[:, :length].contiguous() if k in ("logits", "hidden") else v for k, v in inputs.items()}


_COMMON = {
    "result_dtype": _dtype,
    "differentiable": False,
    "many": "many-rows",
    "lengths": (60, 40, 33),
    "shorten": _shorten,
    "batch": "batch",
    "second": _second,
}
SAMPLE = Operator(
    "sample_tokens",
    lambda logits, **kw: _tuple(ops.sample_tokens(logits, **kw)),
    lambda **kw: _exact(kw, kw["logits"]),
    _sample_cases(),
    tolerance={F32: 1e-6, BF16: 1e-6, F16: 1e-6},
    dtypes=[Dtypes(F32, F32), Dtypes(BF16, BF16), Dtypes(F16, F16)],
    compare=_compare_logits,
    **_COMMON,
)
HEAD = Operator(
    "lm_head_sample",
    lambda hidden, weight, bias=None, **kw: _tuple(ops.lm_head_sample(hidden, weight, bias, **kw)),
    lambda **kw: _exact(kw, functional.linear(kw["hidden"], kw["weight"], kw.get("bias"))),
    _head_cases(),
    tolerance={F32: 1e-5},
    dtypes=[Dtypes(F32, F32)],  # logits are rounded to 16-bit dtypes: compared in test_token_sampling.py
    compare=_compare_head,
    # torch's product gives a row other last bits in another batch: compared in test_token_sampling.py
    **(_COMMON | {"batch": None}),
)
