"""What fastdiff is compared with: its operators and DiT in plain PyTorch, as public diffusion models are written.

The layout is that of Peebles and Xie (2023): LayerNorm without affine, `modulate`, six chunks of one projection,
scaled_dot_product_attention, tanh-GELU. Nothing here is tuned, and nothing is made slower than usual.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import DiTConfig


def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # [B, N, D], [B, D], [B, D]
    normed = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_residual_adaln(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    stream = residual + gate.unsqueeze(1) * branch
    return stream, adaln(stream, shift, scale)


def masked_loss_of_all_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, row_weight: Tensor
) -> Tensor:  # [R, D], [V, D], [R], [R], [R]
    """As LLaDA's guidelines train: logits of every position, the loss of the masked ones, weighted by 1/t."""
    logits = F.linear(hidden, weight)
    return (F.cross_entropy(logits[mask], targets[mask], reduction="none") * row_weight[mask]).sum()


def loss_of_rows(hidden: Tensor, weight: Tensor, targets: Tensor, row_weight: Tensor) -> Tensor:
    return (F.cross_entropy(F.linear(hidden, weight), targets, reduction="none") * row_weight).sum()


def masked_loss_of_gathered_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, row_weight: Tensor, loss: Callable = loss_of_rows
) -> Tensor:
    """The same without the rows that are not masked. `loss`: of the gathered rows."""
    return loss(hidden[mask], weight, targets[mask], row_weight[mask])


def compiled(function: Callable) -> Callable:
    """torch.compile of it, for the shapes it is called with."""
    return torch.compile(function, dynamic=False, fullgraph=True)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, frequencies: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
        angles = timestep.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, D]
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(dim, heads)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainDiT(nn.Module):
    """A DiT of a `DiTConfig`'s sizes, called as fastdiff.models.DiT is."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        height, width = config.image_size
        self.patch, self.channels, self.classes = patch, config.in_channels, config.num_classes
        self.dropout = config.class_dropout_prob
        self.embed = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        tokens = (height // patch) * (width // patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, dim), requires_grad=False)
        self.time = TimestepEmbedder(dim, config.frequency_embedding_size)
        self.label = nn.Embedding(config.num_classes + 1, dim)
        self.blocks = nn.ModuleList(Block(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.out = nn.Linear(dim, patch * patch * config.out_channels)

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:  # [B, C, H, W], [B], [B]
        x = self.embed(sample).flatten(2).transpose(1, 2) + self.positions
        if self.training:
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.dropout
            class_labels = torch.where(dropped, self.classes, class_labels)
        c = self.time(timestep) + self.label(class_labels)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.out(modulate(self.norm(x), shift, scale))
        batch, _, height, width = sample.shape
        grid = (height // self.patch, width // self.patch)
        x = x.reshape(batch, *grid, self.patch, self.patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


# ------------------------------------------------------------------------------------------------ unmasking
# Tensors as in the public generation loops of LLaDA and Fast-dLLM: x [B, L] token ids, mask where x is masked, x0 the
# sampled ids, confidence and entropy [B, L]. Each returns the positions to commit, and the caller writes x0 there.
def _selected(confidence: Tensor, counts: list[int]) -> Tensor:
    transfer = torch.zeros_like(confidence, dtype=torch.bool)
    for j, count in enumerate(counts):
        _, chosen = torch.topk(confidence[j], k=count)
        transfer[j, chosen] = True
    return transfer


def transfer_by_count(mask: Tensor, confidence: Tensor, counts: Tensor) -> Tensor:  # counts [B]
    """LLaDA: the most confident `counts[b]` positions of each row."""
    confidence = torch.where(mask, confidence, -torch.inf)
    transfer = torch.zeros_like(mask)
    for j in range(confidence.shape[0]):
        _, chosen = torch.topk(confidence[j], k=counts[j])
        transfer[j, chosen] = True
    return transfer


def transfer_by_threshold(mask: Tensor, confidence: Tensor, threshold: float) -> Tensor:
    """Fast-dLLM: all masked positions best first, those below the threshold but the first taken back one by one."""
    confidence, counts = torch.where(mask, confidence, -torch.inf), mask.sum(dim=1)
    transfer = torch.zeros_like(mask)
    for j in range(confidence.shape[0]):
        _, chosen = torch.topk(confidence[j], k=counts[j])
        transfer[j, chosen] = True
        for k in range(1, counts[j]):
            if confidence[j, chosen[k]] < threshold:
                transfer[j, chosen[k]] = False
    return transfer


def transfer_by_factor(mask: Tensor, confidence: Tensor, factor: float) -> Tensor:
    """Fast-dLLM: best first while the confidence is above 1 - factor / (n + 1), n = 1, 2, …; at least one."""
    confidence = torch.where(mask, confidence, -torch.inf)
    counts = []
    for j in range(confidence.shape[0]):
        ordered = torch.sort(confidence[j][mask[j]], descending=True)[0]
        n = 1
        while n < len(ordered) and ordered[n] > 1 - factor / (n + 2):
            n += 1
        counts.append(min(n, len(ordered)))
    return _selected(confidence, counts)


def transfer_by_entropy_budget(mask: Tensor, entropy: Tensor, budget: float) -> Tensor:
    """Entropy-bounded: the lowest entropies while those before sum to at most the budget."""
    transfer = torch.zeros_like(mask)
    for j in range(mask.shape[0]):
        ordered, chosen = torch.sort(torch.where(mask[j], entropy[j], torch.inf))
        within = torch.cumsum(ordered, dim=0) - ordered <= budget
        transfer[j, chosen[within]] = True
    return transfer & mask


def transfer_ancestral(mask: Tensor, probability: float) -> Tensor:
    """MDLM: each position on its own; no loop over rows."""
    return mask & (torch.rand(mask.shape, device=mask.device) < probability)
