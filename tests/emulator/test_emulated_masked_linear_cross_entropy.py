"""The CUDA row kernel of the masked loss, executed on the CPU, against the reference in float64.

Every case runs under three schedules of threads and blocks, which must agree to the bit.
"""

import ctypes

import pytest
import torch
from torch import Tensor

from emulator import DTYPES, SCHEDULES, Emulator
from fastdiff.kernels.masked_linear_cross_entropy import reference

_P, _I = ctypes.c_void_p, ctypes.c_int64
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Ratios of norms of the gradient; seen on x86-64 with gcc 12: 9.6e-8, 2.3e-3, 3.0e-4. Losses in relative terms: 1.6e-7.
ROUNDING = {F32: 4e-7, BF16: 5e-3, F16: 8e-4}
LOSS = 5e-7


class CrossEntropyParams(ctypes.Structure):
    _fields_ = [
        ("logits", _P),
        *((name, _I) for name in ("row_stride", "rows", "vocab")),
        *((name, _P) for name in ("targets", "row_weight", "suppress")),
        ("suppress_count", _I),
        ("row_loss", _P),
        ("label_smoothing", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("want_grad", ctypes.c_bool),
    ]


def launch(
    emulator: Emulator,
    logits: Tensor,  # [R, V], written where a gradient is wanted
    targets: Tensor,
    row_weight: Tensor | None = None,
    suppress: Tensor | None = None,
    label_smoothing: float = 0.0,
    want_grad: bool = True,
) -> Tensor:
    assert ctypes.sizeof(CrossEntropyParams) == emulator.lib.fd_size_of_cross_entropy_params()
    row_loss = torch.full((logits.shape[0],), float("nan"))
    p = CrossEntropyParams(
        logits=logits.data_ptr(), row_stride=logits.stride(0), rows=logits.shape[0], vocab=logits.shape[1],
        targets=targets.data_ptr(), row_weight=None if row_weight is None else row_weight.data_ptr(),
        suppress=None if suppress is None else suppress.data_ptr(),
        suppress_count=0 if suppress is None else suppress.numel(), row_loss=row_loss.data_ptr(),
        label_smoothing=label_smoothing, dtype=DTYPES[logits.dtype], want_grad=want_grad,
    )  # fmt: skip
    emulator.check(emulator.lib.fd_cross_entropy(ctypes.byref(p)))
    return row_loss


def under_schedules(emulator: Emulator, logits: Tensor, *args) -> tuple[Tensor, Tensor]:
    """row_loss and the gradient, which must be the same under every schedule."""
    results = []
    for schedule in SCHEDULES:
        emulator.configure(schedule, max_grid=2)
        grad = logits.clone()
        results.append((launch(emulator, grad, *args), grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "depends on the order of threads or blocks"
    return results[0]


def exact(logits, targets, row_weight, suppress, label_smoothing) -> tuple[Tensor, Tensor]:
    z = logits.double().requires_grad_()
    losses = reference.row_losses(z, targets, suppress, label_smoothing)
    weight = 1.0 if row_weight is None else row_weight.double()
    return losses.detach(), torch.autograd.grad((losses * weight).sum(), z)[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("suppressed", [False, True], ids=["all ids", "suppressed"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("vocab", [1, 5, 67, 1009, 5003, 8192])
def test_against_the_reference(emulator, vocab, dtype, suppressed, label_smoothing):
    g = torch.Generator().manual_seed(vocab)
    rows = 5
    logits = (4 * torch.randn(rows, vocab, generator=g)).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    suppress = None
    if suppressed:
        free = [i for i in range(vocab) if i not in targets.tolist()]
        if not free:
            return  # nothing can be suppressed
        suppress = torch.tensor(sorted({free[0], free[-1], free[len(free) // 2]}))
    row_weight = torch.tensor([1.0, 0.0, 2.5, 0.25, 1.0])
    loss, grad = under_schedules(emulator, logits, targets, row_weight, suppress, label_smoothing)
    true_loss, true_grad = exact(logits, targets, row_weight, suppress, label_smoothing)
    torch.testing.assert_close(loss.double(), true_loss, rtol=LOSS, atol=LOSS)
    assert (grad.double() - true_grad).norm() <= ROUNDING[dtype] * true_grad.norm() + 1e-7
    if suppressed:
        assert not grad[:, suppress].any()


@pytest.mark.parametrize("offset", range(4))
def test_rows_may_start_anywhere(emulator, offset):
    g = torch.Generator().manual_seed(offset)
    memory = torch.randn(4 * 643 + 8, generator=g)
    logits = memory[offset : offset + 4 * 643].view(4, 643)[:, :641]  # rows apart, each at another alignment
    targets = torch.tensor([0, 1, 320, 640])
    true_loss, true_grad = exact(logits, targets, None, None, 0.0)
    before = memory.clone()
    loss = launch(emulator, logits, targets)
    torch.testing.assert_close(loss.double(), true_loss, rtol=LOSS, atol=0)
    assert (logits.double() - true_grad).norm() <= ROUNDING[F32] * true_grad.norm()
    outside = torch.ones_like(memory, dtype=torch.bool)
    outside[offset : offset + 4 * 643].view(4, 643)[:, :641] = False
    assert torch.equal(memory[outside], before[outside]), "wrote outside its rows"


def test_near_certainty_is_accurate(emulator):
    vocab = 2051
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(4), torch.tensor([0, 700, 1500, 2050])] = torch.tensor([20.0, 25.0, 30.0, 40.0])
    targets = torch.tensor([0, 700, 1500, 2050])
    others = logits.double().scatter(1, targets[:, None], -torch.inf)
    truth = torch.log1p((others - logits.double().amax(1, keepdim=True)).exp().sum(1))
    grad = logits.clone()
    loss = launch(emulator, grad, targets)
    torch.testing.assert_close(loss.double(), truth, rtol=LOSS, atol=0)
    at_target = grad.gather(1, targets[:, None])[:, 0].double()  # p − 1 = −(1 − e^−loss)
    torch.testing.assert_close(at_target, torch.expm1(-truth), rtol=LOSS, atol=0)


def test_without_gradient_nothing_is_written(emulator):
    logits = torch.randn(3, 131)
    before = logits.clone()
    loss = launch(emulator, logits, torch.tensor([1, 2, 3]), want_grad=False)
    torch.testing.assert_close(loss.double(), exact(before, torch.tensor([1, 2, 3]), None, None, 0.0)[0])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("target", [-100, -1, 9, 2**40, 4])
def test_targets_that_are_no_allowed_id_give_nan_and_touch_nothing_else(emulator, target):
    logits = torch.randn(3, 9)
    targets, suppress = torch.tensor([1, target, 2]), torch.tensor([4])
    loss, grad = under_schedules(emulator, logits, targets, None, suppress, 0.0)
    assert loss[1].isnan() and loss[[0, 2]].isfinite().all()
    assert grad[1, [0, 1, 2, 3, 5, 6, 7, 8]].isnan().all() and grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_without_a_distribution_give_nan(emulator, value):
    logits = torch.randn(3, 70)
    logits[1] = value
    loss, grad = under_schedules(emulator, logits, torch.tensor([1, 2, 3]), None, None, 0.0)
    assert loss[1].isnan() and grad[1].isnan().all()
    assert loss[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()


def test_an_allowed_id_at_minus_infinity(emulator):
    logits = torch.randn(2, 70)
    logits[:, 3] = -torch.inf
    for smoothing in (0.0, 0.1):
        loss = launch(emulator, logits.clone(), torch.tensor([1, 2]), None, torch.tensor([5]), smoothing)
        torch.testing.assert_close(
            loss.double(), exact(logits, torch.tensor([1, 2]), None, torch.tensor([5]), smoothing)[0]
        )


def test_refused(emulator):
    targets = torch.tensor([0])
    for logits in (torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 0)):
        with pytest.raises(ValueError, match="cudaError 1"):
            launch(emulator, logits, targets)
    with pytest.raises(ValueError, match="cudaError 1"):  # every id suppressed
        launch(emulator, torch.zeros(1, 2), targets, None, torch.tensor([0, 1]))
    launch(emulator, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
