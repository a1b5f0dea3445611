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


def end_log_prob(logits: Tensor, end_token_ids: tuple[int, ...]) -> Tensor:  # [..., V] -> [...]
    """log P(an end token) as length predictors read it off a softmax of the whole window."""
    return logits.float().log_softmax(-1)[..., list(end_token_ids)].logsumexp(-1)


@torch.no_grad()
def llada_generate(
    model, prompts: Tensor, new_tokens: int, block_length: int, steps: int, mask_token_id: int
) -> Tensor:
    """LLaDA's public loop at temperature 0 with low-confidence remasking, for prompts [B, P] of one length.

    `model(x).logits` at i predict token i. `steps` over all blocks; logits of every position, float64 softmax of all of
    them, topk a row. The mask token is kept out of the logits.
    """
    batch, start = prompts.shape
    x = torch.full((batch, start + new_tokens), mask_token_id, dtype=torch.long, device=prompts.device)
    x[:, :start] = prompts
    blocks = new_tokens // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        left = (x[:, end - block_length : end] == mask_token_id).sum(1)
        for step in range(steps // blocks):
            masked = x == mask_token_id
            logits = model(x).logits
            logits[..., mask_token_id] = -torch.inf
            x0 = logits.argmax(dim=-1)
            p = F.softmax(logits.to(torch.float64), dim=-1)
            confidence = p.gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            x0 = torch.where(masked, x0, x)
            transfer = torch.zeros_like(masked)
            for row in range(batch):
                count = int(left[row]) // (steps // blocks) + (step < int(left[row]) % (steps // blocks))
                transfer[row, confidence[row].topk(count).indices] = True
            x[transfer] = x0[transfer]
    return x
