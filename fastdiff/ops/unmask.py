"""unmask_: commits the best of a masked diffusion LM's sampled tokens, in place, for all rows at once.

Contract, rules and orders: kernels/unmask/README.md. The rules are those of LLaDA (Nie et al. 2025, count),
Fast-dLLM (Wu et al. 2025, threshold and factor), the entropy-bounded sampler (Ben-Hamu et al. 2025, entropy_budget) and
MDLM (Sahoo et al. 2024, ancestral).
"""

import torch
from torch import Tensor

from fastdiff.backends import select
from fastdiff.kernels.unmask import reference
from fastdiff.ops._checks import counter
from fastdiff.ops._outputs import written
from fastdiff.ops._unmask_backends import IMPLEMENTATIONS
from fastdiff.ops.token_sampling import TokenSample

# The numbers are those of UnmaskRule and UnmaskOrder in kernels/unmask/unmask.h.
RULES = ("count", "threshold", "factor", "entropy_budget", "ancestral")
ORDERS = ("confidence", "margin", "entropy", "random")
_FLOATS = ("log_prob", "entropy", "margin")
_NUMBER_OF = {rule: "probability" if rule == "ancestral" else rule for rule in RULES}
_RULE_NUMBERS, _ORDER_NUMBERS = ({name: i for i, name in enumerate(names)} for names in (RULES, ORDERS))
_NUMBERS = {  # of each rule: whether a number will do, and which
    "count": (lambda n: n >= 1, "an int >= 1"),
    "threshold": (lambda n: 0 < n <= 1, "in (0, 1]"),
    "factor": (lambda n: n > 0, "> 0"),
    "entropy_budget": (lambda n: n >= 0, ">= 0 (nats)"),
    "probability": (lambda n: 0 <= n <= 1, "in [0, 1]"),
}


def unmask_(
    token_ids: Tensor,  # int64 [B, L] or [L], changed in place
    sample: TokenSample,  # token int64, log_prob, entropy, margin float32: [B, L], or [R] with rows
    mask_token_id: int,
    *,
    rule: str = "count",
    order: str = "confidence",
    count: int | Tensor | None = None,  # [B]
    threshold: float | Tensor | None = None,  # [B]
    factor: float | Tensor | None = None,  # [B]
    entropy_budget: float | Tensor | None = None,  # [B]
    probability: float | Tensor | None = None,  # [B]
    rows: Tensor | None = None,  # int64 [R]
    block_start: int | Tensor | None = None,  # int64 [B]
    block_end: int | Tensor | None = None,  # int64 [B]
    active: Tensor | None = None,  # bool [B]
    seed: int | Tensor | None = None,  # int64 []
    step: int | Tensor = 0,  # int64 []
    sequence_ids: Tensor | None = None,  # int64 [B]
) -> Tensor:  # int64 [B]
    """Writes the best sampled tokens over masks, and returns how many a row got.

    Candidates of row b are the positions in its block that hold `mask_token_id` and whose sampled token is neither that
    nor -1. Every active row that has candidates commits at least one (except under "ancestral"), by `rule`, the best
    first by `order`, ties to the lower position. Nothing synchronises with a GPU, so the call can be captured in a
    graph.

    Args:
        token_ids: int64 `[B, L]` with a contiguous last dimension, changed in place; `[L]` is one row.
        sample: what `sample_tokens` or `lm_head_sample` returned for these positions: token (int64), log_prob, entropy
            (nats) and margin (float32; float64 runs on the reference), `[B, L]`, or `[R]` where `rows` is given.
        mask_token_id: the id that stands for a mask; never committed. Put it in the sampler's `suppress_tokens` (which
            also checks it against the vocabulary), or a row whose model prefers it commits nothing, step after step.
        rule: "count" (the first `count`), "threshold" (each whose score is at least `threshold`), "factor" (the first
            while the score of the r-th, r = 0, 1, …, is above 1 - factor / (r + 2)), "entropy_budget" (the first while
            the entropies of those before sum to at most `entropy_budget`, in nats) or "ancestral" (each with
            `probability`). Where that is none, the first one; under "ancestral" none.
        order: "confidence" (score exp(log_prob)), "margin" (score margin), "entropy" (the lowest first, score
            exp(-entropy)) or "random" (a random score in [0, 1)).
        count, threshold, factor, entropy_budget, probability: the number of the chosen rule, and of no other: for all
            rows, or a tensor `[B]` or of one number (count: of integers), taken in float32. The values in a tensor are
            not checked (that would synchronise): where one asks for none, as a 0 of LLaDA's schedule, the row still
            commits its best (a probability of 0 commits none); `active` leaves a row out.
        rows: int64 `[R]`, the flat positions b·L + l of the sample's entries in any order; -1: no position. None twice
            (unchecked: one of the two is taken). For the draws of the whole batch, the sampler of compact rows is to be
            given `sequence_ids=rows // L, positions=rows % L`.
        block_start, block_end: the positions that may be committed, block_start ≤ l < block_end: int, or int64 `[B]`.
        active: bool `[B]`; rows where it is False are left alone.
        seed: seed of what is random, order "random" and rule "ancestral". An int or an int64 tensor of one element;
            None draws one from torch's generator. The same seed gives the same result on every backend, in every batch;
            it may be the sampler's, whose draws are others.
        step: which denoising step it is, so that each has random numbers of its own: an int below 2^32, or a tensor.
        sequence_ids: int64 `[B]`, names a row for its random numbers; b by default.
        Under torch.compile pass what changes from step to step (numbers, seed, step) as tensors: it compiles once.

    Returns:
        int64 `[B]` (`[1]` for a single row), how many positions were committed.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"token_ids: got a {type(token_ids).__name__}; expected an int64 torch.Tensor [B, L]")
    ids = token_ids.unsqueeze(0) if token_ids.ndim == 1 else token_ids
    _check_token_ids(token_ids, ids)
    batch, length = ids.shape
    number = _check_rule(rule, order, count, threshold, factor, entropy_budget, probability)
    if not isinstance(mask_token_id, int) or isinstance(mask_token_id, bool) or not 0 <= mask_token_id < 2**63:
        raise ValueError(f"mask_token_id: got {mask_token_id!r}; expected an int >= 0, the id that stands for a mask")
    fields = _check_sample(sample, token_ids, ids, rows)
    backend = select("unmask_", ids.device.type, (fields[1].dtype,))
    values, value = _per_row(_NUMBER_OF[rule], number, ids)
    start = None if block_start is None else _bound("block_start", block_start, ids)
    end = None if block_end is None else _bound("block_end", block_end, ids)
    if active is not None:
        _check_tensor("active", active, ids, torch.bool, (batch,))
        active = active.contiguous()
    if sequence_ids is not None:
        _check_tensor("sequence_ids", sequence_ids, ids, torch.int64, (batch,))
        sequence_ids = sequence_ids.contiguous()
    if seed is None:
        drawn = order == "random" or rule == "ancestral"
        seed = torch.randint(2**63 - 1, (), device=ids.device) if drawn else 0
    seeds, seed = counter("seed", seed, ids.device)
    steps, step = counter("step", step, ids.device, words=1)
    if batch == 0 or length == 0:
        return torch.zeros(batch, dtype=torch.int64, device=ids.device)
    args = (rows, start, end, active, _RULE_NUMBERS[rule], _ORDER_NUMBERS[order], values, value,
            mask_token_id, seeds, seed, steps, step, sequence_ids)  # fmt: skip
    if backend == "reference":
        return _reference(ids, *fields, *args)
    committed = IMPLEMENTATIONS[backend].unmask_(ids, *fields, *args)
    written(token_ids)
    return committed


def _check_token_ids(token_ids: Tensor, ids: Tensor) -> None:
    if ids.ndim != 2:
        raise ValueError(f"token_ids: got shape {list(token_ids.shape)}; expected [B, L] or [L]")
    if ids.dtype != torch.int64 or ids.layout != torch.strided:
        raise TypeError(f"token_ids: got {ids.dtype}, {ids.layout}; expected dense int64: it is changed in place")
    batch, length = ids.shape
    if (length > 1 and ids.stride(1) != 1) or (batch > 1 and ids.stride(0) < length):
        raise ValueError(
            f"token_ids: got strides {list(token_ids.stride())}; expected a contiguous last dimension and rows that do"
            " not overlap, as it is changed in place: call contiguous() and copy back"
        )


def _check_rule(rule, order, count, threshold, factor, entropy_budget, probability):
    """The number of the rule, checked where it is a Python number."""
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}; expected one of {', '.join(RULES)}")
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}; expected one of {', '.join(ORDERS)}")
    numbers = (count, threshold, factor, entropy_budget, probability)
    wanted, number = _NUMBER_OF[rule], numbers[_RULE_NUMBERS[rule]]
    if len([n for n in numbers if n is not None]) > (number is not None):
        name = next(name for n, name in zip(numbers, _NUMBERS, strict=True) if n is not None and name != wanted)
        raise ValueError(f"{name}: got one with rule {rule!r}; expected {wanted} alone: leave {name} out")
    if number is None:
        raise ValueError(f"{wanted}: got None; rule {rule!r} needs it: pass {wanted}=, a number or a tensor [B]")
    if not isinstance(number, Tensor):
        fits, expected = _NUMBERS[wanted]
        types = (int,) if rule == "count" else (int, float)
        if isinstance(number, bool) or not isinstance(number, types) or not fits(number):
            raise ValueError(f"{wanted}: got {number!r}; expected {expected}, or a tensor [B]")
    return number


def _check_tensor(name: str, t: Tensor, ids: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got a {type(t).__name__}; expected a torch.Tensor")
    if t.device != ids.device:
        raise ValueError(
            f"{name}: got one on {t.device}, token_ids on {ids.device}; expected one device: move one of them"
        )
    if t.dtype != dtype:
        raise TypeError(f"{name}: got {t.dtype}; expected {dtype}")
    if t.shape != shape:
        raise ValueError(f"{name}: got shape {list(t.shape)}; expected {list(shape)}")


def _check_sample(sample, token_ids: Tensor, ids: Tensor, rows: Tensor | None) -> list[Tensor]:
    """token, log_prob, entropy and margin, contiguous."""
    try:
        fields = [sample.token, sample.log_prob, sample.entropy, sample.margin]
    except AttributeError:
        raise TypeError(
            f"sample: got a {type(sample).__name__}; expected a TokenSample with token, log_prob, entropy and margin"
        ) from None
    shape = token_ids.shape
    if rows is not None:
        if isinstance(rows, Tensor) and rows.ndim != 1:
            raise ValueError(f"rows: got shape {list(rows.shape)}; expected [R], one position per entry of the sample")
        shape = rows.shape if isinstance(rows, Tensor) else shape
        _check_tensor("rows", rows, ids, torch.int64, shape)
        _check_positions(rows, ids)
    double = isinstance(fields[1], Tensor) and fields[1].dtype is torch.float64
    wanted, device = torch.int64, ids.device
    for i, t in enumerate(fields):
        if not (isinstance(t, Tensor) and t.dtype is wanted and t.shape == shape and t.device == device):
            _check_tensor(f"sample.{('token', *_FLOATS)[i]}", t, ids, wanted, shape)  # says which
        if t.requires_grad or not t.is_contiguous():
            fields[i] = t.detach().contiguous()
        wanted = torch.float64 if double else torch.float32
    return fields


def _check_positions(rows: Tensor, ids: Tensor) -> None:
    """On a GPU this would synchronise, and to torch.compile it is data; kernels skip what is out of range."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or rows.numel() == 0:
        return
    low, high = (int(t) for t in rows.aminmax())
    if low < -1 or high >= ids.numel():
        wrong = low if low < -1 else high
        raise ValueError(f"rows: got {wrong}; expected positions b * L + l in [0, {ids.numel()}), or -1 for none")


def _per_row(name: str, number, ids: Tensor) -> tuple[Tensor | None, float]:
    """(the rule's numbers [B] in float32, or None; its one number)"""
    if not isinstance(number, Tensor):
        return None, float(number)
    if number.dtype.is_complex or number.dtype == torch.bool:
        raise TypeError(f"{name}: got {number.dtype}; expected a tensor of numbers")
    if name == "count" and number.dtype.is_floating_point:
        raise TypeError(f"count: got {number.dtype}; expected a tensor of integers")
    if number.ndim == 0:
        number = number.expand(ids.shape[:1])
    _check_tensor(name, number, ids, number.dtype, ids.shape[:1])
    return number.detach().to(torch.float32).contiguous(), 0.0


def _bound(name: str, bound: int | Tensor | None, ids: Tensor) -> Tensor | None:
    if bound is None:
        return None
    if isinstance(bound, Tensor):
        _check_tensor(name, bound, ids, torch.int64, ids.shape[:1])
        return bound.contiguous()
    if isinstance(bound, bool) or not isinstance(bound, int) or not 0 <= bound < 2**63:
        raise ValueError(f"{name}: got {bound!r}; expected an int >= 0 or an int64 tensor [B]")
    return torch.full((ids.shape[0],), bound, dtype=torch.int64, device=ids.device)


def _reference(ids, token, log_prob, entropy, margin, rows, start, end, active, rule, order, values, value, mask,
               seeds, seed, steps, step, sequence_ids) -> Tensor:  # fmt: skip
    """The reference on the same arguments as the native operator."""
    batch, length = ids.shape

    def dense(t: Tensor, fill: float) -> Tensor:
        if rows is None:
            return t.view(ids.shape)
        inside = (rows >= 0) & (rows < batch * length)
        padded = t.new_full((batch * length + 1,), fill)
        return padded.scatter(0, torch.where(inside, rows, batch * length), t)[:-1].view(ids.shape)

    def filled(t: Tensor | None, number: float, dtype: torch.dtype) -> Tensor:
        return torch.full((batch,), number, dtype=dtype, device=ids.device) if t is None else t

    def scalar(t: Tensor | None, number: int) -> Tensor:
        return torch.tensor(number, device=ids.device) if t is None else t.reshape(())

    result, committed = reference.unmask(
        ids, dense(token, -1), *(dense(t, 0.0) for t in (log_prob, entropy, margin)),
        filled(start, 0, torch.int64), filled(end, length, torch.int64), filled(active, True, torch.bool),
        RULES[rule], ORDERS[order], filled(values, value, torch.float64), mask, scalar(seeds, seed),
        scalar(steps, step), torch.arange(batch, device=ids.device) if sequence_ids is None else sequence_ids,
    )  # fmt: skip
    ids.copy_(result)
    return committed
