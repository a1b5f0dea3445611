"""Decoding of one prompt with stale keys and values: everything is recomputed, then what is stale is put back."""

import torch
from generation.plain import predict, transfer_counts


class StaleKeysValues:
    """Hooks on the projections of every block: columns that are not `fresh` get what was computed for them last."""

    def __init__(self, model):
        self.stored, self.fresh = {}, None
        projections = [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("k_proj", "v_proj")]
        self.handles = [module.register_forward_hook(self._replace) for module in projections]

    def _replace(self, module, inputs, output):
        if module in self.stored:
            output = torch.where(self.fresh[None, :, None], output, self.stored[module])
        self.stored[module] = output
        return output

    def remove(self):
        for handle in self.handles:
            handle.remove()


def segments(prompt, mask_id, gen_length, block_length):
    """The prompt's own masks, then the blocks of new tokens."""
    start, last = prompt.shape[1], prompt.shape[1] + gen_length
    parts = [(0, start)] if (prompt == mask_id).any() else []
    return parts + [(begin, min(begin + block_length, last)) for begin in range(start, last, block_length)]


@torch.no_grad()
def cached(model, prompt, gen_length, block_length, cache, interval=None, steps=None, threshold=None, **options):
    """Fast-dLLM's prefix or dual cache, committing by count (`steps` a block) or threshold: (tokens, steps taken).

    `options`: cfg_scale, encoder_hidden_states, told_time (a model with a timestep embedding).
    """
    mask_id, start, shift = model.config.mask_token_id, prompt.shape[1], int(model.config.logit_shift)
    cfg_scale, states = options.get("cfg_scale", 0.0), options.get("encoder_hidden_states")
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], dim=1)
    given, total, taken = x != mask_id, int((x == mask_id).sum()), 0
    stale = None
    try:
        for begin, end in segments(prompt, mask_id, gen_length, block_length):
            left, step = int((x[:, begin:end] == mask_id).sum()), 0
            counts = transfer_counts(left, steps or left)
            while (x[:, begin:end] == mask_id).any():
                whole = step == 0 or (interval is not None and step % interval == 0)
                if whole and stale:
                    stale.remove()
                if whole:
                    stale = StaleKeysValues(model)
                columns = torch.arange(x.shape[1])
                last = start + gen_length if cache == "prefix" else end
                stale.fresh = (columns >= begin - shift) & (columns < last)
                inputs = {"timesteps": (x == mask_id).sum()[None] / total} if options.get("told_time") else {}
                p, x0 = predict(model, x, given, cfg_scale, states, **inputs)
                score = p.gather(-1, x0[..., None])[0, :, 0]
                score[(x[0] != mask_id) | (columns < begin) | (columns >= end)] = -1
                chosen = score.topk(counts[step]).indices if threshold is None else (score >= threshold).nonzero()[:, 0]
                chosen = chosen if len(chosen) else score.argmax()[None]
                x[0, chosen] = x0[0, chosen]
                step, taken = step + 1, taken + 1
    finally:
        if stale:
            stale.remove()
    return x, taken
