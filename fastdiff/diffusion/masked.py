"""Masked (absorbing) diffusion of token ids: mask rates, training times, corruption, exact counts for the likelihood.

At time t in [0, 1] a token is the mask token with probability r(t) = 1 - alpha(t), each by itself; t = 1 is all masks.
Training minimises the expectation over t of w(t) times the sum of the masked tokens' cross entropies. With
w(t) = -alpha'(t) / (1 - alpha(t)) = r'(t) / r(t) this is a bound on the negative log-likelihood, the same for every
schedule (Sahoo et al. 2024, MDLM; Shi et al. 2024, MD4); for the linear schedule it is 1/t (LLaDA, Nie et al. 2025).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdiff.nn.checks import check_token_ids

MASK_SCHEDULES = ("linear", "cosine", "maskgit_cosine", "polynomial")
TIME_SAMPLINGS = ("low_discrepancy", "antithetic", "iid")
LOSS_WEIGHTINGS = ("elbo", "none")


@dataclass
class MaskedDiffusionConfig:
    """Mask rate, training times and weight of a masked diffusion.

    Attributes:
        schedule: Mask rate at time t: "linear" t; "cosine" 1 - cos(pi·t/2) (MDLM's); "maskgit_cosine" sin(pi·t/2),
            which MaskGIT (in the unmasked share 1 - t), MD4 and dllm call cosine; "polynomial" t^exponent.
        exponent: Of the polynomial schedule.
        weighting: "elbo" weighs each masked token by r'(t) / r(t) (1/t for linear), "none" by 1.
        t_min: Smallest training time; bounds the weight.
        time_sampling: How the times of a batch are drawn: "low_discrepancy" (one uniform number, the rest evenly
            spaced; Kingma et al. 2021), "antithetic" (pairs u and 1 - u) or "iid".
    """

    schedule: Literal["linear", "cosine", "maskgit_cosine", "polynomial"] = "linear"
    exponent: float = 2.0
    weighting: Literal["elbo", "none"] = "elbo"
    t_min: float = 1e-3
    time_sampling: Literal["low_discrepancy", "antithetic", "iid"] = "low_discrepancy"

    def __post_init__(self) -> None:
        known = {"schedule": MASK_SCHEDULES, "weighting": LOSS_WEIGHTINGS, "time_sampling": TIME_SAMPLINGS}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(
                    f"MaskedDiffusionConfig.{name}: got {getattr(self, name)!r}; expected one of {', '.join(names)}"
                )
        if not 0 < self.exponent < math.inf:
            raise ValueError(f"MaskedDiffusionConfig.exponent: got {self.exponent}; expected a positive number")
        if not 0 < self.t_min < 1:
            raise ValueError(f"MaskedDiffusionConfig.t_min: got {self.t_min}; expected a number between 0 and 1")


class MaskedTokens(NamedTuple):
    """What `MaskedDiffusion.corrupt` and `mask_for_likelihood` give."""

    input_ids: Tensor  # [B, L], the mask token where `mask` is True
    mask: Tensor  # bool [B, L], True where a token was masked: the rows of the loss
    weight: Tensor  # float32 [B], factor of each masked token's cross entropy in its sequence


class MaskedDiffusion:
    """Masks token ids for training and for the likelihood. Times t are `[B]`, float32, in [0, 1]; 1 is all masks.

    Random numbers come from the generator handed in, on its device (the CPU's without one), and are moved to the
    token ids' device, so that a seed masks the same tokens everywhere.
    """

    def __init__(self, config: MaskedDiffusionConfig, mask_token_id: int) -> None:
        if mask_token_id < 0:
            raise ValueError(f"mask_token_id: got {mask_token_id}; expected a token id of 0 or more")
        self.config, self.mask_token_id = config, mask_token_id

    def mask_rate(self, t: Tensor) -> Tensor:
        """r(t): the probability that a token is masked at time t; 0 at t = 0 and 1 at t = 1."""
        if self.config.schedule == "linear":
            return t
        if self.config.schedule == "cosine":
            return 2 * torch.sin(t * (math.pi / 4)).square()  # 1 - cos(pi·t/2) without its cancellation at small t
        if self.config.schedule == "maskgit_cosine":
            return torch.sin(t * (math.pi / 2))
        return t**self.config.exponent

    def time_of(self, mask_rate: Tensor) -> Tensor:
        """The time at which the mask rate is `mask_rate`: the inverse of `mask_rate`."""
        if self.config.schedule == "linear":
            return mask_rate
        if self.config.schedule == "cosine":
            return torch.asin((mask_rate / 2).sqrt()) * (4 / math.pi)
        if self.config.schedule == "maskgit_cosine":
            return torch.asin(mask_rate) * (2 / math.pi)
        return mask_rate ** (1 / self.config.exponent)

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = r'(t) / r(t), or 1 with weighting "none". t below t_min counts as t_min."""
        if self.config.weighting == "none":
            return torch.ones_like(t)
        t = t.clamp(min=self.config.t_min)
        if self.config.schedule == "cosine":
            return (math.pi / 2) / torch.tan(t * (math.pi / 4))  # sin x / (1 - cos x) = cot(x / 2)
        if self.config.schedule == "maskgit_cosine":
            return ((math.pi / 2) / torch.tan(t * (math.pi / 2))).clamp(min=0)  # at t = 1 rounding makes it -7e-8
        return (1.0 if self.config.schedule == "linear" else self.config.exponent) / t

    def sample_times(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:  # [B], float32
        """Training times, each uniform on [t_min, 1]; how they depend on each other is `time_sampling`."""
        draw = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        if self.config.time_sampling == "iid":
            u = torch.rand(batch_size, **draw)
        elif self.config.time_sampling == "antithetic":
            half = torch.rand((batch_size + 1) // 2, **draw)
            u = torch.stack([half, 1 - half], dim=1).flatten()[:batch_size]
        else:
            u = _evenly_spaced(batch_size, draw).float()
        return (self.config.t_min + (1 - self.config.t_min) * u).clamp(max=1.0).to(device)

    def corrupt(
        self,
        input_ids: Tensor,  # int64 [B, L]
        t: Tensor,  # [B]
        maskable: Tensor | None = None,  # bool [B, L]
        generator: torch.Generator | None = None,
    ) -> MaskedTokens:
        """Masks each maskable token with probability r(t), each by itself.

        Args:
            input_ids: the clean text.
            t: a time for each sequence.
            maskable: False for what is never masked: prompt and padding (`maskable_tokens` makes it). None: all may be.
            generator: source of the random numbers.

        Raises:
            TypeError, ValueError: a dtype or shape does not fit, or (on CPU tensors) a maskable token is the mask
                token already.
        """
        maskable = self._check(input_ids, maskable)
        if t.shape != input_ids.shape[:1]:
            raise ValueError(f"t: got shape {list(t.shape)}; expected [{len(input_ids)}], one time per sequence")
        u = _uniform(input_ids.shape, generator).to(input_ids.device)
        mask = (u < self.mask_rate(t.double())[:, None]) & maskable
        return MaskedTokens(input_ids.masked_fill(mask, self.mask_token_id), mask, self.weight(t.float()))

    def mask_exactly(
        self,
        input_ids: Tensor,  # int64 [B, L]
        counts: Tensor,  # int64 [B]
        maskable: Tensor | None = None,  # bool [B, L]
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # [B, L], bool [B, L]
        """Masks exactly counts[b] maskable tokens of sequence b, every choice of them equally likely.

        Returns the masked ids and the mask. Raises ValueError where shapes do not fit or (on CPU tensors) a count is
        negative or more than a sequence has maskable tokens.
        """
        maskable = self._check(input_ids, maskable)
        if counts.shape != input_ids.shape[:1]:
            raise ValueError(f"counts: got shape {list(counts.shape)}; expected [{len(input_ids)}], one per sequence")
        if counts.device.type == "cpu":
            wrong = ((counts < 0) | (counts > maskable.sum(1).to(counts.device))).nonzero()
            if len(wrong):
                row = int(wrong[0])
                most = int(maskable[row].sum())
                raise ValueError(f"counts[{row}]: got {int(counts[row])}; expected 0 to {most}, its maskable tokens")
        keys = _uniform(input_ids.shape, generator).to(input_ids.device).masked_fill(~maskable, 2.0)
        ranks = keys.argsort(dim=1, stable=True).argsort(dim=1)  # maskable tokens come first, in random order
        mask = (ranks < counts.to(ranks.device)[:, None]) & maskable
        return input_ids.masked_fill(mask, self.mask_token_id), mask

    def mask_for_likelihood(
        self,
        input_ids: Tensor,  # int64 [B, L]
        maskable: Tensor | None = None,  # bool [B, L]
        generator: torch.Generator | None = None,
    ) -> MaskedTokens:
        """One draw of the Monte-Carlo likelihood bound (LLaDA, Nie et al. 2025, Appendix B.5).

        With n maskable tokens in a sequence k ~ U{1 … n}, exactly k tokens are masked, and weight is n / k: the sum of
        the masked tokens' cross entropies times weight has the bound of -log p(sequence), in nats, as its mean. Over
        the batch k is spread evenly, which lowers the variance where the batch repeats one text. A sequence without
        maskable tokens has weight 0.
        """
        maskable = self._check(input_ids, maskable)
        total = maskable.sum(1)
        draw = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        u = _evenly_spaced(len(input_ids), draw).to(total.device)
        counts = torch.minimum((u * total).floor().long() + 1, total)
        masked, mask = self.mask_exactly(input_ids, counts, maskable, generator)
        return MaskedTokens(masked, mask, torch.where(total > 0, total / counts.clamp(min=1), 0.0).float())

    def _check(self, input_ids: Tensor, maskable: Tensor | None) -> Tensor:
        check_token_ids("input_ids", input_ids)
        if maskable is None:
            maskable = torch.ones_like(input_ids, dtype=torch.bool)
        if maskable.dtype != torch.bool or maskable.shape != input_ids.shape:
            raise TypeError(
                f"maskable: got {maskable.dtype} of shape {list(maskable.shape)}; expected torch.bool "
                f"{list(input_ids.shape)}"
            )
        if input_ids.device.type == "cpu":
            already = ((input_ids == self.mask_token_id) & maskable).nonzero()
            if len(already):
                raise ValueError(
                    f"input_ids{already[0].tolist()}: got the mask token {self.mask_token_id}, which clean text never "
                    "has; remove it or set maskable to False there"
                )
        return maskable


def maskable_tokens(
    input_ids: Tensor,  # [B, L]
    pad_token_id: int | None = None,
    prompt_lengths: Tensor | None = None,  # int64 [B]
) -> Tensor:  # bool [B, L]
    """True where a token may be masked: neither padding nor one of the first prompt_lengths[b] tokens.

    With texts filled up by EoS, which the model shall learn to predict, leave pad_token_id None. Raises ValueError for
    prompt_lengths of another shape.
    """
    maskable = torch.ones_like(input_ids, dtype=torch.bool)
    if pad_token_id is not None:
        maskable &= input_ids != pad_token_id
    if prompt_lengths is not None:
        if prompt_lengths.shape != input_ids.shape[:1]:
            raise ValueError(
                f"prompt_lengths: got shape {list(prompt_lengths.shape)}; expected [{len(input_ids)}], one per sequence"
            )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        maskable &= positions >= prompt_lengths.to(input_ids.device)[:, None]
    return maskable


def _uniform(shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    # float64: ties among the keys of mask_exactly, which are broken by position, never happen in practice
    device = "cpu" if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)


def _evenly_spaced(count: int, draw: dict) -> Tensor:  # [count], float64, in [0, 1)
    first = torch.rand(1, dtype=torch.float64, **draw)
    return (first + torch.arange(count, dtype=torch.float64, device=draw["device"]) / max(count, 1)) % 1.0
