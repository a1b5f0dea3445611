"""eos_log_prob against eager PyTorch, torch.compile and the bare product: GPT-2's head on whole windows, its memory.

Every case first compares its own results with float64, and fails where they are wrong.
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
LENGTH, DIM, VOCAB = 256, 768, 50257  # a probing window of GPT-2's width and vocabulary
END = (50256, 50255)  # the end of the text, and a padding token

on_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
on_batch = pytest.mark.parametrize("batch", [1, 4])


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(measure.DEVICE, dtype)


def check(result: Tensor, logits: Tensor, tolerance: float) -> None:
    """Raises where the first positions are not what float64 gives."""
    with use_backend("reference"):
        exact = ops.eos_log_prob_from_logits(logits[:, :16], END)
    error = (result[:, :16] - exact).abs().max().item()
    if not error <= tolerance:
        raise AssertionError(f"fastdiff's result is wrong (error {error:.3g}): no speed-up is reported")


@on_dtype
@on_batch
def test_eos_log_prob(batch, dtype, benchmark, report):
    hidden = randn(batch, LENGTH, DIM, dtype=dtype)
    weight = randn(VOCAB, DIM, dtype=dtype, seed=1) / DIM**0.5
    # in bf16 two products may round a logit apart, by 2^-7 of its size
    check(ops.eos_log_prob(hidden, weight, END), F.linear(hidden, weight), 1e-4 if dtype == F32 else 0.1)

    def eager() -> Tensor:
        return public.end_log_prob(F.linear(hidden, weight), END)

    fused = torch.compile(public.end_log_prob, fullgraph=True)
    contenders = {
        "fastdiff": lambda: ops.eos_log_prob(hidden, weight, END),
        "product": lambda: F.linear(hidden, weight),
        "eager": eager,
        "compile": lambda: fused(F.linear(hidden, weight), END),
        "lm_head_sample": lambda: ops.lm_head_sample(hidden, weight, end_token_ids=END),
    }
    seconds = measure.in_turns(benchmark, contenders, rounds=15 if batch == 1 else 7)
    case = f"eos_log_prob {NAMES[dtype]} [{batch}, {LENGTH}, {DIM}] x [{VOCAB}, {DIM}]"
    report(measure.speed_row(case, seconds, {}))
    share = {"fastdiff": seconds["product"] / seconds["fastdiff"]}
    report(measure.Row(case, "of the product", share, targets={"fastdiff": 1 / 1.1} if dtype == F32 else {}))


@on_dtype
def test_from_logits(dtype, benchmark, report):
    logits = randn(1, LENGTH, VOCAB, dtype=dtype)
    check(ops.eos_log_prob_from_logits(logits, END), logits, 1e-5)
    fused = torch.compile(public.end_log_prob, fullgraph=True)
    contenders = {
        "fastdiff": lambda: ops.eos_log_prob_from_logits(logits, END),
        "reading": lambda: logits.sum(),
        "eager": lambda: public.end_log_prob(logits, END),
        "compile": lambda: fused(logits, END),
    }
    seconds = measure.in_turns(benchmark, contenders, rounds=15)
    case = f"eos_log_prob_from_logits {NAMES[dtype]} [1, {LENGTH}, {VOCAB}]"
    report(measure.speed_row(case, seconds, {}))
    report(measure.Row(case, "of reading", {"fastdiff": seconds["reading"] / seconds["fastdiff"]}))


@on_dtype
@on_batch
def test_memory(batch, dtype, benchmark, report):
    if measure.DEVICE != "cpu":
        pytest.skip("measured by the operating system, for CPU memory")
    # the product's own buffers, the code it compiles for these shapes, and our code's pages are there before
    setup = (
        f"h = torch.randn({batch}, {LENGTH}, {DIM}).to({dtype}); w = torch.randn({VOCAB}, {DIM}).to({dtype}); "
        f"[torch.nn.functional.linear(h, w[-n:]) for n in (1024, {VOCAB % 1024})]; "
        f"fastdiff.ops.eos_log_prob(h, w[:3000], 7)"
    )
    eager = f"torch.nn.functional.linear(h, w).float().log_softmax(-1)[..., list({END})].logsumexp(-1)"
    ours = benchmark.pedantic(
        lambda: memory.peak_bytes(setup, f"fastdiff.ops.eos_log_prob(h, w, {END})", measure.THREADS), rounds=1
    )
    logits = batch * LENGTH * VOCAB * dtype.itemsize
    values = {"fastdiff": ours / logits}
    values |= {"eager": memory.peak_bytes(setup, eager, measure.THREADS) / logits}
    case = f"eos_log_prob {NAMES[dtype]} [{batch}, {LENGTH}] peak memory ({logits / 2**20:.1f} MiB of logits)"
    report(measure.Row(case, "of the logits' memory", values, targets={"fastdiff": 0.1}))
