"""Latent Fashion-MNIST diffusion in plain PyTorch: model and loops, written anew with the published names of weights.

https://github.com/shreenithi/fmnist-t2i-diffusion. Its attention is flash-attn's layers, without biases, or torch's
MultiheadAttention.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class FlashAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x, source):
        q, k, v = (
            projection(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TorchAttention(nn.MultiheadAttention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads, batch_first=True)

    def forward(self, x, source):
        return super().forward(x, source, source, need_weights=False)[0]


class ConvMLP(nn.Module):
    def __init__(self, dim, ratio):
        super().__init__()
        hidden = ratio * dim
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dw = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x, height, width):
        h = self.fc1(x).transpose(1, 2).unflatten(2, (height, width))
        return self.fc2(F.gelu(self.dw(h).flatten(2).transpose(1, 2)))


class Block(nn.Module):
    def __init__(self, dim, heads, cross_heads, attention):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = attention(dim, heads), attention(dim, cross_heads)
        self.mlp = ConvMLP(dim, 4)

    def forward(self, x, context, height, width):
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.mlp(self.norm3(x), height, width)


class Sinusoids(nn.Module):
    def __init__(self, size):
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(1.0), math.log(1000.0), size // 2))
        self.register_buffer("frequencies", 2 * math.pi * frequencies)

    def forward(self, t):
        return torch.cat([torch.sin(t * self.frequencies), torch.cos(t * self.frequencies)], -1)


class Holder(nn.Module):
    """A layer under a name of its own."""

    def __init__(self, name, layer):
        super().__init__()
        self.add_module(name, layer)


class PlainLatentDiffusion(nn.Module):
    def __init__(self, dim=384, layers=12, heads=6, cross_heads=4, size=8, patch=1, channels=4, classes=10,
                 attention=FlashAttention, table=None):  # fmt: skip
        super().__init__()
        self.patch, self.channels = patch, channels
        self.patch_embed = Holder("proj", nn.Conv2d(channels, dim, patch, patch))
        self.patch_unembed = Holder("linear", nn.Linear(dim, channels * patch * patch))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2, dim))
        self.time_embed = nn.Sequential(Sinusoids(128), nn.Linear(128, dim), nn.GELU(), nn.Linear(dim, dim))
        if table is not None:
            self.text_embed = nn.Embedding(classes, table)
        self.text_proj = nn.Linear(table or classes, dim)
        self.context_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, cross_heads, attention) for _ in range(layers))
        self.null_token = nn.Parameter(torch.zeros(1, dim))  # which nothing reads

    def forward(self, x, text, t):  # text: one-hot rows, or labels with a table
        batch, _, height, width = x.shape
        h = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        text = self.text_proj(self.text_embed(text) if hasattr(self, "text_embed") else text)
        context = self.context_norm(torch.stack([self.time_embed(100 * t[:, None]), text], 1))
        rows, columns = height // self.patch, width // self.patch
        for block in self.blocks:
            h = block(h, context, rows, columns)
        h = self.patch_unembed.linear(h).view(batch, rows, columns, self.channels, self.patch, self.patch)
        return h.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def loss(model, x0, t, noise, text, dropped):
    """Of one training step: mean squared error of the image at noise levels t; a dropped text is zeros."""
    level = t[:, None, None, None]
    text = torch.where(dropped[:, None], torch.zeros_like(text), text)
    return F.mse_loss(model(level * noise + (1 - level) * x0, text, t), x0)


@torch.no_grad()
def draw(model, noises, text, steps):
    """The image is predicted `steps` times, each time from fresh noise of the next of evenly spaced levels.

    The result has the noise of the last level, 0.01.
    """
    levels, x = torch.linspace(0.99, 0.01, steps + 1), noises()
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        predicted = model(x, text, now.expand(len(x)))
        x = (1 - after) * predicted + after * noises()
    return x
