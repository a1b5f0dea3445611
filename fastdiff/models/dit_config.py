"""Shape and options of a DiT, and the sizes of Peebles & Xie (2023) by name."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

_MOST_TOKENS = 1 << 20  # of the table of positions, which no file holds: 2048 x 2048 latents at patch size 2


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
        null_label: Whether there is one. False is a model that was trained without label dropout: class_dropout_prob is
            0, labels must be given, and guidance is refused.
        learn_sigma: Predict a variance beside the mean, in as many channels again.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: Added to the variance in the norms.
        mlp_norm_eps: The same for the norm before the MLP; null takes norm_eps.
        norm_elementwise_affine: Give the blocks' norms a learnt weight and bias before the modulation.
        qkv_bias: Bias in the projection to query, key and value.
        mlp_activation: "gelu" (exact), "gelu_tanh" (as published) or "silu"; they cost about the
            same.
        class_dropout_prob: Probability with which training replaces a label by the null label.
        frequency_embedding_size: Number of sinusoids of the timestep.
        frequency_shift: Subtracted from half that number in the sinusoids' exponent (diffusers' models have 1).
        embedders_per_block: Each block has its own timestep and label embedding (diffusers' models do).
        attention: "auto" (the fastest for device, dtype and length), "fused" (our own, for CPUs), "sdpa" or "matmul".
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
    null_label: bool = True
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
    attention: Literal["auto", "fused", "sdpa", "matmul"] = "auto"
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
        if self.class_dropout_prob and not self.null_label:
            raise ValueError(
                f"DiTConfig.class_dropout_prob: got {self.class_dropout_prob} without a null label; expected 0"
            )
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
        tokens = math.prod(self.image_size) // self.patch_size**2
        if tokens > _MOST_TOKENS:
            raise ValueError(
                f"DiTConfig.input_size: got {self.input_size}, {tokens} tokens of {self.patch_size} x "
                f"{self.patch_size} pixels; expected at most {_MOST_TOKENS}"
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
        raise TypeError(
            f"DiTConfig: got {', '.join(sorted(unknown))}; expected its fields; see fastdiff.models.DiTConfig"
        )
    return DiTConfig(**{**PRESETS[name], **overrides})
