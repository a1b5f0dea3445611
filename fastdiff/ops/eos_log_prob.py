"""How likely each position is to hold an end token: from hidden states and the head, or from logits.

Mathematics, accuracy and bytes: kernels/eos_log_prob/README.md. What the numbers say of the length of an answer depends
on how the model was trained to end a text: fastdiff.generation.length reads them.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from fastdiff.backends import select
from fastdiff.kernels.eos_log_prob import reference
from fastdiff.ops._checks import autocast, check_floats, check_head, end_and_excluded_ids
from fastdiff.ops._eos_log_prob_backends import IMPLEMENTATIONS


def eos_log_prob(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    end_token_ids: int | Sequence[int] | Tensor,
    bias: Tensor | None = None,  # [V]
    *,
    suppress_tokens: Sequence[int] | Tensor | None = (),
) -> Tensor:  # [...]
    """log P(x_i is one of end_token_ids) at every position i, in nats; the logits never lie whole in memory.

    With p = softmax(hidden · weightᵀ + bias) over the ids that are not suppressed, a tile of the vocabulary at a time:
    log of the sum of p over end_token_ids. End tokens and the others are added up apart, so that positions that almost
    certainly hold one keep their digits (log(1 − 1e-9) is −1e-9), and so do those that almost certainly do not.

    Args:
        hidden: the last hidden states, `[B, L, D]` or any leading shape. float32, bfloat16, float16 (float64 through
            the reference).
        weight, bias: the head, in hidden's dtype (under autocast all are cast as F.linear casts them).
        end_token_ids: one id or several, each once, none of them suppressed. A tensor of ids is not looked at under
            torch.compile and in graph capture: there it must fit.
        suppress_tokens: ids that leave the distribution, their logits unread (the mask token, say).

    Returns:
        float32 (float64 for float64) of hidden's leading shape: 0 where nothing but end tokens can follow, -inf where
        they have no mass, NaN where a row has no distribution (all of its allowed logits are -inf, or one is NaN or
        +inf). No gradient flows through it, and nothing waits for the device.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, value or device does not fit; the message names it.
        BackendError: the backend that was asked for cannot run.
    """
    check_floats("hidden", hidden, 1)
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}; expected at least one number in the last dimension")
    check_head(hidden, weight, bias)
    vocab, dim = weight.shape
    ids = end_and_excluded_ids(end_token_ids, suppress_tokens, vocab, hidden.device)
    lead = hidden.shape[:-1]
    hidden, weight, bias = (None if t is None else t.detach() for t in autocast(hidden, weight, bias))
    backend = select("eos_log_prob", hidden.device.type, (hidden.dtype, weight.dtype))
    if backend == "reference":
        return reference.eos_log_prob(hidden, weight, bias, *ids)
    if weight.stride(-1) != 1 and dim > 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = hidden.reshape(*_batch_and_length(lead), dim).contiguous()
    return IMPLEMENTATIONS[backend].eos_log_prob(rows, weight, bias, *ids).view(lead)


def eos_log_prob_from_logits(
    logits: Tensor,  # [..., V]
    end_token_ids: int | Sequence[int] | Tensor,
    *,
    suppress_tokens: Sequence[int] | Tensor | None = (),
) -> Tensor:  # [...]
    """`eos_log_prob` where the logits are there already: one pass over them.

    Args:
        logits: `[B, L, V]` or any leading shape; the last dimension contiguous (else it is copied), other strides are
            taken as they are. float32, bfloat16, float16 (float64 through the reference).
        others: as in `eos_log_prob`.

    Returns:
        float32 (float64 for float64) of logits' leading shape, as `eos_log_prob`.

    Raises:
        as `eos_log_prob`.
    """
    check_floats("logits", logits, 1)
    vocab = logits.shape[-1]
    if vocab == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}; expected at least one id in the last dimension")
    ids = end_and_excluded_ids(end_token_ids, suppress_tokens, vocab, logits.device)
    lead, logits = logits.shape[:-1], logits.detach()
    backend = select("eos_log_prob_from_logits", logits.device.type, (logits.dtype,))
    if backend == "reference":
        return reference.eos_log_prob_from_logits(logits, *ids)
    if logits.stride(-1) != 1 and vocab > 1:
        logits = logits.contiguous()
    rows = logits.reshape(*_batch_and_length(lead), vocab)
    return IMPLEMENTATIONS[backend].eos_log_prob_from_logits(rows, *ids).view(lead)


def _batch_and_length(lead: Sequence[int]) -> tuple[int, int]:
    """Any leading shape as two dimensions, so that the strides of the usual one need no copy."""
    return lead[0] if lead else 1, math.prod(lead[1:])
