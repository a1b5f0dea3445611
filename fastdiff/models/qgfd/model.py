"""QGFD diffusion models of any modality: one denoiser over the latent tokens of one adapter, or of several."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.device import evaluating
from fastdiff.diffusion.config import DiffusionConfig
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.guidance import Guided, check_guidance, join_halves
from fastdiff.diffusion.sampling import sample
from fastdiff.models.pretrained import Pretrained
from fastdiff.models.qgfd.adapters import (
    ADAPTERS,
    MODALITIES,
    Adapter,
    AudioAdapterConfig,
    ImageAdapterConfig,
    Latents,
    TabularAdapterConfig,
    TextAdapterConfig,
    VideoAdapterConfig,
)
from fastdiff.models.qgfd.adapters.base import Batch, Condition, batch_size, join_conditions, masked_mean
from fastdiff.models.qgfd.backbone import QGFDBackbone, QGFDConfig


def _torchdire_diffusion() -> DiffusionConfig:
    return DiffusionConfig(prediction_type="epsilon", noise_levels="linear")


@dataclass
class QGFDModelConfig:
    """A `QGFDModel`: its denoiser, its diffusion, and an adapter for each modality that is not null.

    Attributes:
        backbone: the denoiser.
        diffusion: noise levels and target; TorchDire's by default: 1000 levels, linear, predicted noise.
        text: adapter of text.
        image: adapter of images.
        audio: adapter of sound.
        video: adapter of videos.
        tabular: adapter of tables.
        reconstruction_weight: Weight of the adapters' reconstruction loss beside the diffusion's; 0 leaves encoder and
            decoder as they are.
    """

    backbone: QGFDConfig = field(default_factory=QGFDConfig)
    diffusion: DiffusionConfig = field(default_factory=_torchdire_diffusion)
    text: TextAdapterConfig | None = None
    image: ImageAdapterConfig | None = None
    audio: AudioAdapterConfig | None = None
    video: VideoAdapterConfig | None = None
    tabular: TabularAdapterConfig | None = None
    reconstruction_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.reconstruction_weight >= 0:
            raise ValueError(
                f"QGFDModelConfig.reconstruction_weight: got {self.reconstruction_weight}; expected 0 or more"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that have an adapter."""
        return tuple(name for name in MODALITIES if getattr(self, name) is not None)


class QGFDModel(Pretrained):
    """A `QGFDBackbone` over the latents of one adapter, or of several that share it.

    Modalities are trained in turn (a batch of one after a batch of another) or mixed (the sum of their losses). Where
    there are several, each has a learnt token that is the first of every condition, so that the denoiser knows which
    one it sees in pure noise. Raises ValueError for a configuration without an adapter.

    `save_pretrained` writes the weights of Hugging Face encoders, too: `from_pretrained` reads nothing else.
    """

    config_class = QGFDModelConfig
    title = "a QGFD model"
    extra_keys = (*Pretrained.extra_keys, "class_names")

    def __init__(self, config: QGFDModelConfig) -> None:
        super().__init__()
        if not config.modalities:
            raise ValueError(f"QGFDModelConfig: got no adapter; expected one or more of {', '.join(MODALITIES)}")
        self.config = config
        self.backbone = QGFDBackbone(config.backbone)
        self.adapters = nn.ModuleDict(
            {name: ADAPTERS[name](getattr(config, name), config.backbone) for name in config.modalities}
        )
        self.modality_tokens = nn.ParameterDict()
        if len(self.adapters) > 1:
            for name in self.adapters:
                self.modality_tokens[name] = nn.Parameter(torch.randn(config.backbone.cond_width))
        self.diffusion = Diffusion(config.diffusion)
        if getattr(config.text, "token_posterior", False) and config.diffusion.prediction_type != "sample":
            raise ValueError(
                f"QGFDModelConfig.diffusion: got prediction_type {config.diffusion.prediction_type!r}; "
                "text.token_posterior needs 'sample'"
            )

    def adapter(self, modality: str | None = None) -> Adapter:
        """The adapter of a modality; None is the only one. Raises ValueError for another; it lists those there are."""
        if modality is None and len(self.adapters) == 1:
            return next(iter(self.adapters.values()))
        if modality not in self.adapters:
            raise ValueError(f"modality: got {modality!r}; this model has {', '.join(self.adapters)}")
        return self.adapters[modality]

    def forward(
        self,
        batch: Batch | Mapping[str, Batch],
        modality: str | None = None,
        *,
        t: Tensor | None = None,  # [B]
        noise: Tensor | None = None,  # [B, L, latent_dim]
        diffusion: Diffusion | None = None,
    ) -> Tensor:  # [B], float32
        """Each sample's diffusion loss plus reconstruction_weight times its reconstruction loss.

        Args:
            batch: what the modality's adapter encodes; or, for a mixed step, the batches of several modalities by name,
                each with its own "t" and "noise" where they are not to be drawn. Their losses follow each other.
            modality: the batch's modality; None where the model has one adapter.
            t: times as `Diffusion.sample_times` draws them; None draws from torch's generator.
            noise: standard normal, of `latent_shape`; None draws it. The decoder is trained on latents with a little
                of it, so that it forgives what a sampler leaves.
            diffusion: None is the configuration's.

        Raises ValueError for an unknown modality or shapes that do not fit.
        """
        if any(isinstance(part, Mapping) for part in batch.values()):
            parts = [
                self(part, name, t=part.get("t"), noise=part.get("noise"), diffusion=diffusion)
                for name, part in batch.items()
            ]
            return torch.cat(parts)
        error, reconstruction = self.losses(batch, modality, t=t, noise=noise, diffusion=diffusion)
        return error if reconstruction is None else error + self.config.reconstruction_weight * reconstruction

    def losses(
        self,
        batch: Batch,
        modality: str | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        diffusion: Diffusion | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The two parts of `forward`'s loss, [B] each; the second is None where its weight is 0.

        The diffusion's is the mean squared error over a sample's real tokens, or their cross entropy where the adapter
        denoises by Bayes' rule (`TextAdapterConfig.token_posterior`). It sees the latents detached: an encoder
        that could make them easy to predict would make them all alike.
        """
        adapter = self.adapter(modality)
        if not any(name in batch for name in adapter.fields):
            raise ValueError(
                f"batch: got {', '.join(batch) or 'nothing'}; expected {' or '.join(adapter.fields)}, "
                f"of modality {adapter.modality!r}"
            )
        diffusion = self.diffusion if diffusion is None else diffusion
        weight = self.config.reconstruction_weight
        with contextlib.nullcontext() if weight else torch.no_grad():
            latents = adapter.encode(batch)
        x0 = latents.tokens.detach()
        t = diffusion.sample_times(len(x0), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        if noise.shape != x0.shape:
            raise ValueError(f"noise: got shape {list(noise.shape)}; expected the latents', {list(x0.shape)}")
        cond_tokens, cond_mask = self._condition(adapter, batch)
        noisy = diffusion.add_noise(x0, noise, t)
        evidence, asked = adapter.evidence(noisy, *diffusion.alpha_sigma(t)), latents.mask
        if evidence is not None:
            evidence, untold = adapter.tell(evidence, batch)
            asked = untold if asked is None else asked if untold is None else asked & untold
        prediction = self.backbone(
            noisy if evidence is None else adapter.expected(evidence), diffusion.model_time(t), cond_tokens, cond_mask,
            mask=latents.mask, position_ids=latents.position_ids,
        )  # fmt: skip
        if evidence is None:
            error = (prediction.float() - diffusion.target(x0, noise, t).float()).square().mean(-1)
        else:
            error = adapter.token_errors(prediction, evidence, batch)
        error = masked_mean(error, asked)
        if not weight:
            return error, None
        noisy = latents.tokens + adapter.config.reconstruction_noise * noise
        reconstruction = adapter.reconstruction_loss(batch, Latents(noisy, latents.mask, latents.position_ids))
        return error, reconstruction

    def latent_shape(self, batch: Batch, modality: str | None = None) -> tuple[int, int, int]:
        """[B, L, latent_dim]: the shape of a batch's latents and of its noise."""
        length = self.adapter(modality).latent_length(batch)
        return batch_size(batch), length, self.config.backbone.latent_dim

    def sample(
        self,
        modality: str | None = None,
        count: int | None = None,
        conditions: Batch | None = None,
        **options,
    ) -> dict[str, Tensor]:
        """Draws samples and decodes them: a batch as the modality's adapter takes it.

        Arguments and errors are those of `sample_latents`.
        """
        latents = self.sample_latents(modality, count, conditions, **options)
        with torch.no_grad(), evaluating(self):
            return self.adapter(modality).decode(latents.tokens, latents.mask)

    def sample_latents(
        self,
        modality: str | None = None,
        count: int | None = None,
        conditions: Batch | None = None,
        *,
        length: int | Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int | Sequence[int] = 0,
        diffusion: Diffusion | None = None,
        autocast_dtype: torch.dtype | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Latents:
        """Draws latents; on one machine the same arguments give the same bits.

        Args:
            modality: None where the model has one adapter.
            count: number of samples; may be left out where `conditions` tell.
            conditions: what to condition on, as in a batch: {"labels"}, {"condition_ids", "condition_mask"}.
            length: length of the samples, in the modality's unit (`Adapter.sample_shape`).
            num_inference_steps, seed, progress, options: as in `fastdiff.diffusion.sample`; latents have unit scale,
                which `clip_sample` is of.
            guidance_scale, guidance_interval, autocast_dtype: as in `fastdiff.diffusion.Guided`.
            diffusion: None is the configuration's.

        Raises ValueError for an argument that does not fit.
        """
        adapter, conditions = self.adapter(modality), {} if conditions is None else conditions
        diffusion = self.diffusion if diffusion is None else diffusion
        count = self._check_sampling(adapter, count, conditions, guidance_scale)
        check_guidance(guidance_scale, guidance_interval)
        device = next(self.backbone.parameters()).device
        shape = adapter.sample_shape(count, length, device)
        size = (count, shape.length, self.config.backbone.latent_dim)
        with torch.no_grad(), evaluating(self):
            conditions = {name: value.to(device) for name, value in conditions.items()}
            condition = self._condition(adapter, conditions or {"count": torch.empty(count, device=device)})
            null = None
            if guidance_scale != 1:
                null = self._with_modality(adapter, adapter.null_condition(count, device), count)
            guided = Guided(
                _denoiser(self.backbone, shape.position_ids),
                _as_guided(condition, shape.mask),
                None if null is None else _as_guided(null, shape.mask),
                diffusion,
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                join=_join,
                autocast_dtype=autocast_dtype,
            )

            def predict(x: Tensor, time: Tensor) -> Tensor:
                evidence = adapter.evidence(x, *diffusion.alpha_sigma(diffusion.level(time)))
                if evidence is None:
                    return guided(x, time)
                return adapter.clean(guided(adapter.expected(evidence), time), evidence)

            tokens = sample(
                predict, diffusion, size, device=device, num_inference_steps=num_inference_steps, seed=seed,
                progress=progress, **options,
            )  # fmt: skip
        return Latents(tokens, shape.mask, shape.position_ids)

    @classmethod
    def _config_from(cls, values: Mapping) -> QGFDModelConfig:
        return as_config(values)

    def _condition(self, adapter: Adapter, batch: Batch) -> Condition:
        return self._with_modality(adapter, adapter.condition(batch), batch_size(batch))

    def _with_modality(self, adapter: Adapter, condition: Condition, count: int) -> Condition:
        if adapter.modality not in self.modality_tokens:
            return condition
        token = self.modality_tokens[adapter.modality].expand(count, 1, -1)
        return join_conditions([(token, None), condition])

    def _check_sampling(self, adapter: Adapter, count: int | None, conditions: Batch, guidance_scale: float) -> int:
        known = ["labels"] if adapter.label_embedding is not None else []
        if getattr(adapter, "condition_encoder", None) is not None:
            known += ["condition_ids", "condition_mask"]
        unknown = [name for name in conditions if name not in known]
        if unknown:
            raise ValueError(f"conditions: got {unknown[0]!r}; this model takes {', '.join(known) or 'none'}")
        for name, value in conditions.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"conditions: got {name} = {value!r}; expected a tensor")
        if count is not None and count < 0:
            raise ValueError(f"count: got {count}; expected 0 or more")
        sizes = {len(value) for value in conditions.values()} | ({count} - {None})
        if len(sizes) != 1:
            raise ValueError(f"count: got {count} with conditions of {sorted(sizes)} samples; expected one number")
        if guidance_scale != 1 and not conditions:
            raise ValueError(f"guidance_scale: got {guidance_scale} without conditions; expected 1, or conditions")
        return sizes.pop()


def _denoiser(backbone: QGFDBackbone, position_ids: Tensor | None) -> Callable[..., Tensor]:
    """The backbone over tokens of any dtype."""

    def predict(x: Tensor, time: Tensor, **condition: Tensor | None) -> Tensor:
        return backbone(x.to(backbone.x_proj.weight.dtype), time, position_ids=position_ids, **condition)

    return predict


def _as_guided(condition: Condition, mask: Tensor | None) -> dict[str, Tensor | None]:
    """A condition, and which latents are there, by the names of the backbone's arguments."""
    return {"cond_tokens": condition[0], "cond_mask": condition[1], "mask": mask}


def _join(conditional: Mapping[str, Tensor | None], null: Mapping[str, Tensor | None]) -> Mapping[str, Tensor | None]:
    """Conditional half, then unconditional; the shorter is filled up with tokens that are masked."""
    conditional, null = dict(conditional), dict(null)
    if null["cond_tokens"] is None:  # one zero token is what the backbone takes for None
        null["cond_tokens"], null["cond_mask"] = torch.zeros_like(conditional["cond_tokens"][:, :1]), None
    halves = (conditional, null)
    lengths = [half["cond_tokens"].shape[1] for half in halves]
    if lengths[0] != lengths[1] or any(half["cond_mask"] is not None for half in halves):
        for half, length in zip(halves, lengths, strict=True):
            states, seen, extra = half["cond_tokens"], half["cond_mask"], max(lengths) - length
            seen = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if seen is None else seen
            half["cond_tokens"] = nn.functional.pad(states, (0, 0, 0, extra))
            half["cond_mask"] = nn.functional.pad(seen, (0, extra))
    return join_halves(conditional, null)


def as_config(values: Mapping) -> QGFDModelConfig:
    """A configuration from plain values, as `dataclasses.asdict` gives them. Raises TypeError, ValueError."""
    parts = {"backbone": QGFDConfig, "diffusion": DiffusionConfig, "text": TextAdapterConfig}
    parts |= {"image": ImageAdapterConfig, "audio": AudioAdapterConfig, "video": VideoAdapterConfig}
    parts["tabular"] = TabularAdapterConfig
    made = {name: kind(**values[name]) for name, kind in parts.items() if values.get(name) is not None}
    return QGFDModelConfig(**{**values, **made})
