"""How likely texts are under a masked diffusion language model: a Monte-Carlo bound with its standard error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fastdiff.device import evaluating
from fastdiff.diffusion.guidance import guide
from fastdiff.diffusion.masked import MaskedDiffusion, MaskedTokens
from fastdiff.nn.head import check_decodes

_GUIDED_ROWS = 1024  # masked tokens whose logits lie in memory at once, under guidance
_GROUPS = 32  # independent groups of draws; their spread is known to about 1 / sqrt(2 · 31) = 13 %


@dataclass(frozen=True)
class LikelihoodBound:
    """An upper bound on the negative log-likelihood, estimated.

    Attributes:
        nats_per_token: the bound of all sequences over their maskable tokens.
        standard_error: standard error of nats_per_token, from the draws; the texts count as given.
        perplexity: exp(nats_per_token).
        perplexity_standard_error: perplexity · standard_error (delta method).
        tokens: maskable tokens in the sequences.
        samples: draws made.
    """

    nats_per_token: float
    standard_error: float
    perplexity: float
    perplexity_standard_error: float
    tokens: int
    samples: int


@torch.no_grad()
def likelihood_bound(
    model: nn.Module,
    process: MaskedDiffusion,
    sequences: Tensor | Sequence[Tensor],  # int64 [N, L], or N of [L_i]
    *,
    maskable: Tensor | Sequence[Tensor] | None = None,  # bool, as sequences
    attention_mask: Tensor | None = None,  # bool or 0/1 [N, L]
    encoder_input_ids: Tensor | Sequence[Tensor] | None = None,  # int64 [N, M], or N of [M_i]
    encoder_attention_mask: Tensor | None = None,  # bool or 0/1 [N, M]
    encoder_hidden_states: Tensor | None = None,  # [N, M, cross_attention_dim]
    guidance_scale: float = 1.0,
    num_samples: int = 512,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> LikelihoodBound:
    """The Monte-Carlo bound on the texts' negative log-likelihood, in nats per token (LLaDA, Nie et al. 2025, B.5).

    A draw takes a sequence with n maskable tokens and k ~ U{1 … n}, masks exactly k of them, and has the value n/k
    times their cross entropies; its mean is the bound of the sequence. The estimate is a ratio: the values' sum over
    the sum of n. Draws are made in 32 independent groups (as many as there are draws where those are fewer). Within a
    group they depend on each other, to lower the variance: no sequence comes again before all have come, in random
    order, and k is spread evenly. So the standard error is the one of a ratio of sums over independent groups.

    Args:
        model: a `fastdiff.models.MaskedDiffusionLM`, or one wrapped by peft; it is put in eval mode meanwhile.
        process: gives the masks; a model with a timestep embedding gets `process.time_of(k / n)`.
        sequences: clean token ids; a tensor may be padded on the right.
        maskable: True where a token belongs to the text whose likelihood is wanted (not the prompt, not padding).
            None: all that may be attended to.
        attention_mask: False at padding. None: all of a tensor's tokens count.
        encoder_input_ids, encoder_attention_mask: condition texts, for a model with an encoder.
        encoder_hidden_states: states of another encoder instead, such as those of images.
        guidance_scale: classifier-free guidance as in `fastdiff.generation.generate`: what is not maskable is masked in
            the unconditional pass, and the condition text hidden. 1: none. LLaDA's cfg + 1.
        num_samples: draws over all sequences; rounded up to a multiple of the number of groups.
        batch_size: draws computed at once; it changes no result but by rounding.
        seed: seed of the draws.
        progress: shows a bar.

    Raises:
        TypeError, ValueError: shapes, dtypes or ids do not fit, or there is nothing to mask; the message names it.
    """
    if num_samples < 2 or batch_size < 1:
        raise ValueError(f"num_samples: got {num_samples} and batch_size {batch_size}; expected at least 2 and 1")
    check_decodes(model)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale: got {guidance_scale}; expected a finite number (1 is none)")
    texts = _Texts(sequences, maskable, attention_mask)
    condition = None if encoder_input_ids is None else _Texts(encoder_input_ids, None, encoder_attention_mask)
    texts.check(model, process, condition)
    if encoder_hidden_states is not None:
        if condition is not None or len(encoder_hidden_states) != len(texts.ids):
            got = "encoder_input_ids, too" if condition is not None else f"{len(encoder_hidden_states)} rows"
            raise ValueError(f"encoder_hidden_states: got {got}; expected them alone, {len(texts.ids)} rows")
        condition = encoder_hidden_states
    draws = _Draws(texts, process, num_samples, seed)
    values = torch.zeros(len(draws.rows), dtype=torch.float64)
    order = texts.lengths[draws.rows].argsort(stable=True)  # rows of like lengths together: less padding
    with evaluating(model):
        with tqdm(total=len(order), unit="draw", desc="likelihood", disable=not progress) as bar:
            for chosen in order.split(batch_size):
                values[chosen] = _values(model, process, texts, condition, draws, chosen, guidance_scale)
                bar.update(len(chosen))
    return draws.ratio(values, texts)


def sequence_losses(
    model: nn.Module,
    process: MaskedDiffusion,
    clean: Tensor,  # int64 [B, L]
    masked: MaskedTokens,
    num_maskable: Tensor,  # int64 [B]
    attention_mask: Tensor | None = None,  # bool [B, L]
    guidance_scale: float = 1.0,
    given: Tensor | None = None,  # bool [B, L]
    **encoder: Tensor,
) -> Tensor:  # float64 [B], on the CPU
    """Each sequence's weighted cross entropies, summed: a draw of its likelihood bound, in nats.

    Args:
        masked: what `process.mask_for_likelihood` made of `clean`; its weight is the factor.
        num_maskable: n, the tokens of which k were masked; k / n is the time's mask rate.
        guidance_scale: scale of classifier-free guidance (LLaDA's get_logits with cfg = scale - 1); 1 is none.
        given: True where a token belongs to the prompt, which the unconditional pass does not see.
        encoder: `encoder_hidden_states` and `encoder_attention_mask`.

    Logits never lie in memory, under guidance those of 1 024 tokens. Raises what `MaskedDiffusionLM.hidden_states` and
    `masked_linear_cross_entropy` raise.
    """
    check_decodes(model)
    device, inputs = model.device, dict(encoder)
    ids, mask = masked.input_ids.to(device), masked.mask.to(device)
    if model.config.timestep_embedding:
        inputs["timesteps"] = process.time_of(masked.mask.sum(1) / num_maskable.clamp(min=1)).to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    states = model.predicting_states(model.hidden_states(ids, attention_mask, **inputs))
    if guidance_scale != 1:
        ids = ids if given is None else ids.masked_fill(given.to(device), model.config.mask_token_id)
        if "encoder_hidden_states" in inputs:
            seen = torch.zeros(inputs["encoder_hidden_states"].shape[:2], dtype=torch.bool, device=device)
            inputs["encoder_attention_mask"] = seen
        unconditional = model.predicting_states(model.hidden_states(ids, attention_mask, **inputs))
        losses = _guided_losses(model, states, unconditional, clean.to(device), mask, guidance_scale)
        return losses.sum(1).cpu() * masked.weight.double().cpu()
    suppressed = (model.config.mask_token_id,)
    _, losses = model.head.masked_cross_entropy(states, clean.to(device), mask, suppress_tokens=suppressed)
    return losses.double().sum(1).cpu() * masked.weight.double().cpu()


def _guided_losses(
    model: nn.Module, states: Tensor, unconditional: Tensor, clean: Tensor, mask: Tensor, scale: float
) -> Tensor:  # float64 [B, L]
    """Cross entropies of the masked tokens under guided logits; 0 elsewhere."""
    losses = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    values, head = [], model.head
    chunks = (t[mask].split(_GUIDED_ROWS) for t in (states, unconditional, clean))
    for conditional, other, targets in zip(*chunks, strict=True):
        logits = guide(head.logits(conditional), head.logits(other), scale).double()
        logits[:, model.config.mask_token_id] = -math.inf
        values.append(functional.cross_entropy(logits, targets, reduction="none"))
    losses[mask] = torch.cat(values) if values else losses.new_zeros(0)
    return losses


class _Texts:
    """Sequences as one padded tensor `[N, L]` on the CPU, with what may be masked and attended to."""

    def __init__(self, sequences: Tensor | Sequence[Tensor], maskable: Tensor | Sequence[Tensor] | None, attended):
        if len(sequences) == 0:
            raise ValueError("sequences: got none; expected at least one")
        if isinstance(sequences, Tensor):
            self.ids = sequences.cpu()
            if self.ids.ndim != 2:
                raise TypeError(f"sequences: got shape {list(self.ids.shape)}; expected [N, L] or a list of [L]")
            real = torch.ones_like(self.ids, dtype=torch.bool) if attended is None else attended.cpu().bool()
        else:
            self.ids = pad_sequence([ids.cpu() for ids in sequences], batch_first=True)
            lengths = torch.tensor([len(ids) for ids in sequences])
            real = torch.arange(self.ids.shape[1]) < lengths[:, None]
        if maskable is None:
            maskable = real
        elif not isinstance(maskable, Tensor):
            maskable = pad_sequence([each.cpu() for each in maskable], batch_first=True)
        for name, mask in (("attention_mask", real), ("maskable", maskable)):
            if mask.shape != self.ids.shape:
                raise ValueError(f"{name}: got shape {list(mask.shape)}; expected {list(self.ids.shape)}")
        self.attended, self.maskable = real, maskable.cpu().bool() & real
        self.counts = self.maskable.sum(1)
        self.lengths = (real * torch.arange(1, real.shape[1] + 1)).amax(1) if real.shape[1] else real.sum(1)

    def part(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """Ids and attention mask of some rows, without the columns that are padding in all of them."""
        width = int(self.lengths[rows].max())
        return self.ids[rows, :width], self.attended[rows, :width], width

    def check(self, model: nn.Module, process: MaskedDiffusion, condition: "_Texts | None") -> None:
        config = model.config
        if process.mask_token_id != config.mask_token_id:
            raise ValueError(
                f"process: masks with token {process.mask_token_id}; expected the model's, {config.mask_token_id}"
            )
        if not int(self.counts.sum()):
            raise ValueError("maskable: no token may be masked; there is no text whose likelihood is wanted")
        if condition is not None and len(condition.ids) != len(self.ids):
            raise ValueError(f"encoder_input_ids: got {len(condition.ids)} texts; expected {len(self.ids)}")
        for name, texts in (("sequences", self), ("encoder_input_ids", condition)):
            if texts is None:
                continue
            longest, ids = int(texts.lengths.max()), texts.ids[texts.attended]
            if longest > config.max_position_embeddings:
                raise ValueError(
                    f"{name}: got {longest} tokens; expected at most max_position_embeddings = "
                    f"{config.max_position_embeddings}"
                )
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
                raise ValueError(f"{name}: got ids {int(ids.min())} to {int(ids.max())}; expected 0 to "
                                 f"{config.vocab_size - 1}")  # fmt: skip


class _Draws:
    """Which sequence each draw takes (`rows`), and what it masks."""

    def __init__(self, texts: _Texts, process: MaskedDiffusion, num_samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.groups = min(_GROUPS, num_samples)
        size = -(-num_samples // self.groups)
        rows, masks, weights = [], [], []
        present = texts.counts.nonzero().flatten()
        for _ in range(self.groups):
            passes = -(-size // len(present))
            order = torch.cat([torch.randperm(len(present), generator=generator) for _ in range(passes)])
            chosen = present[order[:size]]
            masked = process.mask_for_likelihood(texts.ids[chosen], texts.maskable[chosen], generator)
            rows.append(chosen)
            masks.append(masked.mask)
            weights.append(masked.weight)
        self.rows, self.masks, self.weights = torch.cat(rows), torch.cat(masks), torch.cat(weights)

    def ratio(self, values: Tensor, texts: _Texts) -> LikelihoodBound:
        """The sum of the values over that of their tokens, and its standard error over the groups."""
        sums = values.view(self.groups, -1).sum(1)
        tokens = texts.counts[self.rows].double().view(self.groups, -1).sum(1)
        bound = float(sums.sum() / tokens.sum())
        spread = (sums - bound * tokens).square().sum() / (self.groups * (self.groups - 1))
        error = math.sqrt(float(spread)) / float(tokens.mean())
        perplexity = math.exp(bound) if bound < 700 else math.inf
        return LikelihoodBound(
            bound, error, perplexity, perplexity * error, int(texts.counts.sum()), len(self.rows)
        )  # fmt: skip


def _values(
    model: nn.Module,
    process: MaskedDiffusion,
    texts: _Texts,
    condition: _Texts | Tensor | None,
    draws: _Draws,
    chosen: Tensor,
    guidance_scale: float,
) -> Tensor:
    rows, encoder, device = draws.rows[chosen], {}, model.device
    clean, attended, width = texts.part(rows)
    mask = draws.masks[chosen, :width]
    masked = MaskedTokens(clean.masked_fill(mask, process.mask_token_id), mask, draws.weights[chosen])
    if isinstance(condition, Tensor):
        encoder["encoder_hidden_states"] = condition[rows].to(device)
    elif condition is not None:
        ids, seen, _ = condition.part(rows)
        encoder["encoder_hidden_states"] = model.encode(ids.to(device), seen.to(device))
        encoder["encoder_attention_mask"] = seen.to(device)
    guided = dict(guidance_scale=guidance_scale, given=attended & ~texts.maskable[rows, :width])
    return sequence_losses(model, process, clean, masked, texts.counts[rows], attended, **guided, **encoder)
