"""The masked loss between its matrix products: chunks of rows, logits and their gradient in one buffer.

torch makes the products (on the CPU by tiles: csrc/tiled_product_cpu.cpp), a backend the rows, in place:

    cross_entropy_rows_(logits [C, V], targets, row_weight, suppress_tokens, label_smoothing, want_grad) -> row_loss [C]

The whole is one opaque operator a backend, so that torch.compile sees no loop, and no number of masked rows:

    fastdiff_masked_linear_cross_entropy::{native,triton}(hidden [R, D], weight [V, D], bias, targets, mask, row_weight,
        suppress_tokens, label_smoothing, need_hidden, need_weight, need_bias, weight_grad_dtype)
        -> loss [], row_loss [R], grad_hidden [R, D], grad_weight [V, D], grad_bias [V]

hidden, weight and bias have one dtype, that of the products. What is not needed is an empty tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import tuning
from fastdiff.ops import _native
from fastdiff.ops._register import register_backends, register_fake

OPERATOR = "masked_linear_cross_entropy"
IMPLEMENTATIONS: dict[str, Callable] = {}
ROWS_SCHEMA = (
    "(Tensor(a!) logits, Tensor targets, Tensor? row_weight, Tensor? suppress_tokens, float label_smoothing,"
    " bool want_grad) -> Tensor"
)
_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor mask, Tensor? row_weight,"
    " Tensor? suppress_tokens, float label_smoothing, bool need_hidden, bool need_weight, bool need_bias,"
    " ScalarType weight_grad_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@dataclass(frozen=True)
class Plan:
    """How the work is cut. Results must not depend on the machine's load or threads: of these numbers only `rows` may
    be measured, and a run keeps what was measured when it began.
    """

    rows: int  # of logits at a time: where nothing is measured; see `_chunk_rows`
    # At most so many ids, or features of hidden's gradient, that one thread multiplies at a time (CPU); what was found
    # is in kernels/masked_linear_cross_entropy/README.md
    tile: int
    feature_tile: int
    part: int  # ids of the weight's gradient that are made at a time where they are added up in another dtype

    @staticmethod
    def of(device: str) -> "Plan":
        return Plan(rows=512 if device == "cpu" else 1024, tile=512, feature_tile=128, part=1 << 13)


_CHUNKS = (256, 512, 1024)  # rows of logits at a time that are tried on a CPU
_MOST_BYTES = 1 << 26  # of a chunk's logits, where it is larger than by default

# So many chunks may add to a 16-bit gradient in its own dtype; beyond that the sum is kept in fp32. See README.md.
MAX_ADDITIONS = 4


def _chunk_rows(rows_kernel: Callable[..., Tensor], hidden: Tensor, weight: Tensor, count: int, rows: int) -> int:
    """Rows of logits at a time: a choice of `fastdiff.tuning` on a CPU, by dtype and features (next power of two)."""
    if hidden.device.type != "cpu" or count <= _CHUNKS[0]:
        return rows
    dim, name = 1 << max(weight.shape[1] - 1, 0).bit_length(), str(hidden.dtype).removeprefix("torch.")
    key = f"masked loss {name}, {dim} features"
    chosen = tuning.decide(key, rows, lambda: _measure_chunks(rows_kernel, hidden.dtype, min(dim, 512)), _CHUNKS)
    return chosen if chosen * weight.shape[0] * hidden.element_size() <= _MOST_BYTES else min(chosen, rows)


def _measure_chunks(rows_kernel: Callable[..., Tensor], dtype: torch.dtype, dim: int) -> tuning.Measured:
    source, count, vocab = torch.Generator().manual_seed(0), _CHUNKS[-1], 2048
    options = {"generator": source, "dtype": torch.float32, "device": "cpu"}
    hidden, weight = (torch.randn(size, dim, **options).to(dtype) for size in (count, vocab))
    targets = torch.arange(count, device="cpu")
    mask = torch.ones(count, dtype=torch.bool, device="cpu")
    rest = (None, targets, mask, None, None, 0.0, True, True, False, torch.float32)
    trials = {
        str(rows): lambda rows=rows: loss_and_gradients(rows_kernel, hidden, weight, *rest, rows=rows)
        for rows in _CHUNKS
    }
    with torch.no_grad():
        found = tuning.fastest(trials, default="512", seconds=0.2)
    return tuning.Measured(int(found.chosen), {f"{name} rows": each for name, each in found.seconds.items()})


def _parts(size: int, at_most: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of parts as equal as can be."""
    count = max(-(-size // at_most), 1)
    for k in range(count):
        yield size * k // count, size * (k + 1) // count


def _add_product_(
    out: Tensor,  # [M, N]
    a: Tensor,  # [M, K]
    b: Tensor,  # [K, N], N large
    *,
    tile: int,
    plus: Tensor | None = None,  # [N] instead of out
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """out = beta · out + alpha · a · b; on the CPU by tiles of columns, each the product of one thread.

    tile: at most so many columns; fewer where that leaves less than four tiles of 16 columns or more.
    """
    if out.device.type == "cpu" and _native.cpu_missing is None:
        tile = min(tile, max(out.shape[1] // 64 * 16, 16))
        torch.ops.fastdiff.tiled_addmm_(out, plus, a, b, beta, alpha, tile)
    else:
        torch.addmm(out if plus is None else plus, a, b, beta=beta, alpha=alpha, out=out)


def _fp16_scale(weights: Tensor) -> float:
    """A power of two that brings the largest row weight into [2^13, 2^14).

    Logits' gradients are at most a row's weight and mostly far below it: so scaled they use fp16's range.
    """
    largest = weights.abs().max().item()
    if not 0 < largest < float("inf"):
        return 1.0
    return 2.0 ** (14 - torch.frexp(torch.tensor(largest, dtype=torch.float64))[1].item())


class _WeightGradient:
    """Σ over chunks of Gᵀ · hidden, rounded once to the gradient's dtype where there are many."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, chunks: int, plan: Plan):
        vocab, dim = weight.shape
        own = dtype if dtype == weight.dtype and chunks <= MAX_ADDITIONS else torch.float32
        self.sum = weight.new_empty(vocab, dim, dtype=own)
        self.part = weight.new_empty(0 if own == weight.dtype else min(plan.part, vocab), dim)
        self.dtype, self.plan, self.first = dtype, plan, True

    def add(self, grad: Tensor, hidden: Tensor, alpha: float) -> None:  # [C, V], [C, D]
        options = {"tile": self.plan.tile, "alpha": alpha}
        if self.part.shape[0] == 0:
            _add_product_(self.sum.t(), hidden.t(), grad, beta=0.0 if self.first else 1.0, **options)
        else:
            for a in range(0, grad.shape[1], self.part.shape[0]):
                columns, total = grad[:, a : a + self.part.shape[0]], self.sum[a : a + self.part.shape[0]]
                part = self.part[: total.shape[0]]
                _add_product_(part.t(), hidden.t(), columns, **options)
                if self.first:
                    total.copy_(part)
                else:
                    total.add_(part)
        self.first = False

    def result(self) -> Tensor:
        return self.sum.zero_().to(self.dtype) if self.first else self.sum.to(self.dtype)


def loss_and_gradients(
    rows_kernel: Callable[..., Tensor],
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # int64 [R]
    mask: Tensor,  # bool [R]
    row_weight: Tensor | None,  # fp32 [R]
    suppress_tokens: Tensor | None,  # int64 [S], ascending
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_grad_dtype: torch.dtype,
    rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], row_loss [R] and the gradients of the loss, those that are needed.

    `rows` of logits are made at a time; None is what was measured, or `Plan`'s.
    """
    plan = Plan.of(hidden.device.type)
    any_grad = need_hidden or need_weight or need_bias
    index = mask.nonzero()[:, 0]  # on a GPU this waits for the device: the number of rows sets what is launched
    count, vocab = index.shape[0], weight.shape[0]
    weights = None if row_weight is None else row_weight[index]
    scale = 1.0
    if any_grad and count and hidden.dtype == torch.float16:
        weights = hidden.new_ones(count, dtype=torch.float32) if weights is None else weights
        scale = _fp16_scale(weights)
    rows = _chunk_rows(rows_kernel, hidden, weight, count, plan.rows) if rows is None else rows
    chunks = list(_parts(count, rows)) if count else []

    row_loss = hidden.new_zeros(mask.shape[0], dtype=torch.float32)
    loss = hidden.new_zeros((), dtype=torch.float64)
    grad_hidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    grad_weight = _WeightGradient(weight, weight_grad_dtype, len(chunks), plan) if need_weight else None
    grad_bias = hidden.new_zeros(vocab if need_bias else 0, dtype=torch.float32)
    buffer = hidden.new_empty(max((b - a for a, b in chunks), default=0), vocab)
    for a, b in chunks:
        these, logits = index[a:b], buffer[: b - a]
        h = hidden[these]
        _add_product_(logits, h, weight.t(), tile=plan.tile, plus=bias, beta=0.0 if bias is None else 1.0)
        w = None if weights is None else weights[a:b]
        factors = w if scale == 1 else w * scale
        row_loss[these] = losses = rows_kernel(
            logits, targets[these], factors, suppress_tokens, label_smoothing, any_grad
        )
        loss += (losses.double() if w is None else losses.double() * w).sum()
        if grad_weight is not None:
            grad_weight.add(logits, h, 1 / scale)
        if need_hidden:  # h has served
            _add_product_(h, logits, weight, tile=plan.feature_tile, alpha=1 / scale)
            grad_hidden[these] = h
        if need_bias:
            grad_bias.add_(logits.sum(0, dtype=torch.float32), alpha=1 / scale)
    weight_result = hidden.new_empty(0, dtype=weight_grad_dtype) if grad_weight is None else grad_weight.result()
    return loss.float(), row_loss, grad_hidden, weight_result, grad_bias


def _implementation(rows_kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(hidden: Tensor, *rest) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return loss_and_gradients(rows_kernel, hidden, *rest)

    return run


def _fake(
    hidden, weight, bias, targets, mask, row_weight, suppress_tokens, label_smoothing, need_hidden, need_weight,
    need_bias, weight_grad_dtype,
):  # fmt: skip
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(mask.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=weight_grad_dtype),
        hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=torch.float32),
    )


def _fake_rows(logits, targets, row_weight, suppress_tokens, label_smoothing, want_grad):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _triton_rows(*args) -> Tensor:
    from fastdiff.kernels.masked_linear_cross_entropy import triton_kernels  # imports Triton, at the first call

    return triton_kernels.cross_entropy_rows_(*args)


# Kept alive for the life of the process: operators vanish with their Library object.
_library = torch.library.Library("fastdiff_masked_linear_cross_entropy", "DEF")


def _define(name: str, rows_kernel: Callable[..., Tensor]) -> Callable:
    _library.define(name + _SCHEMA)
    _library.impl(name, _implementation(rows_kernel), "CompositeExplicitAutograd")
    register_fake(f"fastdiff_masked_linear_cross_entropy::{name}", _fake, lib=_library)
    return getattr(torch.ops.fastdiff_masked_linear_cross_entropy, name).default


if _native.cpu_missing is None:
    register_fake("fastdiff::cross_entropy_rows_", _fake_rows)
    register_fake("fastdiff::tiled_addmm_", lambda out, plus, a, b, beta, alpha, tile: None)
    IMPLEMENTATIONS["cpu"] = IMPLEMENTATIONS["cuda"] = _define("native", torch.ops.fastdiff.cross_entropy_rows_.default)
if _native.triton_missing is None:
    IMPLEMENTATIONS["triton"] = _define("triton", _triton_rows)
register_backends(OPERATOR)
