"""Text: token embeddings of one's own, or the states of a Hugging Face text encoder (T5's in TorchDire)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.qgfd.adapters.base import (
    Adapter,
    AdapterConfig,
    Batch,
    Condition,
    Latents,
    LatentShape,
    TokenStack,
    as_mask,
    grid_positions,
    join_conditions,
    length_mask,
    masked_mean,
    sample_lengths,
    unit_scale,
)
from fastdiff.models.qgfd.adapters.huggingface import encoder_of
from fastdiff.models.qgfd.backbone import QGFDConfig

_LEAST_NOISE = 0.1  # least noise that the nearest embedding is chosen under
_CERTAIN = 30.0  # logit of a token that is given
_LEAST_VARIANCE = 1e-4  # noise on latents: with less variance there is no doubt


@dataclass
class TextAdapterConfig(AdapterConfig):
    """Settings of `TextAdapter`, beside those of `AdapterConfig`.

    Attributes:
        vocab_size: Number of token ids; that of a Hugging Face encoder where there is one.
        pad_token_id: Given where a sample has no token.
        max_length: Tokens of a sample where no length is asked for.
        tokenizer: Without a Hugging Face encoder: the tokenizer's folder or hub id, for `create_qgfd_model`.
        decoder: "nearest" (the nearest token embedding; the default without a Hugging Face encoder) or "head" (a
            language-modelling head over decoder_layers blocks).
        token_posterior: Denoise by Bayes' rule over the vocabulary: the denoiser sees each token's expected embedding
            given its own noise, and gives the logits that the context adds to it; the loss is the cross entropy of the
            tokens, in nats. After the output prior of Plaid (Gulrajani & Hashimoto, 2023). Needs decoder "nearest" and
            a diffusion with prediction_type "sample"; a latent_dim of 32 or more gives the logits room.
        context_share: With token_posterior: training tells the denoiser some tokens of a sample, a share drawn from 0
            to this, and asks for the others. All tokens of a sample have one noise level, and come out of it at about
            the same time: without this, context is seldom of use in training.
        silent_token_ids: Ids that the tokenizer has no token for, as in padded vocabularies: never decoded to.
            `create_qgfd_model` fills it in.
        conditional: Condition on a text: batches may have "condition_ids" and "condition_mask".
    """

    vocab_size: int | None = None
    pad_token_id: int = 0
    max_length: int = 64
    tokenizer: str | None = None
    decoder: Literal["nearest", "head"] | None = None
    token_posterior: bool = False
    context_share: float = 0.0
    silent_token_ids: list[int] = field(default_factory=list)
    conditional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "vocab_size", "max_length")
        self.at_least(0, "pad_token_id")
        if self.decoder not in (None, "nearest", "head"):
            raise ValueError(f"TextAdapterConfig.decoder: got {self.decoder!r}; expected 'nearest', 'head' or null")
        pretrained = self.backbone_name is not None or self.backbone_config is not None
        if pretrained and self.decoder == "nearest":
            raise ValueError(
                "TextAdapterConfig.decoder: got 'nearest' with a Hugging Face encoder, whose states are not "
                "embeddings; expected 'head'"
            )
        if not 0 <= self.context_share <= 1:
            raise ValueError(f"TextAdapterConfig.context_share: got {self.context_share}; expected 0 to 1")
        if self.token_posterior and (pretrained or self.decoder == "head"):
            raise ValueError(
                "TextAdapterConfig.token_posterior: got true without nearest embeddings to decode to; expected no "
                "backbone_name, and decoder 'nearest'"
            )


class TextAdapter(Adapter):
    """Diffusion over token embeddings (as in Diffusion-LM, Li et al. 2022) or over an encoder's states.

    Batches are {"input_ids" int64 [B, L], "attention_mask" [B, L] (optional)} and, where the adapter is conditional,
    {"condition_ids" [B, M], "condition_mask" [B, M] (optional)}; a sample whose condition_mask is all 0 has none.
    Raises ValueError where vocab_size is neither given nor known from a Hugging Face encoder.
    """

    modality = "text"
    fields = ("input_ids",)

    def __init__(self, config: TextAdapterConfig, qgfd: QGFDConfig) -> None:
        super().__init__(config, qgfd)
        self.backbone = encoder_of(config, "text")
        if self.backbone is not None:
            config.vocab_size = self.backbone.config.vocab_size
        elif config.vocab_size is None:
            raise ValueError("TextAdapterConfig.vocab_size: got null without a Hugging Face encoder; expected a number")
        config.decoder = config.decoder or ("nearest" if self.backbone is None else "head")
        if self.backbone is None:
            self.embedding = nn.Embedding(config.vocab_size, self.latent_dim)
            states = self.latent_dim
        else:
            states = self.backbone.config.hidden_size
            self.latent_proj = nn.Linear(states, self.latent_dim)
        self.decoder = None
        if config.decoder == "head":
            self.decoder = TokenStack(self.latent_dim, config.vocab_size, self.block_config, config.decoder_layers)
        self.token_head = None
        if config.token_posterior:
            self.token_head = nn.Linear(self.latent_dim, config.vocab_size)
            # the bias is what is known without any text
            nn.init.zeros_(self.token_head.bias)
        self.condition_encoder = None
        if config.conditional:
            layers = max(1, config.encoder_layers) if self.backbone is None else 0
            self.condition_encoder = TokenStack(states, self.cond_width, self.block_config, layers)

    def encode(self, batch: Batch) -> Latents:
        ids, mask = self._ids(batch, "input_ids", "attention_mask")
        states = self._states(ids, mask)
        tokens = states if self.backbone is None else unit_scale(self.latent_proj(states))
        return Latents(tokens, mask, grid_positions(ids.shape[1], device=ids.device))

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}: the likeliest token at each place, padding where `mask` is False."""
        logits = self._logits(tokens, mask)
        if self.config.silent_token_ids:
            silent = torch.tensor(self.config.silent_token_ids, device=logits.device)
            logits = logits.index_fill(-1, silent, -torch.inf)
        ids = logits.argmax(-1)
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        return {"input_ids": ids.masked_fill(~mask, self.config.pad_token_id), "attention_mask": mask.long()}

    def reconstruction_loss(self, batch: Batch, latents: Latents) -> Tensor:  # [B]
        """Cross entropy of the tokens given their latents, averaged over a sample's tokens."""
        logits = self._logits(latents.tokens, latents.mask).float()
        error = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")
        return masked_mean(error, latents.mask)

    def condition(self, batch: Batch) -> Condition:
        """The label's token, then the states of the text to condition on, where there are such."""
        parts = [self._label_token(batch)]
        if self.condition_encoder is not None and "condition_ids" in batch:
            parts.append(self._text_condition(batch))
        return join_conditions(parts)

    @torch.no_grad()
    def set_token_prior(self, counts: Tensor) -> None:  # [vocab_size]
        """With token_posterior: begins with what is known without any text, how frequent each token is."""
        self.token_head.bias.copy_(((counts + 1) / (counts + 1).sum()).log())

    def evidence(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Logits of each token given its own noisy latent and how frequent it is, float32 [B, L, vocab_size].

        log p(token | x) = alpha · <x, embedding> / sigma² + what all tokens share, as embeddings have one length.
        """
        if self.token_head is None:
            return None
        scale = (alpha / sigma.square().clamp_min(_LEAST_VARIANCE)).float()
        with torch.autocast(noisy.device.type, enabled=False):  # logits of hundreds: 8 bits would be too few
            own = F.linear(noisy.float() * scale[:, None, None], self._embeddings().float())
        return own + self.token_head.bias.float()

    def tell(self, evidence: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """In training: evidence that leaves no doubt of some tokens, and which are left to predict, bool [B, L]."""
        if not self.training or not self.config.context_share:
            return evidence, None
        ids = batch["input_ids"]
        share = self.config.context_share * torch.rand(len(ids), 1, device=ids.device)
        told = torch.rand(ids.shape, device=ids.device) < share
        certain = _CERTAIN * F.one_hot(ids, evidence.shape[-1])
        return torch.where(told[..., None], certain.to(evidence.dtype), evidence), ~told

    def expected(self, logits: Tensor) -> Tensor:  # [B, L, vocab_size] -> [B, L, latent_dim]
        """The mean embedding under these logits."""
        return logits.softmax(-1) @ self._embeddings().to(logits.dtype)

    def clean(self, prediction: Tensor, evidence: Tensor) -> Tensor:  # [B, L, latent_dim]
        """The latents to expect, given a token's own noise and what the denoiser says of its context."""
        return self.expected(self._posterior(prediction, evidence))

    def token_errors(self, prediction: Tensor, evidence: Tensor, batch: Batch) -> Tensor:  # [B, L], float32
        """Cross entropy of the tokens, in nats."""
        logits = self._posterior(prediction, evidence)
        return F.cross_entropy(logits.transpose(1, 2), batch["input_ids"], reduction="none")

    def _posterior(self, prediction: Tensor, evidence: Tensor) -> Tensor:  # [B, L, vocab_size], float32
        return F.linear(prediction, self.token_head.weight).float() + evidence

    def _embeddings(self) -> Tensor:  # [vocab_size, latent_dim]; not trained to be easy to predict
        return unit_scale(self.embedding.weight.detach())

    def latent_length(self, batch: Batch) -> int:
        return batch["input_ids"].shape[1]

    def sample_shape(
        self, count: int, length: int | Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> LatentShape:
        lengths = sample_lengths(count, length, self.config.max_length)
        longest = max(lengths, default=self.config.max_length)
        return LatentShape(longest, length_mask(lengths, device), grid_positions(longest, device=device))

    def _text_condition(self, batch: Batch) -> Condition:
        ids, mask = self._ids(batch, "condition_ids", "condition_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if self.training and self.drops_conditions and self.config.condition_dropout > 0:
            kept = torch.rand(len(ids), device=ids.device) >= self.config.condition_dropout
            mask = mask & kept[:, None]
        positions = grid_positions(ids.shape[1], device=ids.device)
        tokens = self.condition_encoder(self._states(ids, mask), mask, positions)
        # Without a condition: one zero token, which is what the backbone takes for None.
        none = ~mask.any(1)
        first = torch.arange(ids.shape[1], device=ids.device) == 0
        return tokens.masked_fill(none[:, None, None], 0), mask | (none[:, None] & first)

    def _states(self, ids: Tensor, mask: Tensor | None) -> Tensor:  # [B, L] -> [B, L, latent_dim or the encoder's]
        if self.backbone is None:
            return unit_scale(self.embedding(ids))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_backbone):
            seen = torch.ones_like(ids) if mask is None else mask.long()
            return self.backbone(input_ids=ids, attention_mask=seen).last_hidden_state

    def _logits(self, tokens: Tensor, mask: Tensor | None) -> Tensor:  # [B, L, vocab_size]
        if self.decoder is not None:
            return self.decoder(tokens, mask, grid_positions(tokens.shape[1], device=tokens.device))
        # All embeddings have the same length, so that the nearest has the largest product; divided by the variance of
        # normal noise, products are the logarithms of what Bayes' rule makes of noisy latents.
        variance = max(self.config.reconstruction_noise, _LEAST_NOISE) ** 2
        return F.linear(tokens, unit_scale(self.embedding.weight)) / variance

    def _ids(self, batch: Batch, name: str, mask_name: str) -> tuple[Tensor, Tensor | None]:
        ids, vocab_size = batch[name], self.config.vocab_size
        if ids.ndim != 2 or ids.dtype != torch.int64:
            raise ValueError(f"{name}: got {ids.dtype} of shape {list(ids.shape)}; expected int64 [B, L]")
        on_cpu = ids.device.type == "cpu" and not torch.compiler.is_compiling()  # looking would stall a GPU
        if on_cpu and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < vocab_size):
            raise ValueError(f"{name}: got ids {int(ids.min())}..{int(ids.max())}; expected 0..{vocab_size - 1}")
        return ids, as_mask(batch.get(mask_name), mask_name, tuple(ids.shape))
