"""The layers of a DiT, conditioned by modulations (adaLN) or through cross-attention.

Between two matrix products a block adds a branch to the residual stream, normalises and modulates. Here the branch that
a block leaves is not added at its end but handed on with its gate, so that the addition happens inside the next site's
`gated_residual_adaln`: all sites but the first are one fused operator.
"""

from torch import Tensor, nn

from fastdiff.models.dit_config import DiTConfig
from fastdiff.nn import (
    ConvMlp,
    CrossAttention,
    FourierEmbedding,
    GatedResidualAdaLayerNorm,
    LabelEmbedding,
    Mlp,
    SelfAttention,
    TimestepEmbedding,
)
from fastdiff.nn.transformer import FeedForward

Rotary = tuple[Tensor, Tensor]
Grid = tuple[int, int]  # rows and columns of the tokens


class DiTBlock(nn.Module):
    """Attention and MLP, each before a gate, each after a fused gated-residual AdaLN (Peebles & Xie, 2023).

    Takes and returns (residual, branch, gate): the last branch is pending, not yet added to the stream.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        norm = dict(norm=config.norm, elementwise_affine=config.norm_elementwise_affine)
        mlp_eps = config.norm_eps if config.mlp_norm_eps is None else config.mlp_norm_eps
        self.norm1 = GatedResidualAdaLayerNorm(dim, eps=config.norm_eps, **norm)
        self.attn = _self_attention(config)
        self.norm2 = GatedResidualAdaLayerNorm(dim, eps=mlp_eps, **norm)
        self.mlp = _mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor | None,  # [B, N, D]: pending from the block before; None in the first block
        gate: Tensor | None,  # [B, D] or [B, N, D]: its gate
        conditioning: Tensor | None,  # [B, D], or [B, N, D]: a token's own
        modulation: Tensor | None = None,  # [B, 6 * D]: what is made of it, where that is known already
        rotary: Rotary | None = None,
        grid: Grid | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if modulation is None:
            modulation = self.adaLN_modulation(conditioning)
        # Six strided views of one projection; the operators read them in place.
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        residual, x = self.norm1(residual, branch, gate, shift_attn, scale_attn)
        residual, x = self.norm2(residual, self.attn(x, rotary), gate_attn, shift_mlp, scale_mlp)
        return residual, _through(self.mlp, x, grid), gate_mlp


class FinalLayer(nn.Module):
    """Adds the pending branch, normalises, modulates and projects each token to the pixels of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        eps = config.norm_eps if config.final_norm_eps is None else config.final_norm_eps
        self.norm_final = GatedResidualAdaLayerNorm(dim, norm=config.norm, eps=eps)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor,  # [B, N, D]
        gate: Tensor,  # as the blocks'
        conditioning: Tensor | None,
        modulation: Tensor | None = None,  # [B, 2 * D]
    ) -> Tensor:
        if modulation is None:
            modulation = self.adaLN_modulation(conditioning)
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm_final(residual, branch, gate, shift, scale)[1])


class CrossDiTBlock(nn.Module):
    """Self-attention, cross-attention to the context, MLP: each pre-norm, each added to the stream.

    The blocks of transformer latent diffusion and of latent Fashion-MNIST diffusion. Takes and returns (residual,
    branch): the last branch is pending. Additions go through the fused operator with a gate of ones.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        norm = dict(norm=config.norm, elementwise_affine=config.norm_elementwise_affine)
        mlp_eps = config.norm_eps if config.mlp_norm_eps is None else config.mlp_norm_eps
        self.norm1 = GatedResidualAdaLayerNorm(dim, eps=config.norm_eps, **norm)
        self.attn = _self_attention(config)
        self.norm2 = GatedResidualAdaLayerNorm(dim, eps=config.norm_eps, **norm)
        self.cross_attn = CrossAttention(
            dim, config.cross_attention_heads or config.num_heads, bias=config.qkv_bias,
            out_bias=config.attention_out_bias, qk_norm=config.qk_norm,
        )  # fmt: skip
        self.cross_attn.leading_keys = 1  # the time
        self.norm3 = GatedResidualAdaLayerNorm(dim, eps=mlp_eps, **norm)
        self.mlp = _mlp(config)

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor | None,  # [B, N, D]: pending from the block before; None in the first block
        gate: Tensor,  # [D], ones
        context: Tensor,  # [B, 1 + S, D]
        context_mask: Tensor | None,  # bool [B, 1 + S], True = attend
        rotary: Rotary | None = None,
        grid: Grid | None = None,
    ) -> tuple[Tensor, Tensor]:
        residual, x = self.norm1(residual, branch, None if branch is None else gate, None, None)
        residual, x = self.norm2(residual, self.attn(x, rotary), gate, None, None)
        residual, x = self.norm3(residual, self.cross_attn(x, context, context_mask), gate, None, None)
        return residual, _through(self.mlp, x, grid)


class PlainFinalLayer(nn.Module):
    """Adds the pending branch and projects each token to the pixels of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * config.out_channels)

    def forward(self, residual: Tensor, branch: Tensor) -> Tensor:  # [B, N, D] each
        return self.linear(residual + branch)


def embedders(config: DiTConfig) -> tuple[nn.Module, LabelEmbedding | None]:
    """The embeddings of time and of class labels; None where the model has no classes."""
    dim, frequencies = config.hidden_size, config.frequency_embedding_size
    if config.time_embedding == "fourier":
        time: nn.Module = FourierEmbedding(dim, frequency_dim=frequencies)
    else:
        time = TimestepEmbedding(dim, frequency_dim=frequencies, frequency_shift=config.frequency_shift)
    if not config.num_classes:
        return time, None
    label = LabelEmbedding(
        config.num_classes, dim, dropout_prob=config.class_dropout_prob, null_label=config.null_label
    )
    return time, label


def initialise(module: nn.Module) -> None:
    """DiT's initialisation, but for the zeros of adaLN-Zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LabelEmbedding):
        nn.init.normal_(module.embedding_table.weight, std=0.02)
    elif isinstance(module, TimestepEmbedding | FourierEmbedding):  # apply() visits it after its own linear layers
        nn.init.normal_(module.mlp[0].weight, std=0.02)
        nn.init.normal_(module.mlp[2].weight, std=0.02)


def _self_attention(config: DiTConfig) -> SelfAttention:
    return SelfAttention(
        config.hidden_size, config.num_heads, qkv_bias=config.qkv_bias, proj_bias=config.attention_out_bias,
        qk_norm=config.qk_norm, backend=config.attention,
    )  # fmt: skip


def _mlp(config: DiTConfig) -> nn.Module:
    dim, hidden = config.hidden_size, config.mlp_hidden_size
    if config.mlp_activation == "swiglu":
        return FeedForward(dim, hidden, activation="silu", gated=True, bias=False)
    return (ConvMlp if config.mlp_conv else Mlp)(dim, hidden, activation=config.mlp_activation)


def _through(mlp: nn.Module, x: Tensor, grid: Grid | None) -> Tensor:
    return mlp(x, grid) if isinstance(mlp, ConvMlp) else mlp(x)
