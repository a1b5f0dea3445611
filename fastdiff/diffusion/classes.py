"""Samples of class-conditional networks: labels as the condition of `sample`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.device import evaluating
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.guidance import Guided, check_guidance
from fastdiff.diffusion.modulated import Modulated, knows_modulations
from fastdiff.diffusion.sampling import make_steps, sample
from fastdiff.nn.embeddings import check_label_range


@torch.no_grad()
def sample_classes(
    model: torch.nn.Module,
    diffusion: Diffusion,
    class_labels: Tensor | Sequence[int],  # [B] int64
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    seed: int | Sequence[int] = 0,
    sample_size: int | tuple[int, int] | tuple[int, int, int] | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    null_conditioning: Mapping[str, Tensor] | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:  # [B, C, H, W], float32
    """Draws one sample per label. On one machine the same arguments give the same bits.

    This is `sample` with a `Guided` model, its labels checked and the null label and the shape taken from its config.

    Args:
        model: a `DiT`, or any module called as model(x [B, C, H, W], time [B], labels [B], **conditioning). It runs
            in eval mode, on its own device and in the dtype of its weights, and gets its mode back.
        class_labels: one label per sample.
        guidance_scale, guidance_interval, guidance_channels, autocast_dtype: as in `Guided`. The label of no class is
            the model's `config.num_classes`.
        sample_size: H = W, (H, W) or (C, H, W); None is the model's `config.image_size` and `in_channels`.
        conditioning: further keyword arguments of the model, each `[B, ...]`.
        null_conditioning: what they are for the unconditional half; zeros where not given.
        num_inference_steps, seed, callback, progress, options: as in `sample`. A guided step is one forward pass of
            both halves.

    Raises:
        ValueError: a sampler that does not fit, a label out of range, guidance of a model without a null label, too
            many steps, or a list of seeds of another length; the message names the argument and what was expected.
        TypeError: labels that are not integers, or an option that there is not.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    labels, config = _as_labels(class_labels), getattr(model, "config", None)
    check_guidance(guidance_scale, guidance_interval, guidance_channels)
    _check_labels(labels, config, guidance_scale)
    shape = (len(labels), *sample_shape(sample_size, config))
    conditional, null = {**(conditioning or {}), "class_labels": labels.to(device)}, None
    if guidance_scale != 1:
        null = {name: torch.zeros_like(value) for name, value in conditional.items()}
        null |= {name: value for name, value in (null_conditioning or {}).items() if name in null}
        null["class_labels"] = torch.full_like(conditional["class_labels"], config.num_classes)

    predict = _as_given(model)
    if not conditioning and knows_modulations(model):
        times = make_steps(diffusion, num_inference_steps, options).times
        labels_in_use = [each["class_labels"] for each in (conditional, null) if each is not None]
        predict = Modulated(model, diffusion.model_time(times.to(device)), torch.cat(labels_in_use))

    guided = Guided(
        predict, conditional, null, diffusion, guidance_scale=guidance_scale, guidance_interval=guidance_interval,
        guidance_channels=guidance_channels, autocast_dtype=autocast_dtype,
    )  # fmt: skip
    with evaluating(model):
        return sample(
            guided, diffusion, shape, device=device, num_inference_steps=num_inference_steps, seed=seed,
            callback=callback, progress=progress, **options,
        )  # fmt: skip


def _as_given(model: torch.nn.Module) -> Callable[..., Tensor]:
    """The model, called in the dtype of its weights: samples stay in float32."""

    def predict(x: Tensor, time: Tensor, class_labels: Tensor, **conditioning: Tensor) -> Tensor:
        parameter = next(model.parameters(), x)
        return model(x.to(parameter.dtype), time, class_labels, **conditioning)

    return predict


def _as_labels(class_labels: Tensor | Sequence[int]) -> Tensor:  # [B], int64
    try:
        labels = torch.as_tensor(class_labels).flatten()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"class_labels: got {class_labels!r}; expected labels, [B] int64") from None
    if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"class_labels: got dtype {labels.dtype}; expected int64")
    return labels.to(torch.int64)


def _check_labels(labels: Tensor, config, guidance_scale: float) -> None:
    num_classes = getattr(config, "num_classes", None)
    if num_classes is None:
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale: got {guidance_scale}; a model without config.num_classes takes 1 only")
        return
    null_label = getattr(config, "null_label", True)
    if guidance_scale != 1 and not null_label:
        raise ValueError(
            f"guidance_scale: got {guidance_scale} for a model that was trained without label dropout and has no null "
            "label to guide away from; expected 1"
        )
    check_label_range(labels, num_classes, null_label)


def sample_shape(sample_size: int | Sequence[int] | None, config: Any) -> tuple[int, int, int]:
    """(C, H, W) of a sample: what is asked for, with what is missing as a model's config has it. Raises ValueError."""
    if sample_size is None and config is None:
        raise ValueError("sample_size: got None for a model without a config; expected (channels, height, width)")
    size = config.image_size if sample_size is None else sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) == 2 and config is not None:
        size = (config.in_channels, *size)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"sample_size: got {sample_size}; expected H, (H, W) or (channels, H, W)")
    return size
