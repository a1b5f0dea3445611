"""The loss of masked diffusion language models: LM head and cross entropy of masked rows alone, in chunks.

Mathematics, rounding and what was measured: kernels/masked_linear_cross_entropy/README.md. That gradients can be made
in the forward pass, so that logits never lie whole in memory, is known from Liger Kernel (Hsu et al. 2024) and Cut
Cross-Entropy (Wijmans et al. 2024); masked rows, their weights and suppressed ids are what the loss of MDLM (Sahoo et
al. 2024) and LLaDA (Nie et al. 2025) adds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.masked_linear_cross_entropy import reference
from fastdiff.ops._checks import (
    autocast_dtype,
    check_floats,
    check_head,
    check_integers,
    choose_backend,
    distinct,
    token_ids,
    transformed,
    wants_grad,
)
from fastdiff.ops._masked_linear_cross_entropy_backends import IMPLEMENTATIONS, OPERATOR


def masked_linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # int64 [...]
    mask: Tensor,  # bool [...]
    *,
    bias: Tensor | None = None,  # [V]
    row_weight: Tensor | None = None,  # [...] or what broadcasts to it
    suppress_tokens: Sequence[int] | Tensor | None = (),
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [], [...]
    """The sum of row_weight · cross entropy over masked rows, from hidden states and the head's weight.

    A row's loss is −(1 − ε)·log p[target] − ε·mean of log p over the allowed ids, p = softmax(hidden · weightᵀ + bias)
    over the ids that are not suppressed, ε = label_smoothing, in nats. Rows that are not masked cost nothing. Gradients
    are made with the loss, where they are wanted, so that the backward pass only scales them.

    Args:
        hidden: last hidden states, any leading shape and strides. float32, bfloat16 or float16 (float64 through the
            reference).
        weight, bias: the head, in hidden's dtype; under autocast all are cast as F.linear casts them.
        targets: the ids before masking; rows that are not masked may hold anything (-100, say).
        mask: True where a row takes part.
        row_weight: a factor per row, such as 1/t; it gets no gradient.
        suppress_tokens: ids that leave the distribution (the mask token); the targets of masked rows may not be among
            them.
        label_smoothing: a number in [0, 1).

    Returns:
        (loss, row_loss): a float32 number, to be divided by the normaliser of your choice, and each row's loss in
        float32 (both float64 for float64), without row_weight and without gradient, 0 where a row is not masked.
        Without masked rows the loss is 0 and so are its gradients, which have the dtypes of hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, value or device does not fit; the message names it. The
            target of a masked row outside the vocabulary or suppressed is named on the CPU; on a GPU, where looking
            would wait for the device, and under torch.compile, that row's loss is NaN, and so is the sum.
        BackendError: the backend that was asked for cannot run.
    """
    suppressed = _check(hidden, weight, bias, targets, mask, row_weight, suppress_tokens, label_smoothing)
    dtype = autocast_dtype(hidden)
    backend = choose_backend(OPERATOR, hidden.device.type, (dtype, dtype))
    rows = hidden.to(dtype).reshape(-1, hidden.shape[-1])
    targets, mask = targets.reshape(-1), mask.reshape(-1)
    if row_weight is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        row_weight = row_weight.detach().to(wide).expand(hidden.shape[:-1]).reshape(-1)
    numbers = (targets, mask, row_weight, suppressed, float(label_smoothing))
    needs = tuple(wants_grad(t) for t in (rows, weight, bias))
    if backend == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            head = (weight.to(dtype), None if bias is None else bias.to(dtype))
            loss, row_loss = reference.masked_linear_cross_entropy(rows, *head, *numbers)
    elif any(needs):
        loss, row_loss = _MaskedLinearCrossEntropy.apply(backend, needs, *distinct((rows, weight, bias)), *numbers)
    else:
        loss, row_loss, *_ = _run(backend, needs, rows, weight, bias, *numbers)
    return loss, row_loss.view(hidden.shape[:-1])


def cross_entropy_from_logits(
    logits: Tensor,  # [R, V]
    targets: Tensor,  # int64 [R]
    *,
    row_weight: Tensor | None = None,  # [R]
    suppress_tokens: Sequence[int] | Tensor | None = (),
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # [], [R]
    """`masked_linear_cross_entropy` of rows that all count, whose logits are there already; in plain PyTorch.

    For heads that are more than a weight and a bias (`fastdiff.nn.LanguageModelHead`). Raises as that does.
    """
    check_floats("logits", logits, 1)
    rows, vocab = torch.ones_like(targets, dtype=torch.bool), logits.shape[-1]
    suppressed = _check_rows(logits, vocab, targets, rows, row_weight, suppress_tokens, label_smoothing)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = reference.row_losses(logits.to(wide), targets, suppressed, float(label_smoothing))
    weighted = losses if row_weight is None else losses * row_weight.detach().to(wide)
    return weighted.sum(), losses.detach()


class _MaskedLinearCrossEntropy(torch.autograd.Function):
    """Saves gradients, not logits.

    The first backward pass hands them out, scaled in place, so that there is never a second copy of the weight's. Where
    the graph is kept for another pass, that one makes them again.
    """

    @staticmethod
    def forward(ctx, backend, needs, *operands):
        loss, row_loss, *grads = _run(backend, needs, *operands)
        ctx.compiled = torch.compiler.is_compiling()
        if ctx.compiled:
            ctx.save_for_backward(*grads)
        else:
            *tensors, ctx.label_smoothing = operands
            ctx.save_for_backward(*tensors)
            ctx.backend, ctx.grads = backend, grads
        ctx.needs = needs
        ctx.mark_non_differentiable(row_loss)
        return loss, row_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grads = list(ctx.saved_tensors) if ctx.compiled else _take_gradients(ctx)
        for i, need in enumerate(ctx.needs):
            if not need:
                grads[i] = None
            elif ctx.compiled:
                grads[i] = grads[i] * grad_loss.to(grads[i].dtype)
            elif grad_loss.device.type != "cpu" or grad_loss.item() != 1:  # on a GPU looking would wait
                grads[i].mul_(grad_loss)
        return None, None, *grads, None, None, None, None, None


def _run(backend, needs, hidden, weight, bias, *numbers) -> tuple[Tensor, ...]:
    """loss, row_loss and the gradients in the dtypes of hidden, weight and bias."""
    head = (weight.detach().to(hidden.dtype), None if bias is None else bias.detach().to(hidden.dtype))
    loss, row_loss, *grads, grad_bias = IMPLEMENTATIONS[backend](hidden.detach(), *head, *numbers, *needs, weight.dtype)
    return loss, row_loss, *grads, grad_bias if bias is None else grad_bias.to(bias.dtype)


def _take_gradients(ctx) -> list[Tensor]:
    """The gradients, of which ctx keeps nothing: then what they are added to takes their memory over."""
    tensors = ctx.saved_tensors  # raises where the graph was freed, or one of them has been written to since
    grads, ctx.grads = ctx.grads, None
    return list(_run(ctx.backend, ctx.needs, *tensors, ctx.label_smoothing)[2:]) if grads is None else grads


def _check(hidden, weight, bias, targets, mask, row_weight, suppress_tokens, label_smoothing) -> Tensor | None:
    """Raises for whatever does not fit; returns the suppressed ids as a tensor."""
    check_floats("hidden", hidden, 1)
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}; expected at least one number in the last dimension")
    check_head(hidden, weight, bias)
    return _check_rows(hidden, weight.shape[0], targets, mask, row_weight, suppress_tokens, label_smoothing)


def _check_rows(hidden, vocab, targets, mask, row_weight, suppress_tokens, label_smoothing) -> Tensor | None:
    lead = hidden.shape[:-1]
    check_integers("targets", targets, hidden.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"mask: got {given}; expected a bool torch.Tensor, True where a row takes part")
    for name, t in (("targets", targets), ("mask", mask)):
        if t.shape != lead:
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected hidden's without its last, {list(lead)}")
    if row_weight is not None:
        check_floats("row_weight", row_weight, 0)
        if not _broadcasts(row_weight.shape, lead):
            raise ValueError(
                f"row_weight: got shape {list(row_weight.shape)}; expected what broadcasts to {list(lead)}"
            )
    for name, t in (("mask", mask), ("row_weight", row_weight)):
        if t is not None and t.device != hidden.device:
            raise ValueError(
                f"{name}: got one on {t.device}, hidden on {hidden.device}; expected one device: move one of them"
            )
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}; expected a number in [0, 1)")
    suppressed = token_ids("suppress_tokens", suppress_tokens, vocab, hidden.device)
    if suppressed is not None and suppressed.numel() >= vocab:
        raise ValueError(f"suppress_tokens: got all {vocab} ids of the vocabulary; leave at least one")
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed():
        _check_targets(targets, mask, vocab, suppressed)
    return suppressed


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _check_targets(targets: Tensor, mask: Tensor, vocab: int, suppressed: Tensor | None) -> None:
    wrong = (targets < 0) | (targets >= vocab)
    reason = f"expected an id from 0 to {vocab - 1}"
    if suppressed is not None and not bool((wrong & mask).any()):
        wrong, reason = torch.isin(targets, suppressed), "an id that suppress_tokens names (probability 0)"
    wrong = (wrong & mask).nonzero()
    if wrong.shape[0]:
        row = tuple(wrong[0].tolist())
        raise ValueError(f"targets{list(row)}: got {int(targets[row])} in a masked row; {reason}")
