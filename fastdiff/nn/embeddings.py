"""Embeddings of time, class label, image patches and position, as a DiT uses them (Peebles & Xie, 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM_GROUPS = 32  # of ConvStem's GroupNorm
_MANY_CHANNELS = 32  # of an image whose patches are cut channels last


def sincos_2d(grid_h: int, grid_w: int, dim: int, *, device: torch.device | str | None = None) -> Tensor:
    """Fixed sine-cosine positions of a `grid_h` x `grid_w` grid, row by row: `[grid_h * grid_w, dim]`, float32.

    The first half of a row encodes the column, the second half the row; each half holds sines, then cosines, of
    the coordinate times 10000^(-i / (dim / 4)) (the layout of MAE and DiT). Any grid has positions, of whatever
    size: coordinates are counted in patches. Raises ValueError where dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: got {dim}; 2-D sine-cosine positions need a multiple of 4")
    columns = _sincos(torch.arange(grid_w, device=device), dim // 2)[None].expand(grid_h, grid_w, dim // 2)
    rows = _sincos(torch.arange(grid_h, device=device), dim // 2)[:, None].expand(grid_h, grid_w, dim // 2)
    return torch.cat([columns, rows], dim=-1).reshape(grid_h * grid_w, dim)


def sincos_positions(position_ids: Tensor, dim: int) -> Tensor:  # [L, axes] -> [L, dim], float32
    """Fixed sine-cosine positions of tokens with any number of coordinates, which share the width.

    Each axis has an equal, even part of `dim`, of sines, then cosines; what is left over is zero. Raises ValueError
    where an axis would get nothing.
    """
    axes = position_ids.shape[1]
    part = dim // (2 * axes) * 2 if axes else 0
    if part == 0:
        raise ValueError(f"position_ids: got {axes} axes for a width of {dim}; expected 1 to {dim // 2}")
    encoded = torch.cat([_sincos(coordinates, part) for coordinates in position_ids.unbind(1)], dim=1)
    return F.pad(encoded, (0, dim - encoded.shape[1]))


def _sincos(coordinates: Tensor, dim: int) -> Tensor:  # [N] -> [N, dim], float32
    """Sines, then cosines, of the coordinate times 10000^(-i / (dim / 2))."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=coordinates.device) / (dim // 2))
    angles = coordinates.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class FourierEmbedding(nn.Module):
    """Sinusoids of the timestep at high frequencies, then Linear → GELU → Linear: `[B]` of any real dtype → `[B, dim]`.

    They are sines, then cosines, of 2π·f·t with frequency_dim / 2 frequencies f from 1 to 1000, evenly spaced in their
    logarithm, in float32: those of transformer latent diffusion, which hands in 100·t of a t in [0, 1].
    Raises ValueError where frequency_dim is not an even number of at least 4.
    """

    def __init__(self, dim: int, *, frequency_dim: int = 128) -> None:
        super().__init__()
        if frequency_dim % 2 or frequency_dim < 4:
            raise ValueError(f"frequency_dim: got {frequency_dim}; expected an even number of at least 4")
        self.frequency_dim = frequency_dim
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def sinusoids(self, timestep: Tensor) -> Tensor:  # [B] -> [B, frequency_dim], float32
        logarithms = torch.linspace(0, math.log(1000.0), self.frequency_dim // 2, device=timestep.device)
        angles = timestep.float()[:, None] * (2 * math.pi * torch.exp(logarithms))
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def forward(self, timestep: Tensor) -> Tensor:  # [B] -> [B, dim]
        return self.mlp(self.sinusoids(timestep).to(next(self.mlp.parameters()).dtype))


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, then Linear → SiLU → Linear: `[B]` of any real dtype → `[B, dim]`.

    The sinusoids are cosines, then sines (`sine_first`: the other way round), of
    t·10000^(-i / (frequency_dim / 2 - frequency_shift)), in float32. `frequency_shift` is 0 in DiT; diffusers'
    DiTTransformer2DModel has 1.
    Raises ValueError where frequency_dim is odd or not above 2·frequency_shift.
    """

    def __init__(
        self, dim: int, *, frequency_dim: int = 256, frequency_shift: float = 0.0, sine_first: bool = False
    ) -> None:
        super().__init__()
        if frequency_dim % 2 or frequency_dim <= 2 * frequency_shift:
            raise ValueError(f"frequency_dim: got {frequency_dim}; expected an even number above {2 * frequency_shift}")
        self.frequency_dim, self.frequency_shift, self.sine_first = frequency_dim, frequency_shift, sine_first
        self.mlp = nn.Sequential(nn.Linear(frequency_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def sinusoids(self, timestep: Tensor) -> Tensor:  # [B] -> [B, frequency_dim], float32
        half = self.frequency_dim // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - self.frequency_shift)
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
        waves = (angles.sin(), angles.cos()) if self.sine_first else (angles.cos(), angles.sin())
        return torch.cat(waves, dim=1)

    def forward(self, timestep: Tensor) -> Tensor:  # [B] -> [B, dim]
        return self.mlp(self.sinusoids(timestep).to(next(self.mlp.parameters()).dtype))


def check_label_range(labels: Tensor, num_classes: int, null_label: bool = True) -> None:
    """Raises ValueError where labels are not classes, 0 … num_classes - 1, or the null label, num_classes."""
    last = num_classes - (not null_label)
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) <= last):
        about = f"{num_classes} is the null label" if null_label else "there is no null label"
        raise ValueError(
            f"class_labels: got values {int(labels.min())}..{int(labels.max())}; expected 0..{last} ({about})"
        )


class LabelEmbedding(nn.Module):
    """A table of `num_classes` class vectors and one null vector (index `num_classes`): `[B]` int64 → `[B, dim]`.

    Without `null_label` there is no null vector, and no guidance.

    In training a label becomes the null one with probability `dropout_prob`, which is what classifier-free
    guidance needs: `drop` draws it, from torch's generator or the one handed in, and `forward` looks labels up.
    Raises ValueError for a probability outside [0, 1] (or above 0 without a null label) or, on CPU tensors, a label out
    of range.
    """

    def __init__(self, num_classes: int, dim: int, *, dropout_prob: float = 0.1, null_label: bool = True) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}; expected at least 1")
        if not 0.0 <= dropout_prob <= 1.0:
            raise ValueError(f"dropout_prob: got {dropout_prob}; expected a probability in [0, 1]")
        if dropout_prob and not null_label:
            raise ValueError(f"dropout_prob: got {dropout_prob} without a null label; expected 0")
        self.num_classes, self.dropout_prob, self.null_label = num_classes, dropout_prob, null_label
        self.embedding_table = nn.Embedding(num_classes + null_label, dim)

    def check(self, labels: Tensor) -> None:
        """Raises ValueError or TypeError where `labels` are not int64 in [0, num_classes]; waits for a GPU."""
        if labels.dtype != torch.int64:
            raise TypeError(f"class_labels: got dtype {labels.dtype}; expected torch.int64")
        check_label_range(labels, self.num_classes, self.null_label)

    def drop(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:  # [B] -> [B]
        """In training mode labels with some replaced by the null label, otherwise the labels; checks them on a CPU."""
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check(labels)  # on a GPU it would stall the stream: there the lookup itself asserts
        if not self.training or self.dropout_prob == 0:
            return labels
        device = labels.device if generator is None else generator.device
        dropped = torch.rand(labels.shape, device=device, generator=generator) < self.dropout_prob
        return torch.where(dropped.to(labels.device), self.num_classes, labels)

    def forward(self, labels: Tensor) -> Tensor:  # [B] -> [B, dim]
        return self.embedding_table(labels)


class _PatchProjection(nn.Module):
    """Holds the projection under the names of DiT's strided convolution: weight [D, C, p, p], bias [D]."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.xavier_uniform_(self.weight.view(dim, -1))

    def forward(self, patches: Tensor, channels_last: bool = False) -> Tensor:  # [B, N, C * p * p] -> [B, N, D]
        weight = self.weight.permute(0, 2, 3, 1) if channels_last else self.weight
        return F.linear(patches, weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: `[B, C, H, W]` → `[B, (H / p)·(W / p), dim]`.

    Patches do not overlap, so the projection is a matrix product rather than a convolution; H and W may be any
    multiples of `patch_size`. Raises ValueError where they are not or the channels differ.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.in_channels, self.patch_size = in_channels, patch_size
        self.proj = _PatchProjection(in_channels, dim, patch_size)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            expected = f"[batch, {self.in_channels}, height, width]"
            raise ValueError(f"sample: got shape {list(image.shape)}; expected {expected}")
        batch, channels, height, width = image.shape
        p = self.patch_size
        if height % p or width % p or height == 0 or width == 0:
            raise ValueError(f"sample: got {height} x {width} pixels; expected positive multiples of patch_size = {p}")
        patches = image.reshape(batch, channels, height // p, p, width // p, p)
        last = channels >= _MANY_CHANNELS  # a stem's: then the copy is of whole runs of channels
        patches = patches.permute(0, 2, 4, 3, 5, 1) if last else patches.permute(0, 2, 4, 1, 3, 5)
        return self.proj(patches.reshape(batch, (height // p) * (width // p), channels * p * p), last)


class ConvStem(nn.Sequential):
    """Two 5×5 convolutions, each with SiLU and GroupNorm, before the patches: `[B, C, H, W]` → `[B, width, H, W]`.

    The stem of Lumina's small image models (minRF) and LLM2DiT. Raises ValueError where width is not a multiple of the
    32 groups.
    """

    def __init__(self, in_channels: int, width: int) -> None:
        if width % STEM_GROUPS:
            raise ValueError(f"width: got {width}; expected a multiple of {STEM_GROUPS}, the groups of its norm")
        layers = []
        for channels in (in_channels, width):
            convolution = nn.Conv2d(channels, width, 5, padding=2)
            layers += [convolution, nn.SiLU(), nn.GroupNorm(STEM_GROUPS, width)]
        super().__init__(*layers)
        self.in_channels = in_channels

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != self.in_channels:
            expected = f"[batch, {self.in_channels}, height, width]"
            raise ValueError(f"sample: got shape {list(image.shape)}; expected {expected}")
        return super().forward(image)
