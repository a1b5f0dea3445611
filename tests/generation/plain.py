"""Decoding as it was published, with nothing left out: every logit, float64 softmax, Python loops over rows."""

import math

import torch

from fastdiff.kernels.token_sampling import reference as sampling
from fastdiff.kernels.unmask import reference as unmasking
from fastdiff.models import MaskedDiffusionLM, MaskedDiffusionLMConfig


def tiny(architecture="llada", **options):
    fields = dict(
        architecture=architecture, vocab_size=41, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=24,
    )  # fmt: skip
    return MaskedDiffusionLM(MaskedDiffusionLMConfig(**{**fields, **options})).double().eval()


@torch.no_grad()
def randomise(model, seed, head_scale=1.0):
    """New weights; a large head_scale makes the predictions peaked."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(std=0.5, generator=generator)
    model.head_weight.mul_(head_scale)
    return model


def without_draws(monkeypatch):
    """Random numbers of the float64 samplers are zeros: nothing greedy depends on them, and they take half the time."""

    def zeros(seed, sequence_ids, positions, step, draw):
        words = torch.zeros(torch.broadcast_shapes(sequence_ids.shape, positions.shape), dtype=torch.int64)
        return words, words

    for reference in (sampling, unmasking):
        monkeypatch.setattr(reference, "philox", zeros)


def prompts(seed, *lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 41, (1, length), generator=generator) for length in lengths]


def padded(rows, side="left", pad=0):
    width = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = row.shape[1]
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[i, place], mask[i, place] = row[0], 1
    return ids, mask


def predict(model, x, given, cfg_scale=0.0, encoder_hidden_states=None, **inputs):
    """Probabilities in float64, the mask token excluded, and the likeliest token of every position."""
    mask_id = model.config.mask_token_id
    if cfg_scale:
        both = torch.cat([x, x.masked_fill(given, mask_id)])
        condition = {}
        if encoder_hidden_states is not None:  # the unconditional half attends to none of them
            condition = dict(
                encoder_hidden_states=encoder_hidden_states.repeat(2, 1, 1),
                encoder_attention_mask=torch.tensor([[True], [False]]).expand(2, encoder_hidden_states.shape[1]),
            )
        inputs = {name: t.repeat(2) for name, t in inputs.items()}
        logits, un_logits = model(both, **condition, **inputs).logits.chunk(2)
        logits = un_logits + (cfg_scale + 1) * (logits - un_logits)
    else:
        logits = model(x, encoder_hidden_states=encoder_hidden_states, **inputs).logits
    logits = logits.clone()
    logits[..., mask_id] = -math.inf
    return torch.softmax(logits.to(torch.float64), dim=-1), logits.argmax(-1)


def transfer_counts(masked, steps):
    """How many tokens each step commits: evenly, the first `masked % steps` steps one more."""
    return [masked // steps + (step < masked % steps) for step in range(steps)]


@torch.no_grad()
def llada(model, prompt, steps, gen_length, block_length, cfg_scale=0.0, encoder_hidden_states=None):
    """LLaDA's generate() with low-confidence remasking at temperature 0, for one prompt [1, P]."""
    mask_id, start = model.config.mask_token_id, prompt.shape[1]
    x = torch.full((1, start + gen_length), mask_id)
    x[:, :start] = prompt
    given = x != mask_id
    blocks = gen_length // block_length
    for block in range(blocks):
        end = start + (block + 1) * block_length
        masked = int((x[:, end - block_length : end] == mask_id).sum())
        for count in transfer_counts(masked, steps // blocks):
            p, x0 = predict(model, x, given, cfg_scale, encoder_hidden_states)
            confidence = p.gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -math.inf
            confidence[x != mask_id] = -math.inf
            chosen = confidence[0].topk(count).indices
            x[0, chosen] = x0[0, chosen]
    return x


@torch.no_grad()
def parallel(model, prompt, gen_length, block_length, rule, number):
    """Fast-dLLM's threshold and factor rules and the entropy bound, one token at least; (tokens, steps)."""
    mask_id, start = model.config.mask_token_id, prompt.shape[1]
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], dim=1)
    steps = 0
    for begin in range(start, start + gen_length, block_length):
        while True:
            left = [i for i in range(begin, min(begin + block_length, x.shape[1])) if x[0, i] == mask_id]
            if not left:
                break
            steps += 1
            p, x0 = predict(model, x, x != mask_id)
            score = {i: float(p[0, i, x0[0, i]]) for i in left}
            entropy = {i: -sum(q * math.log(q) for q in p[0, i].tolist() if q > 0) for i in left}
            left.sort(key=lambda i: -score[i])
            chosen, spent = 0, 0.0
            for rank, i in enumerate(left):
                if rule == "threshold" and score[i] < number:
                    break
                if rule == "factor" and not (rank + 2) * (1 - score[i]) < number:
                    break
                if rule == "entropy_budget" and spent > number:
                    break
                spent += entropy[i]
                chosen += 1
            for i in left[: max(chosen, 1)]:
                x[0, i] = x0[0, i]
    return x, steps


@torch.no_grad()
def growing(model, prompt, window, room, block_length, ends, growth):
    """One prompt [1, P] in a window that grows, one token per step.

    Nothing is chosen behind an end token; `growth` more masks come where the window is full without one. Returns the
    new tokens [room], end tokens behind the window, and the window.
    """
    mask_id, start = model.config.mask_token_id, prompt.shape[1]
    x = torch.cat([prompt, torch.full((1, window), mask_id)], dim=1)
    begin, block = start, block_length or window
    while True:
        while begin < x.shape[1]:
            end = begin + block
            while (x[0, begin:end] == mask_id).any():
                p, x0 = predict(model, x, x != mask_id)
                score = torch.where(x[0] == mask_id, p[0].gather(1, x0[0, :, None])[:, 0], -1.0)
                score[end:] = -1.0
                place = int(score.argmax())
                x[0, place] = x0[0, place]
                ended = [i for i in range(start, x.shape[1]) if int(x[0, i]) in ends]
                if ended:
                    behind = x[0, ended[0] :]
                    behind[behind == mask_id] = x[0, ended[0]]
            begin = end
        if any(int(token) in ends for token in x[0, start:]) or x.shape[1] == start + room:
            fill = torch.full((1, start + room - x.shape[1]), ends[0])
            return torch.cat([x, fill], dim=1)[0, start:], x.shape[1] - start
        begin, block = x.shape[1], growth
        grown = min(growth, start + room - begin)
        x = torch.cat([x, torch.full((1, grown), mask_id)], dim=1)


def without(logits, tokens):
    return logits.index_fill(-1, torch.tensor(sorted(tokens)), -math.inf)


@torch.no_grad()
def dllm(model, prompt, steps, gen_length, block_length, counts, cfg_scale=0.0, cfg_keep=(), suppress=(), late=()):
    """dllm's MDLM sampler at temperature 0, for one prompt [1, P]; LLaDA's where `counts` are its.

    `counts(masks, steps)` are the tokens of each step of a block. `suppress` leave before the draw, `late` after it.
    """
    mask_id, start = model.config.mask_token_id, prompt.shape[1]
    x = torch.cat([prompt, torch.full((1, gen_length), mask_id)], dim=1)
    given = (x != mask_id) & ~torch.isin(x, torch.tensor(cfg_keep, dtype=torch.int64))
    blocks = math.ceil(gen_length / block_length)
    for block in range(blocks):
        end = min(start + (block + 1) * block_length, start + gen_length)
        masked = int((x[:, start + block * block_length : end] == mask_id).sum())
        for count in counts(masked, math.ceil(steps / blocks)):
            logits = model(x).logits
            if cfg_scale:
                unconditional = model(x.masked_fill(given, mask_id)).logits
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            logits = without(logits, {mask_id, *suppress})
            x0 = logits.argmax(-1)
            confidence = without(logits, {mask_id, *late}).softmax(-1).gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -math.inf
            confidence[x != mask_id] = -math.inf
            chosen = best(confidence[0], count)
            x[0, chosen] = x0[0, chosen]
    return x


def best(scores, count):
    """topk, which says nothing of ties: the first of them."""
    return scores.sort(descending=True, stable=True).indices[:count]


def dllm_counts(rate):
    """Its schedulers' tokens a step: n·(1 - r(s)/r(t)) of the n masks left, rounded."""

    def counts(masks, steps):
        result = []
        for step in range(steps, 0, -1):
            share = 1 - rate((step - 1) / steps) / rate(step / steps)
            result.append(min(int(torch.round(torch.tensor(masks, dtype=torch.float64) * share)), masks))
            masks -= result[-1]
        return [count for count in result if count]

    return counts


def dream_scores(logits, alg, temperature, top_p, top_k):
    """Dream's sample_tokens for logits [n, V]: the distribution drawn from, and the score of each of its tokens."""
    logits = logits / temperature if temperature > 0 else logits
    lowest = torch.finfo(logits.dtype).min
    if top_p is not None:
        falling, order = logits.sort(descending=True)
        removed = falling.softmax(-1).cumsum(-1) > top_p
        removed = torch.cat([torch.zeros_like(removed[:, :1]), removed[:, :-1]], dim=1)
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), lowest)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], lowest)
    probability = logits.softmax(-1)
    if alg == "topk_margin":
        two = probability.topk(2).values
        return probability, (two[:, :1] - two[:, 1:]).expand_as(probability)
    if alg == "entropy":
        return probability, (probability * (probability + 1e-10).log()).sum(-1, keepdim=True).expand_as(probability)
    return probability, probability


@torch.no_grad()
def dream(model, prompts, steps, gen_length, alg, generator, eps=1e-3, temperature=0.0, alg_temp=None, **filters):
    """Dream's diffusion_generate for equal prompts [B, P], each row with a number of masks of its own; (tokens, order).

    `order` [B, gen_length] is the step at which each token was committed.
    """
    mask_id, start = model.config.mask_token_id, prompts.shape[1]
    x = torch.cat([prompts, torch.full((len(prompts), gen_length), mask_id)], dim=1)
    times, when = torch.linspace(1, eps, steps + 1), torch.full(x.shape, -1)
    for step in range(steps):
        t, s, last = times[step], times[step + 1], step == steps - 1
        logits = without(model(x).logits, {mask_id})  # fastdiff never draws the mask token
        for row in range(len(x)):
            masked = (x[row] == mask_id).nonzero()[:, 0]
            if not len(masked):
                continue
            probability, scores = dream_scores(logits[row, masked], alg, temperature, **filters)
            drawn = torch.multinomial(probability, 1, generator=generator) if temperature > 0 else None
            token = probability.argmax(-1) if drawn is None else drawn[:, 0]
            if alg == "origin":
                chosen = (torch.rand(len(masked), generator=generator) < (1 if last else 1 - s / t)).nonzero()[:, 0]
            else:
                number = len(masked) if last else int(torch.tensor(len(masked)) * (1 - s / t))
                score = scores.gather(1, token[:, None])[:, 0]
                if not number:
                    continue
                chosen = best(score, number)
                if alg_temp:
                    chosen = torch.multinomial((score / alg_temp).softmax(-1), number, generator=generator)
            x[row, masked[chosen]], when[row, masked[chosen]] = token[chosen], step
    return x, when[:, start:]


@torch.no_grad()
def mdlm(model, prompts, steps, gen_length, generator, eps=1e-5):
    """MDLM's ancestral sampler (ddpm_update, log-linear noise) at temperature 1, blindly over a batch [B, P]."""
    mask_id = model.config.mask_token_id
    x = torch.cat([prompts, torch.full((len(prompts), gen_length), mask_id)], dim=1)
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps + 1):
        logits = without(model(x).logits, {mask_id})
        if step == steps:  # noise removal
            return torch.where(x == mask_id, logits.argmax(-1), x)
        stays = times[step + 1] / times[step]
        drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(x.shape)
        move = torch.rand(x.shape, generator=generator) >= stays
        x = torch.where((x == mask_id) & move, drawn, x)
