"""QGFD attention as modules use it: its settings, multi-head attention, the values that generation keeps."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.ops._qgfd_hops import unit_keys
from fastdiff.ops._qgfd_options import QGFDOptions
from fastdiff.ops.qgfd_attention import qgfd_attention, qgfd_attention_dense, qgfd_values

DropoutKind = Literal["mixed", "hop"]


@dataclass(frozen=True, kw_only=True)
class QGFDSettings(QGFDOptions):
    """How a module diffuses attention: `fastdiff.ops.QGFDOptions`, and what it drops.

    `dropout_kind` says what attention's dropout drops in training: "mixed", weights of the diffused matrix, which only
    the dense path can do (L x L matrices), or "hop", weights of each hop's matrix, through torch's attention (with
    transition "attention" at temperature 1 alone). Raises ValueError for a value that does not fit.
    """

    dropout_kind: DropoutKind = "mixed"

    def __post_init__(self) -> None:
        QGFDOptions.__post_init__(self)
        if self.dropout_kind not in get_args(DropoutKind):
            raise ValueError(f"dropout_kind: got {self.dropout_kind!r}; expected 'mixed' or 'hop'")
        if self.dropout_kind == "hop" and (self.transition != "attention" or self.temperature != 1):
            raise ValueError("dropout_kind: got 'hop' with transition 'key' or a temperature; expected 'mixed'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, name: str) -> "QGFDSettings":
        """The settings of a plain dict, called `name` in errors; None gives the defaults."""
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"{name}: got {values!r}; expected a dict of QGFD's settings")
        unknown = [key for key in values or {} if key not in SETTINGS]
        if unknown:
            raise ValueError(f"{name}: got unknown keys {unknown}; expected some of {', '.join(SETTINGS)}")
        try:
            return cls(**(values or {}))
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None


SETTINGS = tuple(field.name for field in dataclasses.fields(QGFDSettings))


def diffused_attention(
    query: Tensor,  # [B, H, L_q, d]
    key: Tensor,  # [B, H_kv, L_k, d]
    value: Tensor,  # [B, H_kv, L_k, d]
    settings: QGFDSettings,
    *,
    key_mask: Tensor | None = None,  # bool [B, L_k], True = attend
    is_causal: bool = False,
    attn_mask: Tensor | None = None,  # bool, broadcasts to [B, H, L_q, L_k], True = attend; not with is_causal
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:  # [B, H, L_q, d]
    """Attention by the cheapest operator that can do what is asked for.

    Nothing to diffuse: torch's attention. An attn_mask, or dropout of the mixed matrix: `qgfd_attention_dense`. Else
    `qgfd_attention`. Errors are theirs; ValueError for an attn_mask with dropout_kind "hop", which no path has.
    """
    shared = {"key_mask": key_mask, "scale": scale, "enable_gqa": True}
    if settings.plain and attn_mask is None:
        return qgfd_attention(query, key, value, steps=0, is_causal=is_causal, hop_dropout_p=dropout_p, **shared)
    if settings.plain:
        mask = attn_mask if key_mask is None else attn_mask & key_mask[:, None, None]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale, enable_gqa=True
        )
    shared |= settings.of_attention | {"is_causal": is_causal}
    mixed = settings.dropout_kind == "mixed"
    if attn_mask is not None and dropout_p > 0 and not mixed:
        raise ValueError("dropout_kind: got 'hop' with an arbitrary mask in training; expected 'mixed', or no dropout")
    if attn_mask is not None or (dropout_p > 0 and mixed):
        return qgfd_attention_dense(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **shared)
    return qgfd_attention(query, key, value, hop_dropout_p=dropout_p, **shared)


class DiffusedValues:
    """The values w of transition "key" for a causal sequence that grows, kept beside a cache of its keys and values.

    A row of w depends on the rows before it alone, through every hop: so the u_j of each hop are kept, and a call makes
    those of the new rows only, by plain attention of the new keys over all of them. Attention over (query, key, w) is
    then `qgfd_attention` of the whole sequence.
    """

    def __init__(self) -> None:
        self.hops: list[Tensor] = []  # u_1 … u_steps, [B, H_kv, L, d] each; the last is w
        self._settings: QGFDSettings | None = None

    @property
    def length(self) -> int:
        """Rows held."""
        return self.hops[0].shape[2] if self.hops else 0

    def update(
        self,
        key: Tensor,  # [B, H_kv, L, d]: all of them, old and new
        value: Tensor,  # [B, H_kv, L, d]
        settings: QGFDSettings,
        key_mask: Tensor | None = None,  # bool [B, L], True = attend; it may not change for rows that are held
    ) -> Tensor:  # [B, H_kv, L, d]
        """w of all rows. Other settings, or fewer rows than are held, make it anew from the start.

        What is held is taken to be of the same sequences: `reset` before others. Raises ValueError for another batch,
        for transition "attention", whose w depends on the queries, and as `qgfd_values`.
        """
        if settings.transition != "key":
            raise ValueError("transition: got 'attention', whose values depend on the queries; expected 'key'")
        if key_mask is not None:  # as in `qgfd_values`: what is hidden does not matter
            value = value.masked_fill(~key_mask[:, None, :, None], 0)
        if settings.plain:
            return value
        if settings != self._settings or self.length > key.shape[2]:
            self.hops, self._settings = [], settings
        if self.hops and self.hops[0].shape[:2] != key.shape[:2]:
            held, given = list(self.hops[0].shape[:2]), list(key.shape[:2])
            raise ValueError(
                f"key: got {given} samples and heads where {held} are held; expected as many, or a reset() before"
            )
        old, below, hops = self.length, value, []
        if old == key.shape[2]:
            return self.hops[-1]
        for step in range(1, settings.steps + 1):
            new = _next_rows(key, below, old, settings, key_mask)
            if step in settings.mixed:
                new = torch.lerp(value[:, :, old:], new, settings.alpha)
            below = torch.cat([self.hops[step - 1], new], 2) if old else new
            hops.append(below)
        self.hops = hops
        return below

    def reset(self) -> None:
        """Forgets what is held: another sequence begins."""
        self.hops = []

    def apply(self, function) -> None:
        """Replaces what is held by `function` of it: a reordered batch, fewer rows."""
        self.hops = [function(u) for u in self.hops]


def _next_rows(key: Tensor, below: Tensor, old: int, settings: QGFDSettings, key_mask: Tensor | None) -> Tensor:
    """The rows from `old` of P · below. Causal masks isolate the sink by themselves: its row sees itself alone."""
    masks, temperature = {"key_mask": key_mask, "is_causal": True}, settings.temperature
    if old == 0:
        return qgfd_values(key, below, steps=1, alpha=1.0, temperature=temperature, **masks)
    unit = unit_keys(key)
    return qgfd_attention(unit[:, :, old:], unit, below, steps=0, scale=1 / temperature, **masks)


class QGFDAttention(nn.Module):
    """Multi-head QGFD attention instead of `torch.nn.MultiheadAttention`, whose state_dict it loads and gives.

    The chain runs over one sequence. With transition "attention" a call with L_q != L_k, which is cross-attention, is
    plain attention (as in TorchDire); cross-attention whose lengths may be equal is built with steps=0.
    Transition "key" diffuses over the keys, whatever the queries.

    `alpha` and the other settings are plain attributes: a schedule may change them (a later version of
    TorchDire warmed alpha up from 0.02 to 0.10).

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim: as in MultiheadAttention; embed_dim a multiple of num_heads.
        batch_first: inputs and outputs are [B, L, D]; False: [L, B, D].
        settings: the fields of `QGFDSettings`: steps, alpha, transition, recurrence, temperature, sink_isolation,
            dropout_kind.

    Raises ValueError for an argument that does not fit. add_bias_kv and add_zero_attn of MultiheadAttention are not
    there: they add keys that no chain starts from.
    """

    # torch's TransformerEncoderLayer would compute plain attention by itself from our weights in eval mode
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads} for embed_dim = {embed_dim}; expected a divisor of embed_dim")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}; expected a probability in [0, 1)")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.dropout, self.batch_first = dropout, batch_first
        checked = QGFDSettings(**settings)
        for name in SETTINGS:  # plain attributes, which a schedule may change
            setattr(self, name, getattr(checked, name))

        kind = {"device": device, "dtype": dtype}
        packed = self.kdim == self.vdim == embed_dim
        shapes = {
            "in_proj_weight": (3 * embed_dim, embed_dim) if packed else None,
            "q_proj_weight": None if packed else (embed_dim, embed_dim),
            "k_proj_weight": None if packed else (embed_dim, self.kdim),
            "v_proj_weight": None if packed else (embed_dim, self.vdim),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **kind)))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.empty(3 * embed_dim, **kind)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MultiheadAttention's initial values."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @property
    def settings(self) -> QGFDSettings:
        return QGFDSettings(**{name: getattr(self, name) for name in SETTINGS})

    def forward(
        self,
        query: Tensor,  # [B, L_q, embed_dim]
        key: Tensor,  # [B, L_k, kdim]
        value: Tensor,  # [B, L_k, vdim]
        key_padding_mask: Tensor | None = None,  # [B, L_k]
        need_weights: bool = False,
        attn_mask: Tensor | None = None,  # [L_q, L_k] or [B * num_heads, L_q, L_k]
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention's output, [B, L_q, embed_dim], and None instead of the weights, which are never made.

        Masks have torch's polarity: in key_padding_mask and attn_mask, True = ignore; floats are 0 or -inf. With
        is_causal attn_mask is taken to be the causal mask, and not looked at; it need not be given. A causal one is
        found to be that (but not under torch.compile: say is_causal there); another attn_mask runs on the dense path,
        with a warning (`fastdiff.ops.qgfd_attention_dense`). A query with nothing to attend to gives the bias of
        out_proj (MultiheadAttention: NaN).

        Raises:
            ValueError: need_weights, a float mask with other values, a shape or setting that does not fit.
        """
        if need_weights:
            raise ValueError("need_weights: got True; expected False: the weights are never made")
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}: got a {type(t).__name__}; expected a torch.Tensor [B, L, D]")
            if t.ndim != 3:
                raise ValueError(f"{name}: got shape {list(t.shape)}; expected three dimensions: add a batch of one")
        query, key, value = self._heads(query, key, value)
        settings = self.settings
        batch, _, queries, _ = query.shape
        keys = key.shape[2]
        if queries != keys and self.transition == "attention":
            settings = dataclasses.replace(settings, steps=0)
        if key_padding_mask is not None:
            key_padding_mask = _attended("key_padding_mask", key_padding_mask, [(batch, keys)])
        if is_causal or attn_mask is None:
            attn_mask = None
        else:
            attn_mask = _attended("attn_mask", attn_mask, [(queries, keys), (batch * self.num_heads, queries, keys)])
            attn_mask = attn_mask.view(-1, self.num_heads, queries, keys) if attn_mask.ndim == 3 else attn_mask
            if _is_causal(attn_mask):
                attn_mask, is_causal = None, True
        mixed = diffused_attention(
            query,
            key,
            value,
            settings,
            key_mask=key_padding_mask,
            is_causal=is_causal,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1), None

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projected, and split into heads: [B, H, L, d]."""
        if self.in_proj_weight is not None and query is key is value:
            parts = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            packed = self.in_proj_weight is not None
            separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights = self.in_proj_weight.chunk(3) if packed else separate
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = map(F.linear, (query, key, value), weights, biases)
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        return [t.unflatten(-1, (self.num_heads, self.head_dim)).permute(order) for t in parts]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, {self.settings}"


def _attended(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    """torch's mask (True, or -inf, is to be ignored) as ours: True = attend."""
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name}: got shape {list(mask.shape)}; expected {expected}")
    return ~mask if mask.dtype == torch.bool else attended_of_float(name, mask)


def _is_causal(mask: Tensor) -> bool:  # [L_q, L_k] or more, True = attend
    """Whether it is the causal mask, which wants no dense path; under torch.compile nobody can look."""
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or torch.compiler.is_compiling():
        return False
    return bool((mask == torch.ones_like(mask).tril()).all())


def attended_of_float(name: str, mask: Tensor) -> Tensor:
    """A mask to be added to the scores (0, or -10⁴ and less) as a bool one, True = attend.

    Raises ValueError for other values: those are a bias, which QGFD attention has not.
    """
    if not mask.is_floating_point():
        raise ValueError(f"{name}: got {mask.dtype}; expected bool, or floats that are 0 or -inf")
    seen = mask == 0
    fits = (seen | (mask <= -1e4)).all()
    reason = f"{name}: got values other than 0 and -inf, a bias; expected none: QGFD attention adds none"
    if torch.compiler.is_compiling():
        torch._assert_async(fits, reason)
    elif not bool(fits):
        raise ValueError(reason)
    return seen
