"""The Triton row kernel of the masked loss against fp64, in Triton's interpreter.

Run by test_triton_interpreted.py in a process with TRITON_INTERPRET=1; by hand:
TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_masked_linear_cross_entropy.py
"""

import pytest
import torch
from torch import Tensor

from fastdiff.kernels.masked_linear_cross_entropy import triton_kernels as kernels
from ops.triton_interpreter import programs, shuffled

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Ratios of norms; the largest seen: 5.7e-8 (losses), 4e-8, 2.1e-3, 3.1e-4 (gradients in fp32, bf16, fp16).
LOSS_TOLERANCE = 1.2e-7
GRADIENT_TOLERANCE = {F32: 1.2e-7, BF16: 3e-3, F16: 4e-4}


def make(rows: int, vocab: int, dtype=F32, suppress=None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets that are allowed, row weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    allowed = torch.ones(vocab, dtype=torch.bool)
    if suppress is not None:
        allowed[suppress] = False
    ids = allowed.nonzero()[:, 0]
    targets = ids[torch.randint(0, len(ids), (rows,), generator=generator)]
    return logits.to(dtype), targets, torch.rand(rows, generator=generator)


def exact(logits, targets, row_weight, suppress, smoothing) -> tuple[Tensor, Tensor]:
    """Loss and gradient by the definition, in fp64."""
    leaf = logits.double().requires_grad_()
    z, allowed = leaf, torch.ones(logits.shape[1], dtype=torch.bool)
    if suppress is not None:
        z, allowed = z.index_fill(-1, suppress, -torch.inf), allowed.index_fill(0, suppress, False)
    log_p = z.log_softmax(-1)
    loss = -(1 - smoothing) * log_p.gather(-1, targets[:, None])[:, 0]
    if smoothing:
        loss = loss - smoothing * log_p[:, allowed].mean(-1)
    weight = torch.ones(len(targets)) if row_weight is None else row_weight
    return loss.detach(), torch.autograd.grad((loss * weight.double()).sum(), leaf)[0]


def check(logits, targets, row_weight=None, suppress=None, smoothing=0.0) -> tuple[Tensor, Tensor]:
    truth = exact(logits, targets, row_weight, suppress, smoothing)
    gradient = logits.clone()
    loss = kernels.cross_entropy_rows_(gradient, targets, row_weight, suppress, smoothing, True)
    assert loss.dtype == F32 and (loss - truth[0]).norm() <= LOSS_TOLERANCE * truth[0].norm()
    assert (gradient - truth[1]).norm() <= GRADIENT_TOLERANCE[logits.dtype] * truth[1].norm()
    untouched = logits.clone()
    assert torch.equal(kernels.cross_entropy_rows_(untouched, targets, row_weight, suppress, smoothing, False), loss)
    assert torch.equal(untouched, logits)
    if suppress is not None:
        assert not gradient[:, suppress].any()
    return loss, gradient


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("vocab", [1, 5, 300, 5000])  # 5000: in two tiles
def test_vocabularies_and_options(vocab, dtype):
    check(*make(3, vocab, dtype)[:2])
    suppress = torch.tensor([0, 3]) if vocab > 4 else None
    check(*make(3, vocab, dtype, suppress), suppress, 0.1)
    check(*make(3, vocab, dtype, suppress), suppress)
    check(*make(3, vocab, dtype), smoothing=0.5)


def test_near_certain_rows_keep_their_digits():
    logits = torch.zeros(4, 2000)
    targets = torch.tensor([0, 7, 1999, 7])
    gaps = torch.tensor([10.0, 20.0, 40.0, 80.0])
    logits[torch.arange(4), targets] = gaps
    gradient = logits.clone()
    loss = kernels.cross_entropy_rows_(gradient, targets, None, None, 0.0, True)
    truth = torch.log1p(1999 * (-gaps.double()).exp())  # to the last digit, where log_softmax in fp64 has few left
    torch.testing.assert_close(loss.double(), truth, rtol=2e-7, atol=0)
    at_target = gradient[torch.arange(4), targets].double()
    torch.testing.assert_close(at_target, torch.expm1(-truth), rtol=2e-7, atol=0)
    assert (gradient.sum(-1).abs() <= 1e-5 * at_target.abs()).all(), "a row of the gradient sums to 0"


def test_large_logits():
    logits, targets, weight = make(3, 700)
    check(logits + 1e4, targets, weight, None, 0.1)
    check(logits * 50, targets, weight)


def test_ids_of_probability_0():
    logits, targets, weight = make(3, 50)
    logits[:, 20:] = -torch.inf
    targets[:] = torch.tensor([0, 1, 30])
    gradient = logits.clone()
    loss = kernels.cross_entropy_rows_(gradient, targets, weight, None, 0.0, True)
    truth = exact(logits[:2], targets[:2], weight[:2], None, 0.0)
    torch.testing.assert_close(loss[:2].double(), truth[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:2].double(), truth[1], rtol=1e-5, atol=1e-8)
    assert loss[2] == torch.inf and gradient.isfinite().all() and gradient[2, 30] == -weight[2]
    smooth = kernels.cross_entropy_rows_(logits.clone(), targets, None, None, 0.1, True)
    assert (smooth == torch.inf).all(), "label smoothing wants a share of every id"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_without_a_loss_are_nan(smoothing):
    suppress = torch.tensor([3, 4])
    logits, targets, _ = make(8, 40, suppress=suppress)
    targets[0], targets[1], targets[2] = 3, 40, -100
    logits[3] = -torch.inf
    logits[4, 7], logits[5, 7] = torch.nan, torch.inf
    logits[6, 3] = torch.nan  # suppressed ids may hold anything
    gradient = logits.clone()
    loss = kernels.cross_entropy_rows_(gradient, targets, None, suppress, smoothing, True)
    assert loss.isnan().tolist() == [True] * 6 + [False] * 2
    allowed = torch.ones(40, dtype=torch.bool).index_fill(0, suppress, False)
    assert gradient[:6, allowed].isnan().all() and gradient[6:].isfinite().all() and not gradient[:, suppress].any()


def test_a_row_alone_and_in_any_order_of_programs():
    logits, targets, weight = make(4, 5000, BF16)
    loss, gradient = check(logits, targets, weight, None, 0.1)
    alone = check(logits[2:3], targets[2:3], weight[2:3], None, 0.1)
    assert torch.equal(alone[0], loss[2:3]) and torch.equal(alone[1], gradient[2:3])
    with programs(shuffled(seed=1)):
        other = check(logits, targets, weight, None, 0.1)
    assert torch.equal(other[0], loss) and torch.equal(other[1], gradient)


def test_no_rows_and_too_many():
    assert kernels.cross_entropy_rows_(
        torch.empty(0, 9), torch.empty(0, dtype=torch.int64), None, None, 0.0, True
    ).shape == (0,)
    huge = torch.empty(2**31, 5, device="meta")
    with pytest.raises(ValueError, match="logits: 2147483648 x 5; the triton backend takes at most"):
        kernels.cross_entropy_rows_(huge, huge[:, 0], None, None, 0.0, True)


def test_logits_beyond_2_to_31_elements(monkeypatch):
    """The last program alone, on logits of 4 GB of which nothing else is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rows, vocab = 2**21 + 8, 1024
    logits = torch.empty(rows, vocab, dtype=BF16)
    last, target, _ = make(1, vocab, BF16)
    logits[-1] = last[0]
    with programs(lambda grid: [(grid[0] - 1, 0, 0)]):
        loss = kernels.cross_entropy_rows_(logits, target.expand(rows).contiguous(), None, None, 0.0, True)
    truth = exact(last, target, None, None, 0.0)
    assert (loss[-1] - truth[0]).abs() <= LOSS_TOLERANCE * truth[0].abs()
    assert (logits[-1:] - truth[1]).norm() <= GRADIENT_TOLERANCE[BF16] * truth[1].norm()
