"""Drawing tokens for a step of a masked diffusion language model: from logits, or from hidden states and the head.

Mathematics, accuracy and bytes: kernels/token_sampling/README.md. The statistics are those by which LLaDA (Nie et al.
2025), Dream, MDLM (Sahoo et al. 2024) and Fast-dLLM choose what to unmask; exact inverse-CDF sampling takes the place
of their Gumbel noise in float64 (Zheng et al. 2024, arXiv 2409.02908, say what goes wrong with it in float32).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fastdiff.backends import select
from fastdiff.kernels.token_sampling import reference
from fastdiff.ops._checks import autocast, check_floats, check_head, check_integers, counter, token_ids
from fastdiff.ops._token_sampling_backends import IMPLEMENTATIONS

_LOGITS_AT_ONCE = 64 << 20  # bytes of logits that lm_head_sample makes at a time for top-k and top-p


class TokenSample(NamedTuple):
    """One drawn token a row, and how sure the model is; probabilities are at temperature 1, over the allowed ids.

    A row without a distribution has token -1 and NaN in the rest.
    """

    token: Tensor  # int64
    log_prob: Tensor  # log p[token], accurate near 0
    entropy: Tensor  # nats
    margin: Tensor  # p1 - p2 of the two likeliest tokens
    end_log_prob: Tensor | None = None  # log P(token is one of end_token_ids), where they were given


def sample_tokens(
    logits: Tensor,  # [..., V]
    *,
    temperature: float | Tensor = 0.0,  # a number, or [...]
    top_k: int | None = None,
    top_p: float | None = None,
    suppress_tokens: Sequence[int] | Tensor | None = None,
    end_token_ids: Sequence[int] | Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sequence_ids: Tensor | None = None,  # [B] or [...]
    positions: Tensor | None = None,  # [L] or [...]
    invalid: str = "raise",
) -> TokenSample:  # each [...]
    """Draws one token per row exactly, in one pass over the vocabulary, with its confidence, entropy and margin.

    Args:
        logits: `[R, V]`, `[B, L, V]` or any leading shape; the last dimension contiguous (else it is copied), other
            strides are taken as they are. float32, bfloat16, float16 (float64 through the reference).
        temperature: 0 takes the likeliest token (the lowest id on ties); a number, or a tensor of logits' leading shape
            (or one that broadcasts to it: `[B, 1]`).
        top_k: draw among the k likeliest (all that tie with the k-th); None or 0: off. After temperature.
        top_p: draw among the likeliest that together have at least this probability; None or 1: off. After top_k.
        suppress_tokens: ids that leave the distribution, their logits unread (the mask token, say). A tensor of ids is
            not looked at under torch.compile and in graph capture: there it must name each once.
        end_token_ids: ids whose joint probability is wanted: `end_log_prob` (-inf for an empty list).
        seed, step: what the random numbers are made from; ints, or int64 tensors of one number on logits' device (for
            graph capture). seed None takes one from torch's generator.
        sequence_ids, positions: what the random numbers belong to, int64 of logits' leading shape, or `[B]` and `[L]`;
            by default row r of `[R, V]` is sequence r at position 0, row (b, l) of `[B, L, V]` sequence b, position l.
            The same seed, step, sequence and position draw the same token from the same logits, alone and in any
            batch; on another backend up to 5 draws in 10 000 fall on the other side of a rounding boundary. The low 32
            bits of step, sequence and position count, all 64 of seed.
        invalid: what to do with a row that is all -inf, or has a NaN or +inf: "raise" (waits for the device), or "flag"
            (token -1, NaN statistics; for CUDA graphs).

    Returns:
        TokenSample of int64 and float32 tensors (float64 for float64 logits) of logits' leading shape. No gradient
        flows through any of them.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, value or device does not fit; the message names it.
        ValueError: `invalid="raise"` and a row has no distribution; the message names the row (under torch.compile a
            RuntimeError that does not).
        BackendError: the backend that was asked for cannot run.
    """
    check_floats("logits", logits, 1)
    vocab = logits.shape[-1]
    if vocab == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}; expected at least one id in the last dimension")
    call = _Call(
        logits, vocab, temperature, suppress_tokens, end_token_ids, seed, step, sequence_ids, positions, invalid
    )
    top_k, top_p = _check_filters(top_k, top_p)
    logits = logits.detach()  # a draw and its statistics have no gradient
    if logits.stride(-1) != 1 and vocab > 1:
        logits = logits.contiguous()
    rows = logits.reshape(call.batch, call.length, vocab)
    backend = select("sample_tokens", logits.device.type, (logits.dtype,))
    if backend == "reference":
        return call.finish(_reference_sample(rows, call, top_k, top_p))
    arguments = (rows, call.temperatures, call.temperature, top_k, top_p, *call.arguments())
    return call.finish(IMPLEMENTATIONS[backend].sample_tokens(*arguments))


def lm_head_sample(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    *,
    temperature: float | Tensor = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress_tokens: Sequence[int] | Tensor | None = None,
    end_token_ids: Sequence[int] | Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
    invalid: str = "raise",
) -> TokenSample:
    """`sample_tokens(F.linear(hidden, weight, bias))` without the logits in memory: a tile of the vocabulary at a time.

    Args:
        hidden: `[R, D]`, `[B, L, D]` or any leading shape: the last hidden states of the rows to draw for (the masked
            ones, gathered: other rows need no head).
        weight, bias: the head, in hidden's dtype (under autocast all are cast as F.linear casts them).
        others: as in `sample_tokens`. With `top_k` or `top_p` rows are taken in chunks whose logits fit in 64 MiB.

    Returns:
        TokenSample of hidden's leading shape; with `end_token_ids` also the log-probability that EoS-first length
        prediction reads, from the same pass.

    Raises:
        as `sample_tokens`.
    """
    check_floats("hidden", hidden, 1)
    check_head(hidden, weight, bias)
    vocab, dim = weight.shape
    call = _Call(
        hidden, vocab, temperature, suppress_tokens, end_token_ids, seed, step, sequence_ids, positions, invalid
    )
    top_k, top_p = _check_filters(top_k, top_p)
    hidden, weight, bias = (None if t is None else t.detach() for t in autocast(hidden, weight, bias))
    rows = hidden.reshape(call.batch, call.length, dim).contiguous()
    backend = select("lm_head_sample", hidden.device.type, (hidden.dtype, weight.dtype))
    if (top_k or top_p < 1) and not call.greedy:
        return call.finish(_sample_in_chunks(rows, weight, bias, call, top_k, top_p, backend))
    if backend == "reference":
        return call.finish(_reference_sample(functional.linear(rows, weight, bias), call, 0, 1.0))
    if weight.stride(-1) != 1 and dim > 1:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    arguments = (rows, weight, bias, call.temperatures, call.temperature, *call.arguments())
    return call.finish(IMPLEMENTATIONS[backend].lm_head_sample(*arguments))


class _Call:
    """The arguments that both operators share, checked, in the form that backends take."""

    def __init__(
        self, like, vocab, temperature, suppress_tokens, end_token_ids, seed, step, sequence_ids, positions, invalid
    ):
        if invalid not in ("raise", "flag"):
            raise ValueError(f"invalid: got {invalid!r}; expected 'raise' or 'flag'")
        self.device, self.lead, self.invalid = like.device, like.shape[:-1], invalid
        self.batch = self.lead[0] if self.lead else 1
        self.length = math.prod(self.lead[1:])
        self.temperatures, self.temperature = _temperature(temperature, like, self.lead)
        self.greedy = self.temperatures is None and self.temperature == 0
        self.suppress_tokens = token_ids("suppress_tokens", suppress_tokens, vocab, like.device)
        if self.suppress_tokens is not None and self.suppress_tokens.numel() == vocab:
            raise ValueError(f"suppress_tokens: got all {vocab} ids of the vocabulary; leave at least one to draw")
        self.end_token_ids = token_ids("end_token_ids", end_token_ids, vocab, like.device)
        if seed is None:
            seed = 0 if self.greedy else torch.randint(2**63 - 1, (), device=like.device)
        self.seeds, self.seed = counter("seed", seed, like.device)
        self.steps, self.step = counter("step", step, like.device, words=1)
        self.sequence_ids = self._of_rows("sequence_ids", sequence_ids, first=True)
        self.positions = self._of_rows("positions", positions, first=False)

    def _of_rows(self, name: str, t: Tensor | None, first: bool) -> Tensor | None:
        """int64, one per row, flat."""
        if t is None:
            return None
        check_integers(name, t, self.device)
        if t.shape != self.lead:
            short = self.lead[:1] if first else self.lead[-1:]
            if len(self.lead) < 2 or t.shape != short:
                expected = f"{list(short)} or {list(self.lead)}" if len(self.lead) > 1 else f"{list(self.lead)}"
                raise ValueError(f"{name}: got shape {list(t.shape)}; expected {expected}")
            t = t.reshape(-1, *[1] * (len(self.lead) - 1)) if first else t
            t = t.expand(self.lead)
        return t.reshape(-1).contiguous()

    def arguments(self, rows: slice | None = None) -> tuple:
        """What the operators take after temperature (and filters)."""
        own = (self.sequence_ids, self.positions)
        if rows is not None:
            own = tuple(t[rows] for t in self.row_numbers())
        return (self.suppress_tokens, self.end_token_ids, self.seeds, self.seed, self.steps, self.step, *own)

    def row_numbers(self) -> tuple[Tensor, Tensor]:
        """sequence_ids and positions of every row, flat."""
        rows = torch.arange(self.batch * self.length, device=self.device)
        length = max(self.length, 1)
        sequences = rows // length if self.sequence_ids is None else self.sequence_ids
        return sequences, rows % length if self.positions is None else self.positions

    def finish(self, results: tuple[Tensor, ...]) -> TokenSample:
        """The results in the caller's shape; raises for rows without a distribution."""
        token, log_prob, entropy, margin, end = results
        if self.invalid == "raise":
            self._raise_invalid(token.reshape(-1))
        shaped = [t.view(self.lead) for t in (token, log_prob, entropy, margin)]
        return TokenSample(*shaped, None if self.end_token_ids is None else end.view(self.lead))

    def _raise_invalid(self, token: Tensor) -> None:
        reason = "has no distribution: its allowed logits are all -inf, or one is NaN or +inf"
        if torch.compiler.is_compiling():
            torch._assert_async((token >= 0).all(), f"a row {reason} (without torch.compile the error names the row)")
        elif bool((token < 0).any()):
            row = int((token < 0).nonzero()[0])
            place = list(torch.unravel_index(torch.tensor(row), self.lead)) if self.lead else []
            index = ", ".join(str(int(i)) for i in place)
            raise ValueError(f"row [{index}] {reason}; pass invalid='flag' to get token -1 there instead")


def _reference_sample(logits: Tensor, call: _Call, top_k: int, top_p: float) -> tuple[Tensor, ...]:
    """logits [B, L, V]; results are flat."""
    rows = logits.reshape(-1, logits.shape[-1])
    temperature = call.temperatures
    if temperature is None:
        temperature = torch.full((), call.temperature, dtype=torch.float64, device=call.device)
    seed, step = (
        torch.full((), number, device=call.device) if tensor is None else tensor.reshape(())
        for tensor, number in ((call.seeds, call.seed), (call.steps, call.step))
    )
    return reference.sample_tokens(
        rows, temperature, top_k, top_p, call.suppress_tokens, call.end_token_ids, seed, step, *call.row_numbers()
    )


def _sample_in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, top_k: int, top_p: float, backend: str
) -> tuple[Tensor, ...]:
    """With top-k or top-p a row's threshold needs all of its logits: as many rows at a time as fit; flat results."""
    flat, vocab = hidden.flatten(0, 1), weight.shape[0]
    if backend == "reference":
        return _reference_sample(functional.linear(flat, weight, bias), call, top_k, top_p)
    chunk = max(1, _LOGITS_AT_ONCE // (vocab * hidden.element_size()))
    parts = []
    for start in range(0, max(flat.shape[0], 1), chunk):
        rows = slice(start, start + chunk)
        logits = functional.linear(flat[rows], weight, bias)[:, None]
        temperatures = None if call.temperatures is None else call.temperatures[rows]
        arguments = (logits, temperatures, call.temperature, top_k, top_p, *call.arguments(rows))
        parts.append(IMPLEMENTATIONS[backend].sample_tokens(*arguments))
    return tuple(torch.cat([t.flatten() for t in column]) for column in zip(*parts, strict=True))


# ------------------------------------------------------------------------------------------------ checks


def _check_filters(top_k: int | None, top_p: float | None) -> tuple[int, float]:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k: got {top_k!r}; expected an int of 1 or more, or None or 0 for off")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p: got {top_p!r}; expected a number in (0, 1], or None for off")
    return top_k or 0, 1.0 if top_p is None else float(top_p)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _temperature(temperature: float | Tensor, like: Tensor, lead: torch.Size) -> tuple[Tensor | None, float]:
    """One a row as flat fp32, or a number."""
    expected = f"expected a finite number of 0 or above, or a tensor of shape {list(lead)}"
    if not isinstance(temperature, Tensor):
        if not (_is_number(temperature) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature: got {temperature!r}; {expected}")
        return None, float(temperature)
    if temperature.device != like.device:
        raise ValueError(
            f"temperature: got one on {temperature.device}, the input on {like.device}; expected one device: move "
            "one of them"
        )
    fits = all(size in (1, of) for size, of in zip(temperature.shape, lead, strict=False))
    if temperature.ndim and (temperature.ndim != len(lead) or not fits):
        raise ValueError(f"temperature: got shape {list(temperature.shape)}; {expected}")
    if not torch.compiler.is_compiling() and temperature.device.type == "cpu":  # on a GPU it would wait for the device
        low = temperature.detach().float()
        if low.numel() and not bool(((low >= 0) & (low < math.inf)).all()):
            raise ValueError(f"temperature: got a value of {float(low.min())}; {expected}")
    return temperature.detach().float().expand(lead).reshape(-1).contiguous(), 0.0
