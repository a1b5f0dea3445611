"""diffusion-llm's captioning as it was published, written anew: every logit, one loop over steps, one row."""

import math

import torch
import torch.nn.functional as F


def mask_rate(t):
    return 1 - torch.cos(math.pi * torch.as_tensor(t, dtype=torch.float64) / 2)


def loss(model, clean, may_be_masked, t, uniform, states):
    """The mean cross entropy of masked tokens, [B, L] each masked where its uniform number is below the rate."""
    mask_id = model.config.mask_token_id
    masked = (uniform < mask_rate(t)[:, None]) & may_be_masked
    logits = model(clean.masked_fill(masked, mask_id), encoder_hidden_states=states).logits
    logits[..., mask_id] = -math.inf
    return F.cross_entropy(logits[masked], clean[masked]), masked


@torch.no_grad()
def generate(model, start, length, steps, states, *, uniform=None):
    """A caption [length] of an image's states [1, M, C], from masks alone.

    In each step a masked position is unmasked with probability (r_t - r_s) / r_t: where its own uniform number, below
    r_t so far, is not below r_s; or, without these numbers, so many of the surest as that is of those left.
    """
    mask_id = model.config.mask_token_id
    x = torch.tensor([[start] + [mask_id] * length])
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for number, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        logits = model(x, encoder_hidden_states=states).logits[0].double()
        logits[:, mask_id] = -math.inf
        surest, token = logits.softmax(-1).max(-1)
        masked = x[0] == mask_id
        if uniform is not None:
            chosen = masked & (uniform >= mask_rate(s))
        else:
            share = float((mask_rate(t) - mask_rate(s)) / mask_rate(t))
            count = int(masked.sum()) if number == steps - 1 else round(share * int(masked.sum()))
            chosen = torch.zeros_like(masked)
            chosen[surest.masked_fill(~masked, -1).topk(count).indices] = True
        x[0] = torch.where(chosen, token, x[0])
    return x[0, 1:]
