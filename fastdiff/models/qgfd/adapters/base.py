"""What the adapters share: their settings, latents, the condition's tokens, and a small stack of QGFD blocks."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.qgfd.backbone import QGFDConfig, QGFDEncoderBlock
from fastdiff.nn import LabelEmbedding, sincos_positions

Batch = Mapping[str, Tensor]
Condition = tuple[Tensor | None, Tensor | None]  # tokens [B, M, cond_dim]; which of them are there, bool [B, M]


@dataclass
class AdapterConfig:
    """Settings that every adapter has.

    Attributes:
        backbone_name: A Hugging Face encoder, by hub id or folder; null is a small encoder trained along.
        backbone_config: Its configuration, filled in when it is loaded: what a checkpoint is built from again.
        freeze_backbone: The Hugging Face encoder is not trained.
        hidden_size: Width of the adapter's own encoder and decoder.
        num_heads: Their attention heads.
        encoder_layers: Blocks of its own encoder.
        decoder_layers: Blocks of the decoder.
        diffuse_attention: Its own blocks diffuse their attention as the backbone's do; false is plain attention.
        num_classes: Classes to condition on; label num_classes is the null label. Null for none.
        condition_dropout: Probability with which training drops a sample's condition, for classifier-free guidance.
        reconstruction_noise: Standard deviation of the noise that the decoder is trained to forgive; latents have
            unit scale.
    """

    backbone_name: str | None = None
    backbone_config: dict[str, Any] | None = None
    freeze_backbone: bool = True
    hidden_size: int = 128
    num_heads: int = 4
    encoder_layers: int = 1
    decoder_layers: int = 1
    diffuse_attention: bool = True
    num_classes: int | None = None
    condition_dropout: float = 0.1
    reconstruction_noise: float = 0.1

    def __post_init__(self) -> None:
        self.at_least(1, "hidden_size", "num_heads", "num_classes")
        self.at_least(0, "encoder_layers", "decoder_layers")
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"{self._name}.condition_dropout: got {self.condition_dropout}; expected 0 to 1")
        if self.reconstruction_noise < 0:
            raise ValueError(f"{self._name}.reconstruction_noise: got {self.reconstruction_noise}; expected 0 or more")

    def at_least(self, least: int, *names: str) -> None:
        """Raises ValueError for the first field that is below `least`; None passes."""
        for name in names:
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number < least:
                    raise ValueError(f"{self._name}.{name}: got {value}; expected at least {least}")

    @property
    def _name(self) -> str:
        return type(self).__name__


@dataclass
class Latents:
    """Latent tokens of a batch.

    Attributes:
        tokens: [B, L, latent_dim], of unit scale.
        mask: bool [B, L], True = a real token; None is all.
        position_ids: int64 [L, axes].
    """

    tokens: Tensor
    mask: Tensor | None
    position_ids: Tensor


@dataclass
class LatentShape:
    """What the latents of samples look like: their number L, mask [B, L] or None, position_ids [L, axes]."""

    length: int
    mask: Tensor | None
    position_ids: Tensor


class Adapter(nn.Module):
    """One modality's way into the backbone's latent tokens and back.

    An adapter's subclass gives `encode`, `decode`, `reconstruction_loss`, `latent_length` and `sample_shape`.
    `qgfd` is the backbone's configuration: it has the widths of latents and condition, and the attention's settings,
    which the adapter's own blocks share.
    """

    modality: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]  # of a batch, one of which at least holds the data

    def __init__(self, config: AdapterConfig, qgfd: QGFDConfig) -> None:
        super().__init__()
        self.config, self.latent_dim, self.cond_width = config, qgfd.latent_dim, qgfd.cond_width
        self.block_config = dataclasses.replace(
            qgfd, hidden_size=config.hidden_size, num_heads=config.num_heads, dropout=0.0, attention_dropout=0.0,
            intermediate_size=4 * config.hidden_size, time_conditioning="add", rope_theta=None,
            steps=qgfd.steps if config.diffuse_attention else 0,
        )  # fmt: skip
        self.backbone: nn.Module | None = None
        self.drops_conditions = True  # in training; a trainer that drops them itself turns it off
        self.label_embedding = None
        if config.num_classes is not None:
            self.label_embedding = LabelEmbedding(
                config.num_classes, self.cond_width, dropout_prob=config.condition_dropout
            )

    def encode(self, batch: Batch) -> Latents:
        """The clean latents of a batch, of unit scale. Raises ValueError for shapes that do not fit."""
        raise NotImplementedError

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:  # tokens [B, L, latent_dim]
        """A batch as `encode` takes it, made of latents."""
        raise NotImplementedError

    def reconstruction_loss(self, batch: Batch, latents: Latents) -> Tensor:  # [B], float32
        """How far the decoder is from giving the batch back from (noisy) latents."""
        raise NotImplementedError

    def latent_length(self, batch: Batch) -> int:
        """L of the batch's latents, without encoding it."""
        raise NotImplementedError

    def sample_shape(
        self, count: int, length: int | Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> LatentShape:
        """What the latents of `count` samples look like.

        `length` is in the modality's unit (tokens, audio samples, video frames): a number, or for text and audio one a
        sample; None is the configuration's. Raises ValueError where the modality has no such choice.
        """
        raise NotImplementedError

    def condition(self, batch: Batch) -> Condition:
        """The tokens to condition on: the label's where the adapter has classes (the null label's without "labels")."""
        return join_conditions([self._label_token(batch)])

    def evidence(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """What noisy latents say by themselves, before the denoiser has seen them, where an adapter can tell.

        Noisy latents are alpha · latents + sigma · noise, `[B, L, latent_dim]` with alpha and sigma `[B]`. An adapter
        that tells has `tell`, `expected`, `token_errors` and `clean`, too (see `TextAdapterConfig.token_posterior`).
        """
        return None

    def null_condition(self, count: int, device: torch.device | str = "cpu") -> Condition:
        """What `condition` is for samples without one."""
        if self.label_embedding is None:
            return None, None
        labels = torch.full((count,), self.config.num_classes, device=device)
        return self.label_embedding(labels)[:, None], None

    def train(self, mode: bool = True) -> "Adapter":
        """A frozen backbone stays in eval mode: its dropout would only add noise to what it gives."""
        super().train(mode)
        if self.backbone is not None and self.config.freeze_backbone:
            self.backbone.eval()
        return self

    def _label_token(self, batch: Batch) -> Condition:
        labels = batch.get("labels")
        if labels is not None and self.label_embedding is None:
            raise ValueError("labels: got some, but the adapter has no classes; set num_classes, or leave them out")
        if self.label_embedding is None:
            return None, None
        if labels is None:
            return self.null_condition(batch_size(batch), next(iter(batch.values())).device)
        count, classes = batch_size(batch), self.config.num_classes
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (count,):
            given = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
            raise ValueError(f"labels: got {given}; expected an int64 tensor [{count}]")
        on_cpu = labels.device.type == "cpu" and not torch.compiler.is_compiling()  # looking would stall a GPU
        if on_cpu and count and not (0 <= int(labels.min()) and int(labels.max()) <= classes):
            raise ValueError(
                f"labels: got {int(labels.min())}..{int(labels.max())}; expected 0..{classes - 1} ({classes}: none)"
            )
        if self.drops_conditions:
            labels = self.label_embedding.drop(labels)
        return self.label_embedding(labels)[:, None], None


class TokenStack(nn.Module):
    """Linear → sinusoidal positions → QGFD encoder blocks → LayerNorm → Linear, `in_dim` → `out_dim` wide."""

    def __init__(self, in_dim: int, out_dim: int, config: QGFDConfig, layers: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(in_dim, config.hidden_size)
        self.blocks = nn.ModuleList(QGFDEncoderBlock(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, out_dim)

    def forward(self, x: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:  # [B, L, in] -> [B, L, out]
        x = self.in_proj(x)
        x = x + sincos_positions(position_ids, x.shape[-1]).to(x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.out_proj(self.norm(x))


def unit_scale(x: Tensor) -> Tensor:
    """LayerNorm without weight: each token has mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])


def batch_size(batch: Batch) -> int:
    """Number of samples."""
    return len(next(iter(batch.values())))


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:  # [B, L], bool [B, L] -> [B]
    """The mean over a sample's real tokens; 0 where it has none."""
    if mask is None:
        return x.mean(1)
    return (x * mask).sum(1) / mask.sum(1).clamp_min(1)


def grid_positions(*sizes: int, device: torch.device | str = "cpu") -> Tensor:  # [product of sizes, axes], int64
    """Coordinates of a grid's cells, the last axis fastest."""
    axes = [torch.arange(size, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def length_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor | None:
    """bool [B, longest], True within a sample's length; None where all are equal."""
    if len(set(lengths)) <= 1:
        return None
    ends = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device) < ends[:, None]


def sample_lengths(count: int, length: int | Sequence[int] | None, default: int) -> list[int]:
    """A length for each of `count` samples. Raises ValueError for another number of them, or one below 1."""
    lengths = [default if length is None else length] * count if length is None or isinstance(length, int) else length
    lengths = [int(n) for n in lengths]
    if len(lengths) != count or min(lengths, default=1) < 1:
        raise ValueError(f"length: got {length}; expected a number of 1 or more, or one for each of {count} samples")
    return lengths


def no_lengths(modality: str, length: int | Sequence[int] | None) -> None:
    """Raises ValueError where a length is asked for of a modality that has none to choose."""
    if length is not None:
        raise ValueError(f"length: got {length}; samples of modality {modality!r} have one size: leave it out")


def join_conditions(parts: list[Condition]) -> Condition:
    """Conditions of the same samples, one after the other."""
    parts = [part for part in parts if part[0] is not None]
    if not parts:
        return None, None
    tokens = torch.cat([part[0] for part in parts], 1)
    if all(mask is None for _, mask in parts):
        return tokens, None
    masks = [torch.ones(t.shape[:2], dtype=torch.bool, device=t.device) if m is None else m for t, m in parts]
    return tokens, torch.cat(masks, 1)


def as_mask(mask: Tensor | None, name: str, shape: tuple[int, ...]) -> Tensor | None:
    """An attention mask of 0 and 1, or bool, as bool. Raises ValueError for another shape."""
    if mask is None:
        return None
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name}: got shape {list(mask.shape)}; expected {list(shape)}, 1 = attend")
    return mask.bool()
