"""Options and masks of QGFD attention: what they mean for the kernels, and whether they fit."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdiff.ops._checks import check_floats

Transition = Literal["attention", "key"]
Recurrence = Literal["power", "restart"]
# int32 [B or 1, L_q] each: a query sees the keys from the first to the second, which is not among them
Interval = tuple[Tensor | None, Tensor | None]
# What a score may be scaled by: beyond these bounds float32 has no inverse
_INVERTIBLE: tuple[Callable[[float], bool], str] = (lambda v: 1e-30 <= v <= 1e30, "a number > 0, from 1e-30 to 1e30")


MOST_STEPS = 4095  # published systems take 2 to 8; kMostHops of csrc/qgfd.h is one more


@dataclass(frozen=True, kw_only=True)
class QGFDOptions:
    """How attention is diffused: the options that `qgfd_attention`, modules and models share.

    The defaults are TorchDire's (docs/qgfd.md). Raises ValueError for a value that does not fit, and TypeError
    for a flag that is not a bool.

    Attributes:
        steps: Hops of the diffusion of attention, at most 4 095; 0 is plain attention.
        alpha: Weight of the diffused part, in [0, 1].
        transition: "attention" or "key": where the Markov chain comes from.
        recurrence: "power" or "restart".
        temperature: The chain's scores are divided by it.
        sink_isolation: With "key": the first token passes nothing on.
    """

    steps: int = 1
    alpha: float = 0.5
    transition: Transition = "attention"
    recurrence: Recurrence = "power"
    temperature: float = 1.0
    sink_isolation: bool = False

    def __post_init__(self) -> None:
        steps = self.steps
        if isinstance(steps, bool) or not isinstance(steps, int | Integral) or not 0 <= steps <= MOST_STEPS:
            given = f"a {type(steps).__name__}" if isinstance(steps, Tensor) else repr(steps)
            raise ValueError(f"steps: got {given}; expected an int from 0 (plain attention) to {MOST_STEPS}")
        _number("alpha", self.alpha, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        for name, choices in (("transition", get_args(Transition)), ("recurrence", get_args(Recurrence))):
            if getattr(self, name) not in choices:
                expected = " or ".join(map(repr, choices))
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {expected}")
        _number("temperature", self.temperature, *_INVERTIBLE)
        _flag("sink_isolation", self.sink_isolation)
        if self.sink_isolation and self.transition != "key":
            raise ValueError("sink_isolation: got True with transition 'attention'; expected transition='key'")

    @property
    def plain(self) -> bool:
        """Nothing is diffused."""
        return self.steps == 0 or self.alpha == 0

    @property
    def mixed(self) -> range:
        """The hops after which the values are mixed in."""
        return range(1 if self.recurrence == "restart" else self.steps, self.steps + 1)

    @property
    def of_values(self) -> dict[str, Any]:
        """The keyword arguments of `qgfd_values`: all options but the transition, which is "key"."""
        names = ("steps", "alpha", "recurrence", "temperature", "sink_isolation")
        return {name: getattr(self, name) for name in names}

    @property
    def of_attention(self) -> dict[str, Any]:
        """The keyword arguments of `qgfd_attention`."""
        return self.of_values | {"transition": self.transition}


@dataclass(frozen=True)
class Masks:
    key_mask: Tensor | None
    is_causal: bool
    cu_seqlens: Tensor | None
    prefix_length: int | Tensor | None
    attn_mask: Tensor | None = None

    @property
    def sdpa_knows(self) -> bool:
        return self.cu_seqlens is None and self.prefix_length is None

    def as_dict(self) -> dict:
        return {
            "key_mask": self.key_mask,
            "is_causal": self.is_causal,
            "cu_seqlens": self.cu_seqlens,
            "prefix_length": self.prefix_length,
            "attn_mask": self.attn_mask,
        }


def hide(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, options: QGFDOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with zeros where key_mask hides keys and values: a weight of 0 times a NaN or an infinity is a NaN.

    Where the queries make the chain, theirs at hidden places are rows of it, which pass nothing on: so their NaNs and
    infinities (padding that another layer has spoilt) become zeros, too. On every backend, and with zero gradients.
    """
    if key_mask is None:
        return query, key, value
    hidden = ~key_mask[:, None, :, None]
    if not options.plain and options.transition == "attention":
        query = query.masked_fill(hidden & ~query.isfinite(), 0)
    return query, key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)


def row_intervals(masks: Masks, queries: int, keys: int, device: torch.device) -> Interval:
    """The keys that a query sees, key_mask apart: (first, one beyond the last); None where that is 0, or L_k."""
    causal = masks.is_causal or masks.prefix_length is not None
    if not causal and masks.cu_seqlens is None:
        return None, None
    begin = end = None
    if causal:
        end = torch.arange(keys - queries + 1, keys + 1, dtype=torch.int32, device=device).clamp_min_(0)[None]
    prefix = masks.prefix_length
    if masks.cu_seqlens is not None:
        starts = masks.cu_seqlens.to(torch.int32)
        sequence = torch.searchsorted(starts, torch.arange(keys, dtype=torch.int32, device=device), right=True) - 1
        sequence = sequence.clamp(0, starts.shape[0] - 2)  # cu_seqlens that nobody could look at may end early
        begin = starts[sequence][None]
        ends = torch.where(torch.arange(keys, device=device) < starts[-1], starts[sequence + 1], 0)[None]
        if isinstance(prefix, Tensor):
            prefix = prefix[sequence][None]
        if prefix is not None:
            end = torch.maximum(end, (begin + prefix).to(torch.int32))
        end = ends if end is None else torch.minimum(end, ends)
    elif prefix is not None:
        prefix = prefix[:, None] if isinstance(prefix, Tensor) else torch.full((1, 1), prefix, device=device)
        end = torch.maximum(end, prefix.clamp_max(keys).to(torch.int32))
    return None if begin is None else begin.contiguous(), None if end is None else end.contiguous()


def isolate_sinks(intervals: Interval, masks: Masks, batch: int, length: int, device: torch.device) -> Interval:
    """The intervals of P with the row of each sequence's first key that may be attended to seeing itself alone.

    Softmax over one key is the unit row, so that kernels need no other rule.
    """
    rows = torch.arange(length, dtype=torch.int32, device=device)[None]
    begin, end = intervals
    start = torch.zeros_like(rows) if begin is None else begin
    if masks.key_mask is None:
        sink = rows == start
    else:
        before = masks.key_mask.cumsum(1, dtype=torch.int32) - masks.key_mask.to(torch.int32)  # attended ones before it
        sink = masks.key_mask & (before == before.gather(1, start.expand(batch, -1).long()))
    begin = torch.where(sink, rows, start)
    end = torch.where(sink, rows + 1, torch.full_like(rows, length) if end is None else end)
    return begin.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()


def check_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: QGFDOptions,
    masks: Masks,
    *,
    enable_gqa: bool = False,
    scale: float | None = None,
    hop_dropout_p: float = 0.0,
    dropout_p: float = 0.0,
) -> None:
    """Raises for whatever does not fit."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        check_floats(name, t, 0)
        if t.ndim != 4 or t.shape[-1] == 0:
            raise ValueError(f"{name}: got shape {list(t.shape)}; expected [B, H, L, d] with d > 0")
        if t.device != query.device:
            raise ValueError(
                f"{name}: got one on {t.device}, query on {query.device}; expected one device: move one of them"
            )
        cast = torch.is_autocast_enabled(query.device.type) and torch.float64 not in (t.dtype, query.dtype)
        if t.dtype != query.dtype and not cast:
            raise ValueError(
                f"{name}: got {t.dtype}, with {query.dtype} of query; expected one dtype: cast one of them"
            )
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    _flag("enable_gqa", enable_gqa)
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != dim:
        expected = f"expected [{batch}, H_kv, L_k, {dim}] for both"
        raise ValueError(f"key: got shape {list(key.shape)} and value {list(value.shape)}; {expected}")
    if kv_heads != heads and not (enable_gqa and kv_heads > 0 and heads % kv_heads == 0):
        how = "a divisor of it" if enable_gqa else "as many, or enable_gqa=True"
        raise ValueError(f"key: got {kv_heads} heads, with {heads} of query; expected {how}")
    if scale is not None:
        _number("scale", scale, *_INVERTIBLE)
    for name, probability in (("hop_dropout_p", hop_dropout_p), ("dropout_p", dropout_p)):
        _number(name, probability, lambda v: 0 <= v < 1, "a number in [0, 1)")
    diffuses = not options.plain
    if queries != keys and diffuses and options.transition == "attention":
        raise ValueError(
            f"query: got {queries} rows, with {keys} of key: transition 'attention' diffuses over one sequence; "
            "expected equal lengths: use transition='key', or steps=0 for cross-attention"
        )
    _check_masks(masks, batch, queries, keys, query.device)
    if masks.attn_mask is not None:
        _check_attn_mask(masks.attn_mask, (batch, heads, queries, keys), query.device, diffuses)
    if hop_dropout_p > 0:
        if not masks.sdpa_knows or diffuses and (options.transition != "attention" or options.temperature != 1):
            raise ValueError(
                f"hop_dropout_p: got {hop_dropout_p}; expected 0 with transition 'key', a temperature, cu_seqlens"
                " or prefix_length: torch's attention, which does it, has none of them"
            )


def _number(name: str, value: float, fits: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, Tensor):
        raise ValueError(
            f"{name}: got a {type(value).__name__}; expected {expected}: it is a plain number, without gradient"
        )
    if isinstance(value, bool) or not isinstance(value, int | float | Real) or not fits(value):
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def _flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        given = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name}: got {given}; expected True or False")


def _check_masks(masks: Masks, batch: int, queries: int, keys: int, device: torch.device) -> None:
    _flag("is_causal", masks.is_causal)
    if masks.key_mask is not None:
        _check_bool("key_mask", masks.key_mask, device)
        if masks.key_mask.shape != (batch, keys):
            shape = list(masks.key_mask.shape)
            hint = ": pass mask[:, 0, 0]" if shape == [batch, 1, 1, keys] else ""
            raise ValueError(f"key_mask: got shape {shape}; expected [{batch}, {keys}], True = attend{hint}")
    sequences = batch
    if masks.cu_seqlens is not None:
        _check_cu_seqlens(masks.cu_seqlens, batch, queries, keys, device)
        sequences = masks.cu_seqlens.shape[0] - 1
    prefix = masks.prefix_length
    if isinstance(prefix, Tensor):
        if prefix.dtype not in (torch.int32, torch.int64) or prefix.shape != (sequences,) or prefix.device != device:
            given = f"{prefix.dtype} {list(prefix.shape)} on {prefix.device}"
            raise ValueError(f"prefix_length: got {given}; expected int32 or int64 [{sequences}] on {device}")
        if device.type == "cpu" and not torch.compiler.is_compiling() and bool((prefix < 0).any()):
            raise ValueError(f"prefix_length: got {int(prefix.min())}; expected numbers >= 0")
    elif prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0):
        raise ValueError(f"prefix_length: got {prefix!r}; expected an int >= 0 or an int64 tensor [{sequences}]")


def _check_bool(name: str, mask: Tensor, device: torch.device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"{name}: got {given}; expected a bool torch.Tensor, True = attend")
    if mask.device != device:
        raise ValueError(f"{name}: got one on {mask.device}, query on {device}; expected one device: move one of them")


def _check_cu_seqlens(ends: Tensor, batch: int, queries: int, keys: int, device: torch.device) -> None:
    if not isinstance(ends, Tensor) or ends.dtype not in (torch.int32, torch.int64):
        given = ends.dtype if isinstance(ends, Tensor) else f"a {type(ends).__name__}"
        raise TypeError(f"cu_seqlens: got {given}; expected an int32 or int64 torch.Tensor [S + 1]")
    if ends.ndim != 1 or ends.shape[0] < 2 or ends.device != device:
        raise ValueError(f"cu_seqlens: got shape {list(ends.shape)} on {ends.device}; expected [S + 1] on {device}")
    if batch != 1 or queries != keys:
        raise ValueError(
            f"cu_seqlens: got it with B = {batch}, L_q = {queries}, L_k = {keys}; expected B = 1 and equal lengths: the"
            " sequences lie one after the other"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU looking would wait for it
        values = ends.tolist()
        if values[0] != 0 or values[-1] != keys or any(a > b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"cu_seqlens: got {values}; expected ascending numbers from 0 to {keys}")


def _check_attn_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device, diffuses: bool) -> None:
    _check_bool("attn_mask", mask, device)
    fits = mask.ndim <= 4 and all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"attn_mask: got shape {list(mask.shape)}; expected what broadcasts to {list(shape)}")
    if diffuses and shape[2] != shape[3]:
        raise ValueError(
            f"attn_mask: got L_q = {shape[2]}, L_k = {shape[3]}; expected equal lengths: P wants a mask of its own,"
            " [L_k, L_k]"
        )
