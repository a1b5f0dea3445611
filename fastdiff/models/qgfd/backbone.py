"""The denoiser of Query Graph Flow Diffusion (QGFD): a transformer over latent tokens with diffused self-attention.

The method is that of the repository rajboopathiking/TorchDire.

Pre-LN blocks without bias in query, key and value. Self-attention is `fastdiff.ops.qgfd_attention`; cross-attention,
to the tokens of a condition, is plain. Tokens of any modality fit: `fastdiff.models.qgfd.adapters` makes them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdiff.models.pretrained import Pretrained, check_overrides, naming_config, read_config
from fastdiff.models.weights import read_tensors
from fastdiff.nn import AdaLayerNorm, Mlp, TimestepEmbedding, sincos_positions
from fastdiff.nn.rotary import axial_rotary_table, rotate
from fastdiff.nn.transformer import Attention
from fastdiff.ops import QGFDOptions, qgfd_attention, qgfd_attention_dense


@dataclass(frozen=True)
class QGFDConfig(QGFDOptions):
    """Shape and attention of a `QGFDBackbone`; the defaults are TorchDire's (docs/qgfd.md).

    Beside the fields of `fastdiff.ops.QGFDOptions`:

    Attributes:
        latent_dim: Width of the latent tokens, in and out.
        hidden_size: Width of the residual stream.
        num_layers: Number of decoder blocks.
        num_heads: Attention heads; divides hidden_size.
        intermediate_size: Width of the MLPs.
        dropout: Probability with which training drops numbers of the blocks' branches.
        attention_dropout: The same for weights of the diffused matrix; above 0 it takes L x L matrices in training.
        cond_dim: Width of the condition's tokens; null is hidden_size.
        time_conditioning: "add" (the time's embedding is added to every token) or "adaln" (it shifts and scales the
            norms).
        rope_theta: Base of rotary positions (Su et al. 2021) of the decoder's queries and keys, beside the sinusoids
            that are added to the tokens; null for none. Needs heads of an even width. 100 suits tens of tokens.
    """

    latent_dim: int = 256
    hidden_size: int = 512
    num_layers: int = 6
    num_heads: int = 8
    intermediate_size: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.0
    cond_dim: int | None = None
    time_conditioning: Literal["add", "adaln"] = "add"
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        for name in ("latent_dim", "hidden_size", "num_layers", "num_heads", "intermediate_size", "cond_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"QGFDConfig.{name}: got {value}; expected at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"QGFDConfig.num_heads: got {self.num_heads}; expected a divisor of hidden_size = {self.hidden_size}"
            )
        if self.hidden_size % 2 or self.hidden_size < 4:  # sinusoids of the time, with a denominator of half - 1
            raise ValueError(f"QGFDConfig.hidden_size: got {self.hidden_size}; expected an even number of 4 or more")
        if self.rope_theta is not None and not 1 < self.rope_theta < math.inf:
            raise ValueError(f"QGFDConfig.rope_theta: got {self.rope_theta}; expected a number above 1, or null")
        if self.rope_theta is not None and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"QGFDConfig.rope_theta: got {self.rope_theta} with heads of {self.hidden_size // self.num_heads} "
                "numbers; expected an even width, or null"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"QGFDConfig.{name}: got {getattr(self, name)}; expected 0 or more and below 1")
        if self.time_conditioning not in ("add", "adaln"):
            raise ValueError(
                f"QGFDConfig.time_conditioning: got {self.time_conditioning!r}; expected one of add, adaln"
            )
        try:
            QGFDOptions.__post_init__(self)
        except (TypeError, ValueError) as error:
            raise ValueError(f"QGFDConfig.{error}") from None

    @property
    def cond_width(self) -> int:
        """Width of the condition's tokens."""
        return self.hidden_size if self.cond_dim is None else self.cond_dim

    @property
    def qgfd(self) -> dict[str, Any]:
        """The keyword arguments of `fastdiff.ops.qgfd_attention`."""
        return self.of_attention


class QGFDSelfAttention(Attention):
    """Multi-head self-attention through `fastdiff.ops.qgfd_attention`; q, k, v without bias, the output with one."""

    def __init__(self, config: QGFDConfig) -> None:
        super().__init__(config.hidden_size, config.num_heads, bias=False, dropout=config.attention_dropout)
        self.options = config.qgfd

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        key_mask: Tensor | None = None,  # bool [B, L], True = attend
        rotary: tuple[Tensor, Tensor] | None = None,  # as `axial_rotary_table` gives it
    ) -> Tensor:  # [B, L, D]
        if self.options["steps"] == 0:  # plain, in the formulation that is cheapest here
            return super().forward(x, None if key_mask is None else key_mask[:, None, None], rotary)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if self.training and self.dropout > 0:
            options = {**self.options, "dropout_p": self.dropout}
            mixed = qgfd_attention_dense(query, key, value, key_mask=key_mask, **options)
        else:
            mixed = qgfd_attention(query, key, value, key_mask=key_mask, **self.options)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """What the blocks share: norms, which the time modulates in the "adaln" form, and dropout of the branches."""

    def __init__(self, config: QGFDConfig, norms: tuple[str, ...]) -> None:
        super().__init__()
        dim, self.adaptive = config.hidden_size, config.time_conditioning == "adaln"
        self.norms = nn.ModuleDict({name: AdaLayerNorm(dim, elementwise_affine=not self.adaptive) for name in norms})
        self.adaLN_modulation = None
        if self.adaptive:  # zero: the norms start unmodulated
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim * len(norms)))
            nn.init.zeros_(self.adaLN_modulation[1].weight)
            nn.init.zeros_(self.adaLN_modulation[1].bias)
        self.dropout = nn.Dropout(config.dropout)

    def modulation(self, time: Tensor | None) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Shift and scale of each norm."""
        if self.adaLN_modulation is None:
            return {name: (None, None) for name in self.norms}
        if time is None:
            raise ValueError("time: got None; a block with time_conditioning 'adaln' needs its embedding [B, D]")
        parts = self.adaLN_modulation(time).chunk(2 * len(self.norms), dim=-1)
        return dict(zip(self.norms, zip(parts[::2], parts[1::2], strict=True), strict=True))


class QGFDEncoderBlock(_Block):
    """x + QGFD self-attention of norm(x), then x + MLP of norm(x)."""

    def __init__(self, config: QGFDConfig) -> None:
        super().__init__(config, ("self_attn", "mlp"))
        self.self_attn = QGFDSelfAttention(config)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        mask: Tensor | None = None,  # bool [B, L], True = a real token
        time: Tensor | None = None,  # [B, D], read with time_conditioning "adaln" alone
    ) -> Tensor:  # [B, L, D]
        modulation = self.modulation(time)
        x = x + self.dropout(self.self_attn(self.norms["self_attn"](x, *modulation["self_attn"]), mask))
        return x + self.dropout(self.mlp(self.norms["mlp"](x, *modulation["mlp"])))


class QGFDDecoderBlock(_Block):
    """As the encoder's, with plain cross-attention to a condition's tokens between self-attention and MLP."""

    def __init__(self, config: QGFDConfig) -> None:
        super().__init__(config, ("self_attn", "cross_attn", "mlp"))
        dim = config.hidden_size
        self.self_attn = QGFDSelfAttention(config)
        self.cross_attn = Attention(
            dim, config.num_heads, bias=False, context_dim=dim, dropout=config.attention_dropout
        )
        self.mlp = Mlp(dim, config.intermediate_size)

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        context: Tensor,  # [B, M, D]
        mask: Tensor | None = None,  # bool [B, L], True = a real token
        context_mask: Tensor | None = None,  # bool [B, M], True = attend
        time: Tensor | None = None,  # [B, D], read with time_conditioning "adaln" alone
        rotary: tuple[Tensor, Tensor] | None = None,  # as `axial_rotary_table` gives it
    ) -> Tensor:  # [B, L, D]
        modulation = self.modulation(time)
        x = x + self.dropout(self.self_attn(self.norms["self_attn"](x, *modulation["self_attn"]), mask, rotary))
        x = x + self.dropout(self._attend_to(context, context_mask, x, modulation["cross_attn"]))
        return x + self.dropout(self.mlp(self.norms["mlp"](x, *modulation["mlp"])))

    def _attend_to(self, context: Tensor, context_mask: Tensor | None, x: Tensor, modulation) -> Tensor:  # [B, L, D]
        attention = self.cross_attn
        if context.shape[1] == 1 and context_mask is None and not (self.training and attention.dropout):
            # A class, or no condition: one key has all of the weight, whatever the query.
            return attention.o_proj(attention.v_proj(context)).expand_as(x)
        seen = None if context_mask is None else context_mask[:, None, None]
        return attention(self.norms["cross_attn"](x, *modulation), seen, context=context)


class QGFDBackbone(Pretrained):
    """Predicts the noise (or the clean tokens; see `fastdiff.diffusion`) in noisy latent tokens.

    Latents and the condition's tokens are projected to the hidden size, whatever their widths. The final projection
    starts at zero, so that a new model predicts zero. `from_pretrained` also reads the backbone of a `QGFDModel`.
    """

    config_class = QGFDConfig
    title = "a QGFD model"
    also_reads = ("QGFDModel",)

    def __init__(self, config: QGFDConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.x_proj = nn.Linear(config.latent_dim, dim)
        # Without bias: a zero token, which stands for no condition, stays zero.
        self.cond_proj = nn.Linear(config.cond_width, dim, bias=False)
        # TorchDire's sinusoids: [sin, cos], frequencies with a denominator of half - 1
        self.time_embedding = TimestepEmbedding(dim, frequency_dim=dim, frequency_shift=1, sine_first=True)
        self.blocks = nn.ModuleList(QGFDDecoderBlock(config) for _ in range(config.num_layers))
        adaptive = config.time_conditioning == "adaln"
        self.final_norm = AdaLayerNorm(dim, elementwise_affine=not adaptive)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim)) if adaptive else None
        self.final_proj = nn.Linear(dim, config.latent_dim)
        for layer in (self.final_proj, *([self.final_modulation[1]] if adaptive else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x_t: Tensor,  # [B, L, latent_dim]
        t: Tensor,  # [B]
        cond_tokens: Tensor | None = None,  # [B, M, cond_dim]
        cond_mask: Tensor | None = None,  # bool [B, M], True = attend
        *,
        mask: Tensor | None = None,  # bool [B, L], True = a real token
        position_ids: Tensor | None = None,  # int64 [L, axes]
    ) -> Tensor:  # [B, L, latent_dim]
        """The prediction for each token; zero where `mask` is False.

        Args:
            x_t: noisy latents, float32, bfloat16 or float16.
            t: the time as `fastdiff.diffusion.Diffusion.model_time` gives it: the level, or 1000 times t in [0, 1].
            cond_tokens: what to condition on; None is one zero token, as in TorchDire.
            cond_mask: which tokens of the condition are real; None is all.
            mask: which latents are real. The others change nothing.
            position_ids: coordinates of each token along one axis or several (2 for images, 3 for video), for
                positions; axes share the width of tokens (and of rotary heads). None counts along one.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: a mask that is not bool, latents of another dtype than the model's (outside of autocast).
        """
        self._check(x_t, t, cond_tokens, cond_mask, mask, position_ids)
        batch, length, _ = x_t.shape
        if cond_tokens is None:
            cond_tokens, cond_mask = x_t.new_zeros(batch, 1, self.config.cond_width), None
        if position_ids is None:
            position_ids = torch.arange(length, device=x_t.device)[:, None]
        context = self.cond_proj(cond_tokens)
        x = self.x_proj(x_t)
        x = x + sincos_positions(position_ids, self.config.hidden_size).to(x.dtype)
        rotary = None
        if self.config.rope_theta is not None:
            head_dim = self.config.hidden_size // self.config.num_heads
            rotary = axial_rotary_table(position_ids, head_dim, self.config.rope_theta)
        time = self.time_embedding(t)
        if self.final_modulation is None:
            x = x + time[:, None]
        for block in self.blocks:
            x = block(x, context, mask, cond_mask, time, rotary)
        shift, scale = (None, None) if self.final_modulation is None else self.final_modulation(time).chunk(2, -1)
        prediction = self.final_proj(self.final_norm(x, shift, scale))
        return prediction if mask is None else prediction.masked_fill(~mask[..., None], 0)

    @classmethod
    def _read(cls, path: Path, weights: str, overrides: dict[str, Any]) -> tuple[QGFDConfig, dict[str, Tensor]]:
        config = read_config(path)
        if config.get("_class_name") != "QGFDModel":
            return super()._read(path, weights, overrides)
        check_overrides(overrides, cls.free_fields)
        with naming_config(path, cls.title):
            config = QGFDConfig(**config.get("backbone", {}))
        state = read_tensors(path / weights, cls.title)
        prefix = "backbone."
        return config, {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    def _check(self, x_t, t, cond_tokens, cond_mask, mask, position_ids) -> None:
        latent_dim, cond_dim = self.config.latent_dim, self.config.cond_width
        if x_t.ndim != 3 or x_t.shape[-1] != latent_dim:
            raise ValueError(f"x_t: got shape {list(x_t.shape)}; expected [B, L, {latent_dim}] (latent_dim)")
        weights = self.x_proj.weight.dtype
        if x_t.dtype != weights and not torch.is_autocast_enabled(x_t.device.type):
            raise TypeError(f"x_t: got {x_t.dtype} for a model in {weights}; cast it, or use torch.autocast")
        batch, length = x_t.shape[:2]
        if t.shape != (batch,):
            raise ValueError(f"t: got shape {list(t.shape)}; expected [{batch}], one time per sample")
        if cond_tokens is None and cond_mask is not None:
            raise ValueError("cond_mask: got one without cond_tokens; pass both or neither")
        if cond_tokens is not None and (
            cond_tokens.ndim != 3 or len(cond_tokens) != batch or cond_tokens.shape[-1] != cond_dim
        ):
            raise ValueError(f"cond_tokens: got shape {list(cond_tokens.shape)}; expected [{batch}, M, {cond_dim}]")
        if position_ids is not None and (position_ids.ndim != 2 or len(position_ids) != length):
            raise ValueError(f"position_ids: got shape {list(position_ids.shape)}; expected [{length}, axes]")
        shapes = {"mask": (mask, (batch, length))}
        if cond_mask is not None:
            shapes["cond_mask"] = (cond_mask, tuple(cond_tokens.shape[:2]))
        for name, (tensor, shape) in shapes.items():
            if tensor is None:
                continue
            if tensor.dtype != torch.bool:
                raise TypeError(f"{name}: got dtype {tensor.dtype}; expected torch.bool, True = attend")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; expected {list(shape)}")
