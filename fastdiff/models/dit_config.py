"""Shape and options of a DiT, and the sizes of Peebles & Xie (2023) by name."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from fastdiff.nn.embeddings import STEM_GROUPS
from fastdiff.nn.mlp import swiglu_width

_MOST_TOKENS = 1 << 20  # of the table of positions, which no file holds: 2048 x 2048 latents at patch size 2

_KNOWN = {
    "conditioning": ("adaln", "cross_attention"),
    "stem": ("none", "conv"),
    "position_embedding": ("sincos", "rotary", "learned"),
    "mlp_activation": ("gelu", "gelu_tanh", "silu", "swiglu"),
    "time_embedding": ("sinusoidal", "fourier"),
}
# Fields that came after the first recipes and configurations were written; `recipe_values` says what that means.
_LATER = (
    "null_label", "conditioning", "cross_attention_heads", "stem", "position_embedding", "qk_norm",
    "attention_out_bias", "mlp_conv", "time_embedding", "adaln_zero", "final_norm_eps",
)  # fmt: skip


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
        num_classes: Number of class labels; label num_classes is the null label. 0 is a model without labels, which is
            conditioned from outside alone (`layer_embedding` or `context` of its call).
        null_label: Whether there is one. False is a model that was trained without label dropout: class_dropout_prob is
            0, labels must be given, and guidance is refused.
        learn_sigma: Predict a variance beside the mean, in as many channels again.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: Added to the variance in the norms.
        mlp_norm_eps: The same for the norm before the MLP; null takes norm_eps.
        norm_elementwise_affine: Give the blocks' norms a learnt weight and bias before the modulation.
        qkv_bias: Bias in the projection to query, key and value.
        mlp_activation: "gelu" (exact), "gelu_tanh" (as published) or "silu", which cost about the same; or "swiglu", a
            gated MLP of 2/3 the width, rounded up to a multiple of 256, without biases.
        class_dropout_prob: Probability with which training replaces a label by the null label.
        frequency_embedding_size: Number of sinusoids of the timestep.
        frequency_shift: Subtracted from half that number in the sinusoids' exponent (diffusers' models have 1).
        embedders_per_block: Each block has its own timestep and label embedding (diffusers' models do).
        attention: "auto" (the fastest for device, dtype and length), "fused" (our own, for CPUs), "sdpa" or "matmul".
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
        conditioning: "adaln" (time and label modulate each block) or "cross_attention" (blocks attend to the time, and
            to the label or the tokens of a text: those of transformer latent diffusion).
        cross_attention_heads: Heads of the cross-attention; null takes num_heads.
        stem: "none", or "conv": two 5 x 5 convolutions with SiLU and GroupNorm before the patches.
        position_embedding: "sincos" (fixed, as published), "rotary" (of the tokens counted row by row) or "learned" (of
            the size trained on alone).
        qk_norm: A LayerNorm of queries and one of keys, over the whole width.
        attention_out_bias: Bias in the output projection of attention.
        mlp_conv: A depthwise 3 x 3 convolution over the grid of tokens within the MLP.
        time_embedding: "sinusoidal" (as published) or "fourier" (frequencies of 1 to 1000 periods, for a time of 0 to
            100: diffusion.time_scale 100).
        adaln_zero: Start modulations and gates at zero, so that each block starts as the identity.
        final_norm_eps: Added to the variance in the final layer's norm; null takes norm_eps.
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
    mlp_activation: Literal["gelu", "gelu_tanh", "silu", "swiglu"] = "gelu_tanh"
    class_dropout_prob: float = 0.1
    frequency_embedding_size: int = 256
    frequency_shift: float = 0.0
    embedders_per_block: bool = False
    attention: Literal["auto", "fused", "sdpa", "matmul"] = "auto"
    gradient_checkpointing: bool = False
    conditioning: Literal["adaln", "cross_attention"] = "adaln"
    cross_attention_heads: int | None = None
    stem: Literal["none", "conv"] = "none"
    position_embedding: Literal["sincos", "rotary", "learned"] = "sincos"
    qk_norm: bool = False
    attention_out_bias: bool = True
    mlp_conv: bool = False
    time_embedding: Literal["sinusoidal", "fourier"] = "sinusoidal"
    adaln_zero: bool = True
    final_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.input_size, list):
            self.input_size = tuple(self.input_size)
        self._check_numbers()
        self._check_sizes()
        self._check_options()

    def _check_numbers(self) -> None:
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            least = 0 if name == "num_classes" else 1
            if getattr(self, name) < least:
                raise ValueError(f"DiTConfig.{name}: got {getattr(self, name)}; expected at least {least}")
        for name in ("norm_eps", "mlp_norm_eps", "final_norm_eps"):
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
        if self.null_label and not self.num_classes:
            raise ValueError("DiTConfig.null_label: got True with num_classes 0; expected False: there are no labels")

    def _check_sizes(self) -> None:
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

    def _check_options(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                expected = ", ".join(known)
                raise ValueError(f"DiTConfig.{name}: got {getattr(self, name)!r}; expected one of {expected}")
        if self.mlp_conv and self.mlp_activation == "swiglu":
            raise ValueError("DiTConfig.mlp_conv: got True with mlp_activation 'swiglu'; expected 'gelu' or another")
        if self.stem == "conv" and self.hidden_size % (2 * STEM_GROUPS):
            raise ValueError(
                f"DiTConfig.hidden_size: got {self.hidden_size} with stem 'conv'; expected a multiple of "
                f"{2 * STEM_GROUPS}, for the groups of its norm"
            )
        if self.position_embedding == "rotary" and self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"DiTConfig.num_heads: got {self.num_heads} with position_embedding 'rotary'; expected heads of an "
                f"even width, of hidden_size = {self.hidden_size}"
            )
        heads, crosses = self.cross_attention_heads, self.conditioning == "cross_attention"
        if heads is not None and (not crosses or heads < 1 or self.hidden_size % heads):
            raise ValueError(
                f"DiTConfig.cross_attention_heads: got {heads}; expected a divisor of hidden_size = {self.hidden_size} "
                "with conditioning 'cross_attention', else null"
            )
        if crosses and self.embedders_per_block:
            raise ValueError(
                "DiTConfig.embedders_per_block: got True with conditioning 'cross_attention'; set it False"
            )

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the MLP."""
        if self.mlp_activation == "swiglu":
            return swiglu_width(self.hidden_size, self.mlp_ratio)
        return int(self.hidden_size * self.mlp_ratio)

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
# LLM2DiT's, which is of the family of minRF's and Lumina's; its time is (level + 1) / levels: diffusion.time_scale 1.
PRESETS["llm2dit"] = dict(
    input_size=32, patch_size=2, in_channels=3, hidden_size=256, depth=10, num_heads=8, num_classes=10, norm_eps=1e-5,
    final_norm_eps=1e-6, norm_elementwise_affine=True, qkv_bias=False, attention_out_bias=False, qk_norm=True,
    mlp_activation="swiglu", stem="conv", position_embedding="rotary", adaln_zero=False,
)  # fmt: skip
# Latent Fashion-MNIST diffusion's; its time is 100 · t: diffusion.time_scale 100.
PRESETS["fmnist_t2i"] = dict(
    input_size=8, patch_size=1, in_channels=4, hidden_size=384, depth=12, num_heads=6, num_classes=0, null_label=False,
    class_dropout_prob=0.0, norm_eps=1e-5, norm_elementwise_affine=True, qkv_bias=False, attention_out_bias=False,
    mlp_activation="gelu", mlp_conv=True, conditioning="cross_attention", cross_attention_heads=4,
    position_embedding="learned", time_embedding="fourier", frequency_embedding_size=128,
)  # fmt: skip


def recipe_values(config: DiTConfig) -> dict[str, Any]:
    """A configuration as plain values for a recipe, without later fields that are as ever.

    Resuming compares a run's recipe with the one that it was started with, which may be older than those fields.
    """
    values = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if field.name in _LATER and values[field.name] == field.default:
            del values[field.name]
    return values


def preset_config(name: str, **overrides: Any) -> DiTConfig:
    """The configuration of a preset ("DiT-S/2", …, "DiT-tiny", "llm2dit", "fmnist_t2i") with fields replaced.

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
