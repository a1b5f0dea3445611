"""The diffusion transformer of Peebles & Xie (2023), "Scalable Diffusion Models with Transformers".

Between two matrix products a block adds the gated branch to the residual stream, normalises and modulates. Here the
branch that a block leaves is not added at its end but handed on with its gate, so that the addition happens inside
the next site's `gated_residual_adaln`: all sites but the first are one fused operator.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdiff.nn import (
    GatedResidualAdaLayerNorm,
    LabelEmbedding,
    Mlp,
    PatchEmbed,
    SelfAttention,
    TimestepEmbedding,
    sincos_2d,
)


@dataclass
class DiTConfig:
    """Shape and options of a DiT.

    Attributes:
        input_size: Height and width of the images or latents trained on, in pixels; one number for a square. The
            model takes any multiples of patch_size.
        patch_size: Side of a square patch, in pixels; a patch is a token.
        in_channels: Channels of the images or latents.
        hidden_size: Width of the residual stream.
        depth: Number of blocks.
        num_heads: Attention heads; divides hidden_size.
        mlp_ratio: Width of the MLP over hidden_size.
        num_classes: Number of class labels; label num_classes is the null label.
        learn_sigma: Predict a variance beside the mean, in as many channels again.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: Added to the variance in the norms.
        mlp_norm_eps: The same for the norm before the MLP; null takes norm_eps.
        norm_elementwise_affine: Give the blocks' norms a learnt weight and bias before the modulation.
        qkv_bias: Bias in the projection to query, key and value.
        mlp_activation: "gelu" (exact), "gelu_tanh" (as published) or "silu". In bfloat16 on a CPU gelu_tanh costs 2.6
            times gelu.
        class_dropout_prob: Probability with which training replaces a label by the null label.
        frequency_embedding_size: Number of sinusoids of the timestep.
        frequency_shift: Subtracted from half that number in the sinusoids' exponent (diffusers' models have 1).
        embedders_per_block: Each block has its own timestep and label embedding (diffusers' models do).
        attention: "auto" (the fastest for device, dtype and length), "sdpa" or "matmul".
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
    """

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-6
    mlp_norm_eps: float | None = None
    norm_elementwise_affine: bool = False
    qkv_bias: bool = True
    mlp_activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    class_dropout_prob: float = 0.1
    frequency_embedding_size: int = 256
    frequency_shift: float = 0.0
    embedders_per_block: bool = False
    attention: Literal["auto", "sdpa", "matmul"] = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.input_size, list):
            self.input_size = tuple(self.input_size)
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"DiTConfig.{name}: got {getattr(self, name)}; expected at least 1")
        for name in ("norm_eps", "mlp_norm_eps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"DiTConfig.{name}: got {value}; expected a finite number of 0 or more")
        if not 0 < self.mlp_ratio < math.inf or int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"DiTConfig.mlp_ratio: got {self.mlp_ratio}; expected a positive number")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"DiTConfig.class_dropout_prob: got {self.class_dropout_prob}; expected 0 to 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"DiTConfig.num_heads: got {self.num_heads}; expected a divisor of hidden_size = {self.hidden_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"DiTConfig.hidden_size: got {self.hidden_size}; expected a multiple of 4")
        if any(side < 1 or side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"DiTConfig.input_size: got {self.input_size}; expected multiples of patch_size = {self.patch_size}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images trained on."""
        return (self.input_size, self.input_size) if isinstance(self.input_size, int) else tuple(self.input_size)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads
PRESETS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": dict(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
PRESETS["DiT-tiny"] = dict(
    input_size=28, patch_size=4, in_channels=1, hidden_size=128, depth=6, num_heads=2, num_classes=10,
    mlp_activation="gelu",
)  # fmt: skip


def preset_config(name: str, **overrides: Any) -> DiTConfig:
    """The configuration of a preset ("DiT-S/2", …, "DiT-tiny") with fields replaced.

    Raises ValueError for an unknown name and TypeError for an unknown field.
    """
    if name not in PRESETS:
        raise ValueError(f"name: got {name!r}; expected one of {', '.join(PRESETS)}")
    unknown = set(overrides) - {field.name for field in dataclasses.fields(DiTConfig)}
    if unknown:
        raise TypeError(f"DiTConfig has no field {', '.join(sorted(unknown))}; see fastdiff.models.DiTConfig")
    return DiTConfig(**{**PRESETS[name], **overrides})


class DiTBlock(nn.Module):
    """Attention and MLP, each before a gate, each after a fused gated-residual AdaLN.

    Takes and returns (residual, branch, gate): the last branch is pending, not yet added to the stream.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        norm = dict(norm=config.norm, elementwise_affine=config.norm_elementwise_affine)
        mlp_eps = config.norm_eps if config.mlp_norm_eps is None else config.mlp_norm_eps
        self.norm1 = GatedResidualAdaLayerNorm(dim, eps=config.norm_eps, **norm)
        self.attn = SelfAttention(dim, config.num_heads, qkv_bias=config.qkv_bias, backend=config.attention)
        self.norm2 = GatedResidualAdaLayerNorm(dim, eps=mlp_eps, **norm)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), activation=config.mlp_activation)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(
        self,
        residual: Tensor,  # [B, N, D]
        branch: Tensor | None,  # [B, N, D]: pending from the block before; None in the first block
        gate: Tensor | None,  # [B, D] or [B, N, D]: its gate
        conditioning: Tensor,  # [B, D], or [B, N, D]: a token's own
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Six strided views of one projection; the operators read them in place.
        modulation = self.adaLN_modulation(conditioning).chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        residual, x = self.norm1(residual, branch, gate, shift_attn, scale_attn)
        residual, x = self.norm2(residual, self.attn(x), gate_attn, shift_mlp, scale_mlp)
        return residual, self.mlp(x), gate_mlp


class FinalLayer(nn.Module):
    """Adds the pending branch, normalises, modulates and projects each token to the pixels of its patch."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = GatedResidualAdaLayerNorm(dim, norm=config.norm, eps=config.norm_eps)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, residual: Tensor, branch: Tensor, gate: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).chunk(2, dim=-1)
        return self.linear(self.norm_final(residual, branch, gate, shift, scale)[1])


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    Parameter names are those of facebookresearch/DiT. The timestep is taken as it is given: 0 … 999 for discrete
    levels, 1000·t for continuous ones (`fastdiff.diffusion.Diffusion.model_time`).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.in_channels, config.hidden_size, config.patch_size)
        self.t_embedder, self.y_embedder = _embedders(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        if config.embedders_per_block:  # the first block and the final layer have the two above
            self.block_embedders = nn.ModuleList(nn.ModuleList(_embedders(config)) for _ in self.blocks[1:])
        self.final_layer = FinalLayer(config)
        self.register_buffer("positions", torch.empty(0), persistent=False)
        self.reset_positions()
        self.apply(_initialise)
        for layer in (*self.blocks, self.final_layer):  # adaLN-Zero: each block starts as the identity
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DiT":
        """A model with random weights: "DiT-S/2" … "DiT-XL/8" or "DiT-tiny", with fields of `DiTConfig` replaced.

        Raises ValueError for an unknown name and TypeError for an unknown field.
        """
        return cls(preset_config(name, **overrides))

    def forward(
        self,
        sample: Tensor,  # [B, C, H, W], H and W multiples of the patch size
        timestep: Tensor,  # [B] or a scalar
        class_labels: Tensor | None = None,  # [B] int64 in [0, num_classes]; num_classes is the null label
        *,
        layer_conditioning: Tensor | None = None,  # [B, L, D]
        token_conditioning: Tensor | None = None,  # [B, N, D]
        label_generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, C, H, W], or [B, 2 * C, H, W] with learn_sigma
        """What the network predicts (noise, image, velocity: `fastdiff.diffusion` says which).

        Args:
            sample: noisy images, float32, bfloat16 or float16.
            timestep: a time for each sample, or one for all.
            class_labels: None is the null label for all.
            layer_conditioning: row l is added to the conditioning vector of block l, the last row also to the final
                layer's.
            token_conditioning: added to the conditioning vector of every block and of the final layer before it is
                modulated, so that each token has its own shift, scale and gate.
            label_generator: where label dropout draws from in training mode; None is torch's generator.

        Raises:
            ValueError: a shape that does not fit, or (on CPU tensors) a label out of range.
            TypeError: labels that are not int64.
        """
        x = self.x_embedder(sample)
        batch, tokens, dim = x.shape
        self._check_conditioning(batch, tokens, timestep, class_labels, layer_conditioning, token_conditioning)
        timestep = timestep.expand(batch)
        if class_labels is None:
            class_labels = torch.full((batch,), self.config.num_classes, device=sample.device)
        labels = self.y_embedder.drop(class_labels, label_generator)
        shared = self.t_embedder(timestep) + self.y_embedder(labels)

        # Under autocast the patches are bfloat16 and the positions float32: the residual stream is float32.
        residual, branch, gate = x + self._positions(sample), None, None
        for index, block in enumerate(self.blocks):
            if index and self.config.embedders_per_block:
                t_embedder, y_embedder = self.block_embedders[index - 1]
                conditioning = t_embedder(timestep) + y_embedder(labels)
            else:
                conditioning = shared
            conditioning = _add_conditioning(conditioning, layer_conditioning, token_conditioning, index)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                residual, branch, gate = checkpoint(
                    block, residual, branch, gate, conditioning, use_reentrant=False, preserve_rng_state=False
                )
            else:
                residual, branch, gate = block(residual, branch, gate, conditioning)
        conditioning = _add_conditioning(shared, layer_conditioning, token_conditioning, -1)
        return self._unpatchify(self.final_layer(residual, branch, gate, conditioning), sample)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Writes model.safetensors and config.json, each whole or not at all. Raises OSError where it cannot."""
        from fastdiff.models.checkpoints import save_dit  # it imports this module

        save_dit(self, directory)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> "DiT":
        """Loads a model, in eval mode; the format is told from the files.

        Args:
            path: a folder written by `save_pretrained`; a folder of diffusers' DiTTransformer2DModel (or a pipeline
                folder with one in `transformer/`); a facebookresearch/DiT file (.pt, or .safetensors with the same
                names), its EMA weights if it holds both.
            dtype: of the parameters.
            overrides: fields of `DiTConfig` that no weight depends on, such as `attention`; for a
                facebookresearch file also `num_heads` where the width is not that of a preset.

        Raises:
            FileNotFoundError: nothing there, or no checkpoint in the folder.
            ValueError: the file is cut short, damaged or of another model; the message names it.
        """
        from fastdiff.models.checkpoints import load_dit

        return load_dit(path, dtype, overrides)

    def reset_positions(self, dtype: torch.dtype = torch.float32) -> None:
        """Makes the positions of the grid trained on again, on the parameters' device; they are not saved."""
        grid, device = self._grid(self.config.image_size), self.x_embedder.proj.weight.device
        self.positions = self._positions_of(*grid, device=device).to(dtype)

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // self.config.patch_size, image_size[1] // self.config.patch_size

    def _positions_of(self, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
        return sincos_2d(rows, columns, self.config.hidden_size, device=device)

    def _positions(self, sample: Tensor) -> Tensor:  # [N, D]
        grid = self._grid(sample.shape[-2:])
        if grid == self._grid(self.config.image_size):
            return self.positions
        return self._positions_of(*grid, device=sample.device).to(self.positions.dtype)

    def _unpatchify(self, patches: Tensor, sample: Tensor) -> Tensor:  # [B, N, p * p * C] -> [B, C, H, W]
        batch, channels = len(patches), self.config.out_channels
        p, (rows, columns) = self.config.patch_size, self._grid(sample.shape[-2:])
        pixels = patches.view(batch, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(batch, channels, rows * p, columns * p)

    def _check_conditioning(self, batch, tokens, timestep, class_labels, layer_conditioning, token_conditioning):
        expected = {
            "timestep": (timestep, ((), (1,), (batch,))),
            "class_labels": (class_labels, ((batch,),)),
            "layer_conditioning": (layer_conditioning, ((batch, self.config.depth, self.config.hidden_size),)),
            "token_conditioning": (token_conditioning, ((batch, tokens, self.config.hidden_size),)),
        }
        for name, (tensor, shapes) in expected.items():
            if tensor is not None and tuple(tensor.shape) not in shapes:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}; expected {list(shapes[-1])}")


def _embedders(config: DiTConfig) -> tuple[TimestepEmbedding, LabelEmbedding]:
    time = TimestepEmbedding(
        config.hidden_size, frequency_dim=config.frequency_embedding_size, frequency_shift=config.frequency_shift
    )
    return time, LabelEmbedding(config.num_classes, config.hidden_size, dropout_prob=config.class_dropout_prob)


def _add_conditioning(shared: Tensor, by_layer: Tensor | None, by_token: Tensor | None, layer: int) -> Tensor:
    """The conditioning of one layer: [B, D], or [B, N, D] with conditioning by token."""
    if by_layer is not None:
        shared = shared + by_layer[:, layer]
    return shared if by_token is None else shared[:, None] + by_token


def _initialise(module: nn.Module) -> None:
    """DiT's initialisation, but for the zeros of adaLN-Zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, LabelEmbedding):
        nn.init.normal_(module.embedding_table.weight, std=0.02)
    elif isinstance(module, TimestepEmbedding):  # apply() visits it after its own linear layers
        nn.init.normal_(module.mlp[0].weight, std=0.02)
        nn.init.normal_(module.mlp[2].weight, std=0.02)
