"""The likelihood bound without chance: every mask of a short text, from plain logits."""

import itertools
import math

import torch


@torch.no_grad()
def expected_sum(model, ids, maskable, time_of, cfg=0.0, **inputs):
    """Mean over k of the mean over all masks of k tokens of n/k · their cross entropies: plain, from logits.

    `cfg` is LLaDA's guidance, u + (cfg + 1)·(c - u): u has the prompt masked (and sees no condition).
    """
    mask_token_id = model.config.mask_token_id
    places, total = maskable.nonzero().flatten().tolist(), 0.0
    n = len(places)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(places, k))
        for subset in subsets:
            masked, chosen = ids.clone(), list(subset)
            masked[chosen] = mask_token_id
            if model.config.timestep_embedding:
                inputs["timesteps"] = time_of(torch.tensor([k / n]))
            logits = model(masked[None], **inputs).logits[0].clone()
            if cfg:
                hidden = dict(inputs)
                if "encoder_hidden_states" in inputs:
                    shape = inputs["encoder_hidden_states"].shape[:2]
                    hidden["encoder_attention_mask"] = torch.zeros(shape, dtype=torch.bool)
                other = model(masked.masked_fill(~maskable, mask_token_id)[None], **hidden).logits[0]
                logits = other + (cfg + 1) * (logits - other)
            logits[:, mask_token_id] = -math.inf
            losses = -logits.log_softmax(-1)[chosen, ids[chosen]]
            total += float(losses.sum()) * (n / k) / len(subsets) / n
    return total


def exact(model, texts, maskable=None, time_of=None):
    maskable = [torch.ones_like(ids, dtype=torch.bool) for ids in texts] if maskable is None else maskable
    sums = [expected_sum(model, ids, mask, time_of) for ids, mask in zip(texts, maskable, strict=True)]
    return sum(sums) / sum(int(mask.sum()) for mask in maskable)
