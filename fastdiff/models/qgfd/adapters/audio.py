"""Audio: frames of a waveform through strided convolutions, or a Hugging Face speech encoder's; a learnt synthesis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.qgfd.adapters.base import (
    Adapter,
    AdapterConfig,
    Batch,
    Latents,
    LatentShape,
    TokenStack,
    as_mask,
    grid_positions,
    length_mask,
    masked_mean,
    sample_lengths,
    unit_scale,
)
from fastdiff.models.qgfd.adapters.huggingface import encoder_of
from fastdiff.models.qgfd.backbone import QGFDConfig


@dataclass
class AudioAdapterConfig(AdapterConfig):
    """Settings of `AudioAdapter`, beside those of `AdapterConfig`.

    Attributes:
        sampling_rate: Audio samples a second, in Hz; that of a Hugging Face encoder where there is one.
        num_samples: Audio samples of a sample where no length is asked for.
        strides: Of the adapter's own convolutions; their product is the audio samples of a frame.
        spectral_windows: Lengths of the windows, in audio samples, of the spectra that are compared in training.
        normalise: Give a Hugging Face encoder waveforms of mean 0 and variance 1, as its feature extractor would.
    """

    sampling_rate: int = 16000
    num_samples: int = 16000
    strides: tuple[int, ...] = (4, 4, 4)
    spectral_windows: tuple[int, ...] = (1024, 256, 64)
    normalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.strides, self.spectral_windows = tuple(self.strides), tuple(self.spectral_windows)
        self.at_least(1, "sampling_rate", "num_samples", "strides")
        self.at_least(4, "spectral_windows")
        if not self.strides:
            raise ValueError("AudioAdapterConfig.strides: got none; expected one or more")


class AudioAdapter(Adapter):
    """Diffusion over the states of a waveform's frames.

    Batches are {"input_values" [B, S] in [-1, 1] at the configuration's rate, "attention_mask" [B, S] (optional),
    "labels" int64 [B] (optional)}; L = ceil(S / hop). A Hugging Face encoder whose convolutions normalise over time
    (feat_extract_norm "group", as Wav2Vec2's base models) sees padding as silence; all others do not see it.
    """

    modality = "audio"
    fields = ("input_values",)

    def __init__(self, config: AudioAdapterConfig, qgfd: QGFDConfig) -> None:
        super().__init__(config, qgfd)
        self.backbone = encoder_of(config, "audio")
        if self.backbone is None:
            self.hop = math.prod(config.strides)
            widths = [1, *[config.hidden_size] * len(config.strides)]
            self.convolutions = nn.ModuleList(
                nn.Conv1d(before, after, 2 * stride, stride)
                for before, after, stride in zip(widths, widths[1:], config.strides, strict=False)
            )
            self.encoder = TokenStack(config.hidden_size, self.latent_dim, self.block_config, config.encoder_layers)
        else:
            self.hop = math.prod(self.backbone.config.conv_stride)
            self.latent_proj = nn.Linear(self.backbone.config.hidden_size, self.latent_dim)
        # Each frame gives two hops of sound under a Hann window; neighbours overlap by one and sum to weight 1.
        self.decoder = TokenStack(self.latent_dim, 2 * self.hop, self.block_config, config.decoder_layers)
        self.register_buffer("window", torch.hann_window(2 * self.hop), persistent=False)

    def encode(self, batch: Batch) -> Latents:
        waves, mask = self._waves(batch)
        frames = self.latent_length(batch)
        present = torch.ones_like(waves, dtype=torch.bool) if mask is None else mask
        extra = frames * self.hop - waves.shape[1]
        waves, present = F.pad(waves.masked_fill(~present, 0), (0, extra)), F.pad(present, (0, extra))
        frame_mask = present.unflatten(1, (frames, self.hop)).any(-1)
        positions = grid_positions(frames, device=waves.device)
        if self.backbone is None:
            states = self._convolve(waves, present)
            tokens = self.encoder(states, None if mask is None else frame_mask, positions)
        else:
            tokens = self.latent_proj(self._backbone_states(waves, present, frame_mask))
        return Latents(unit_scale(tokens), None if mask is None else frame_mask, positions)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"input_values" [B, L·hop], clamped to [-1, 1]; "attention_mask" where `mask` is given}."""
        waves = self._synthesise(tokens, mask).clamp(-1, 1)
        if mask is None:
            return {"input_values": waves}
        present = mask.repeat_interleave(self.hop, 1)
        return {"input_values": waves.masked_fill(~present, 0), "attention_mask": present.long()}

    def reconstruction_loss(self, batch: Batch, latents: Latents) -> Tensor:  # [B]
        """Mean absolute error of the waveform, plus that of magnitudes and log magnitudes of several spectra."""
        waves, mask = self._waves(batch)
        present = torch.ones_like(waves, dtype=torch.bool) if mask is None else mask
        made = self._synthesise(latents.tokens, latents.mask)[:, : waves.shape[1]].float()
        made, waves = made.masked_fill(~present, 0), waves.float().masked_fill(~present, 0)
        loss = masked_mean((made - waves).abs(), present)
        windows = [size for size in self.config.spectral_windows if size <= waves.shape[1]]
        for size in windows:
            loss = loss + self._spectral_error(made, waves, present.sum(1), size) / len(windows)
        return loss

    def latent_length(self, batch: Batch) -> int:
        return max(1, math.ceil(batch["input_values"].shape[1] / self.hop))

    def sample_shape(
        self, count: int, length: int | Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> LatentShape:
        lengths = sample_lengths(count, length, self.config.num_samples)
        frames = [math.ceil(samples / self.hop) for samples in lengths]
        longest = max(frames, default=math.ceil(self.config.num_samples / self.hop))
        return LatentShape(longest, length_mask(frames, device), grid_positions(longest, device=device))

    def _waves(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        waves = batch["input_values"]
        if waves.ndim != 2 or waves.shape[1] == 0:
            raise ValueError(f"input_values: got shape {list(waves.shape)}; expected [B, S] with S of 1 or more")
        return waves, as_mask(batch.get("attention_mask"), "attention_mask", tuple(waves.shape))

    def _convolve(self, waves: Tensor, present: Tensor) -> Tensor:  # [B, L * hop] -> [B, L, hidden_size]
        x = waves[:, None]
        for convolution, stride in zip(self.convolutions, self.config.strides, strict=True):
            x = F.gelu(convolution(F.pad(x, (stride // 2, stride - stride // 2))))
            present = present.unflatten(1, (-1, stride)).any(-1)
            x = x.masked_fill(~present[:, None], 0)  # as beyond the end: padding changes nothing
        return x.transpose(1, 2)

    def _backbone_states(self, waves: Tensor, present: Tensor, frame_mask: Tensor) -> Tensor:  # -> [B, L, hidden]
        if self.config.normalise:
            count = present.sum(1, keepdim=True).clamp_min(1)
            mean = waves.sum(1, keepdim=True) / count
            variance = ((waves - mean).square() * present).sum(1, keepdim=True) / count
            waves = ((waves - mean) / (variance + 1e-7).sqrt()).masked_fill(~present, 0)
        config = self.backbone.config
        field = 1  # audio samples that one frame sees
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            field = (field - 1) * stride + kernel
        extra = max(0, field - self.hop)  # so that there is a frame for each hop
        waves = F.pad(waves, (0, extra))
        options = {}
        if config.feat_extract_norm == "layer":
            ends = frame_mask.sum(1, keepdim=True) * self.hop + extra
            options["attention_mask"] = (torch.arange(waves.shape[1], device=waves.device) < ends).long()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_backbone):
            return self.backbone(waves, **options).last_hidden_state[:, : frame_mask.shape[1]]

    def _synthesise(self, tokens: Tensor, mask: Tensor | None) -> Tensor:  # [B, L, latent_dim] -> [B, L * hop]
        frames = self.decoder(tokens, mask, grid_positions(tokens.shape[1], device=tokens.device))
        frames = frames * self.window.to(frames.dtype)
        if mask is not None:
            frames = frames.masked_fill(~mask[..., None], 0)
        first, second = frames.unflatten(-1, (2, self.hop)).unbind(2)
        waves = (F.pad(first, (0, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))).flatten(1)  # overlap-add
        return waves[:, self.hop // 2 : self.hop // 2 + tokens.shape[1] * self.hop]

    def _spectral_error(self, made: Tensor, waves: Tensor, lengths: Tensor, size: int) -> Tensor:  # [B]
        step = size // 4
        window = torch.hann_window(size, device=waves.device)
        magnitudes = [
            torch.stft(wave, size, step, window=window, pad_mode="constant", normalized=True, return_complex=True)
            for wave in (made, waves)
        ]
        # |z| has no gradient at 0, where silence is
        a, b = ((z.real.square() + z.imag.square() + 1e-8).sqrt() for z in magnitudes)
        error = (a - b).abs().mean(1) + ((a + 1e-3).log() - (b + 1e-3).log()).abs().mean(1)  # [B, frames]
        starts = torch.arange(error.shape[1], device=waves.device) * step
        return masked_mean(error, starts <= lengths[:, None])
