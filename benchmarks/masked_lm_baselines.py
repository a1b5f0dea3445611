"""What the operators of masked language models are compared with: the steps of public decoders, written anew.

Nothing here is tuned, and nothing is made slower than public code has it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def llada_sample(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:  # [R, V] -> token [R], confidence [R]
    """LLaDA's step: Gumbel noise in float64 (none at temperature 0), argmax, float64 softmax, gather."""
    noisy = logits
    if temperature != 0:
        wide = logits.to(torch.float64)
        noise = torch.rand_like(wide)
        noisy = wide.exp() / (-torch.log(noise)) ** temperature
    token = noisy.argmax(dim=-1)
    p = F.softmax(logits.to(torch.float64), dim=-1)
    return token, p.gather(-1, token[:, None])[:, 0]


def dream_sample(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Dream's step with top-p: the vocabulary sorted, the tail masked, softmax, multinomial."""
    logits = logits.float() / temperature
    values, order = torch.sort(logits, descending=True)
    cumulative = F.softmax(values, dim=-1).cumsum(dim=-1)
    remove = cumulative > top_p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    remove = torch.zeros_like(remove).scatter_(-1, order, remove)
    p = F.softmax(logits.masked_fill(remove, torch.finfo(logits.dtype).min), dim=-1)
    token = torch.multinomial(p, 1)
    return token[:, 0], p.gather(-1, token)[:, 0]


def softmax_sample(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy in float32, with the entropy: what one writes without thinking of float64."""
    p = F.softmax(logits.float(), dim=-1)
    confidence, token = p.max(dim=-1)
    return token, confidence, -(p * torch.log(p + 1e-10)).sum(dim=-1)
