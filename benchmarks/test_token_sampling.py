"""Token sampling against the public steps: whole vocabularies, top-p, the fused head, its memory.

Every case first compares its own results with float64, and fails where they are wrong. `make bench` runs this file with
FASTDIFF_BENCH_ALLOCATOR=default: whoever decodes with public code has the C library's own settings, under which the
gigabytes that a step in float64 allocates are mapped anew each time.
"""

import masked_lm_baselines as public
import measure
import memory
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff import ops, use_backend

F32, BF16 = torch.float32, torch.bfloat16
NAMES = {F32: "f32", BF16: "bf16"}
ROWS, VOCAB = 256, 126464  # LLaDA's vocabulary
HEAD_ROWS, DIM, HEAD_VOCAB = 64, 768, 50257  # GPT-2's head
READING_SHARE = {F32: 1 / 1.3, BF16: 1 / 2}  # of the speed of a sum of all logits
PRODUCT_SHARE = {F32: 1 / 1.1, BF16: 1 / 1.4}  # of the bare product's speed

on_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(measure.DEVICE, dtype)


def check(sample: ops.TokenSample, logits: Tensor, rows: int = 16, **settings) -> None:
    """Raises where a few rows are not what float64 gives (a draw in 2 000 may fall across a boundary)."""
    with use_backend("reference"):
        exact = ops.sample_tokens(logits[:rows], **settings)
    wrong = (sample.token[:rows] != exact.token).sum().item()
    same = sample.token[:rows] == exact.token
    error = (sample.log_prob[:rows] - exact.log_prob)[same].abs().max().item()
    if wrong > 1 or not error <= 1e-4:
        raise AssertionError(f"fastdiff's result is wrong ({wrong} tokens, error {error:.3g}): no speed-up is reported")


@on_dtype
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sample_tokens(temperature, dtype, benchmark, report):
    logits = randn(ROWS, VOCAB, dtype=dtype)
    settings = {"temperature": temperature, "seed": 1}
    check(ops.sample_tokens(logits, **settings), logits, **settings)
    contenders = {
        "fastdiff": lambda: ops.sample_tokens(logits, **settings),
        "llada": lambda: public.llada_sample(logits, temperature),
        "reading": lambda: logits.sum(),
    }
    if temperature == 0:
        fused = torch.compile(public.softmax_sample, fullgraph=True)
        contenders |= {"softmax": lambda: public.softmax_sample(logits), "compile": lambda: fused(logits)}
    seconds = measure.in_turns(benchmark, contenders, rounds=7)
    case = f"sample_tokens T={temperature:g} {NAMES[dtype]} [{ROWS}, {VOCAB}]"
    report(measure.speed_row(case, seconds, {"llada": 50.0 if temperature == 0 else 200.0}))
    share = {"fastdiff": seconds["reading"] / seconds["fastdiff"]}
    report(measure.Row(case, "of reading the logits once", share, targets={"fastdiff": READING_SHARE[dtype]}))


@on_dtype
@pytest.mark.parametrize(("kind", "scale"), [("flat", 1.0), ("peaked", 5.0)])
def test_top_p(kind, scale, dtype, benchmark, report):
    logits = randn(ROWS, VOCAB, dtype=dtype) * scale
    settings = {"temperature": 1.0, "seed": 1}
    check(ops.sample_tokens(logits, top_p=0.9, **settings), logits, top_p=0.9, **settings)
    few = logits[: ROWS // 16]  # sorting takes that long
    contenders = {
        "fastdiff": lambda: ops.sample_tokens(logits, top_p=0.9, **settings),
        "plain": lambda: ops.sample_tokens(logits, **settings),
        "top_k=50": lambda: ops.sample_tokens(logits, top_k=50, **settings),
        "dream": lambda: public.dream_sample(few, 1.0, 0.9),
    }
    seconds = measure.in_turns(benchmark, contenders, rounds=7)
    seconds["dream"] *= 16
    case = f"sample_tokens top-p 0.9 {kind} {NAMES[dtype]} [{ROWS}, {VOCAB}]"
    report(measure.speed_row(case, seconds, {}))
    share = {"fastdiff": seconds["plain"] / seconds["fastdiff"]}
    report(measure.Row(case, "of plain", share, targets={"fastdiff": 1 / 3}))


@on_dtype
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lm_head_sample(temperature, dtype, benchmark, report):
    hidden = randn(HEAD_ROWS, DIM, dtype=dtype)
    weight = randn(HEAD_VOCAB, DIM, dtype=dtype, seed=1) / DIM**0.5
    settings = {"temperature": temperature, "seed": 1}
    if dtype == F32:  # in bf16 the logits themselves round
        check(ops.lm_head_sample(hidden, weight, **settings), F.linear(hidden, weight), **settings)
    contenders = {
        "fastdiff": lambda: ops.lm_head_sample(hidden, weight, **settings),
        "product": lambda: F.linear(hidden, weight),
        "product, then llada": lambda: public.llada_sample(F.linear(hidden, weight), temperature),
        "product, then sample_tokens": lambda: ops.sample_tokens(F.linear(hidden, weight), **settings),
    }
    seconds = measure.in_turns(benchmark, contenders, rounds=15)
    case = f"lm_head_sample T={temperature:g} {NAMES[dtype]} [{HEAD_ROWS}, {DIM}] x [{HEAD_VOCAB}, {DIM}]"
    report(measure.speed_row(case, seconds, {}))
    share = {"fastdiff": seconds["product"] / seconds["fastdiff"]}
    report(measure.Row(case, "of the product", share, targets={"fastdiff": PRODUCT_SHARE[dtype]}))


@on_dtype
def test_lm_head_memory(dtype, benchmark, report):
    if measure.DEVICE != "cpu":
        pytest.skip("measured by the operating system, for CPU memory")
    # the product's own buffers, the code it compiles for these shapes, and our code's pages are there before
    setup = (
        f"h = torch.randn({HEAD_ROWS}, {DIM}).to({dtype}); w = torch.randn({HEAD_VOCAB}, {DIM}).to({dtype}); "
        f"[torch.nn.functional.linear(h, w[-n:]) for n in (2048, {HEAD_VOCAB % 2048})]; "
        "fastdiff.ops.lm_head_sample(h, w[:3000], temperature=1.0, seed=1)"
    )
    ours = benchmark.pedantic(
        lambda: memory.peak_bytes(setup, "fastdiff.ops.lm_head_sample(h, w, temperature=1.0, seed=1)", measure.THREADS),
        rounds=1,
    )
    plain = memory.peak_bytes(setup, "torch.nn.functional.linear(h, w)", measure.THREADS)
    logits = HEAD_ROWS * HEAD_VOCAB * dtype.itemsize
    values = {"fastdiff": ours / logits, "product": plain / logits}
    case = f"lm_head_sample T=1 {NAMES[dtype]} peak memory ({logits / 2**20:.1f} MiB of logits)"
    report(measure.Row(case, "of the logits' memory", values, targets={"fastdiff": 0.1}))
