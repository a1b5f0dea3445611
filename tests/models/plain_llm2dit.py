"""LLM2DiT in plain PyTorch: its Q-Former, its DiT and its loops, written anew with the published names of weights.

https://github.com/Coslate/LLM2DiT-Bridging-GPT-2-and-Diffusion-Transformers-via-Q-Former
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, source=None, mask=None, turns=None):
        source = x if source is None else source
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(source)), self.wv(source)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if turns is not None:  # neighbouring channels are one complex number
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.float().unflatten(-1, (-1, 2)).contiguous()) * turns)
                .flatten(-2).to(v.dtype) for t in (q, k)
            )  # fmt: skip
        mask = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = 256 * math.ceil(int(2 * 4 * dim / 3) / 256)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class QFormerBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attn_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(dim, eps=1e-5) for _ in range(3))
        self.self_attn, self.cross_attn = Attention(dim, heads), Attention(dim, heads)
        self.ffn = FeedForward(dim)


class QueryEmbedder(nn.Module):
    def __init__(self, dim, conditioning_dim, queries, layers, blocks=2, heads=8):
        super().__init__()
        self.query_table = nn.Embedding(queries, dim)
        self.blocks = nn.ModuleList(QFormerBlock(dim, heads) for _ in range(blocks))
        self.output_proj = nn.Linear(dim, conditioning_dim)
        self.query_to_layer = nn.Linear(queries, layers, bias=False)

    def forward(self, states, mask):
        x = self.query_table.weight.expand(len(states), -1, -1)
        for block in self.blocks:
            x = x + block.self_attn(block.attn_norm(x))
            x = x + block.cross_attn(block.cross_norm(x), states, mask)
            x = x + block.ffn(block.ffn_norm(x))
        return self.query_to_layer(self.output_proj(x).transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.feed_forward = Attention(dim, heads), FeedForward(dim)
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim, eps=1e-5), nn.LayerNorm(dim, eps=1e-5)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, turns):
        shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in self.adaLN_modulation(c).chunk(6, 1))
        x = x + gate1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, turns=turns)
        return x + gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, dim, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = (m[:, None] for m in self.adaLN_modulation(c).chunk(2, 1))
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)


class PlainLLM2DiT(nn.Module):
    def __init__(self, dim=256, layers=10, heads=8, classes=10, patch=2, channels=3, text_dim=768, queries=4):
        super().__init__()
        self.patch, self.heads, self.classes = patch, heads, classes
        half = dim // 2
        self.init_conv_seq = nn.Sequential(
            nn.Conv2d(channels, half, 5, padding=2), nn.SiLU(), nn.GroupNorm(32, half),
            nn.Conv2d(half, half, 5, padding=2), nn.SiLU(), nn.GroupNorm(32, half),
        )  # fmt: skip
        self.x_embedder = nn.Linear(patch * patch * half, dim)
        self.t_embedder, self.y_embedder = TimestepEmbedder(dim), LabelEmbedder(classes, dim)
        self.layers = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.final_layer = FinalLayer(dim, patch * patch * channels)
        self.query_embedder = QueryEmbedder(text_dim, min(dim, 1024), queries, layers, heads=min(heads, 8))

    def forward(self, x, t, labels=None, text_states=None, text_mask=None):
        batch, channels, height, width = x.shape
        p, rows, columns = self.patch, height // self.patch, width // self.patch
        h = self.init_conv_seq(x)
        h = h.view(batch, -1, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        h = self.x_embedder(h)
        dim = h.shape[-1] // self.heads
        rates = 10000.0 ** -(torch.arange(0, dim, 2, device=x.device).float() / dim)
        angles = torch.outer(torch.arange(rows * columns, device=x.device), rates)
        turns = torch.polar(torch.ones_like(angles), angles)
        time = self.t_embedder(t)
        if text_states is None:
            c = (time + self.y_embedder.embedding_table(labels))[:, None].expand(-1, len(self.layers), -1)
        else:
            c = time[:, None] + self.query_embedder(text_states, text_mask)
        for index, layer in enumerate(self.layers):
            h = layer(h, c[:, index], turns)
        h = self.final_layer(h, c[:, -1])
        h = h.view(batch, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return h.reshape(batch, channels, height, width)


def schedule(steps, beta1=1e-4, beta2=2e-2):
    """By level i of 1 … T (index 0 is the image): β and the running product of 1 - β, of T evenly spaced β."""
    betas = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(beta1, beta2, steps, dtype=torch.float64)])
    return betas, torch.cumprod(1 - betas, 0)


def loss(model, x0, level, noise, text_states, text_mask, steps):
    """Of one training step: mean squared error of the noise at levels i of 1 … T."""
    products = schedule(steps)[1][level].float()[:, None, None, None]
    noisy = products.sqrt() * x0 + (1 - products).sqrt() * noise
    predicted = model(noisy, level / steps, text_states=text_states, text_mask=text_mask)
    return F.mse_loss(predicted, noise)


@torch.no_grad()
def draw(model, noises, text_states, text_mask, steps, scale, shape):
    """DDPM from level T down to 1, guided away from the class of no label."""
    betas, products = schedule(steps)
    x = noises()
    nothing = torch.full((len(x),), model.classes)
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i / steps)
        conditional = model(x, t, text_states=text_states, text_mask=text_mask)
        unconditional = model(x, t, nothing)
        noise = unconditional + scale * (conditional - unconditional)
        x = (x - noise * float(betas[i] / (1 - products[i]).sqrt())) / float((1 - betas[i]).sqrt())
        if i > 1:
            x = x + float(betas[i].sqrt()) * noises()
    return x
