"""Samples of text-to-image networks: what prompts mean to them as the condition of `sample`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.device import evaluating
from fastdiff.diffusion.classes import sample_shape
from fastdiff.diffusion.continuous import Diffusion
from fastdiff.diffusion.guidance import Guided, check_guidance
from fastdiff.diffusion.modulated import Modulated, knows_modulations
from fastdiff.diffusion.sampling import make_steps, sample

Condition = Mapping[str, Tensor]


@torch.no_grad()
def sample_prompts(
    model: nn.Module,
    diffusion: Diffusion,
    condition: Condition,
    null: Condition | None = None,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
    seed: int | Sequence[int] = 0,
    sample_size: int | tuple[int, int] | tuple[int, int, int] | None = None,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    progress: bool = False,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:  # [B, C, H, W], float32
    """Draws one sample per row of a condition. On one machine the same arguments give the same bits.

    The texts were read before: a step costs what it costs with class labels. Rows that are the same are computed once.

    Args:
        model: a `TextToImage`. It runs in eval mode, on its own device and in the dtype of its weights, and gets its
            mode back.
        condition: what `model.condition` made of the prompts, each tensor `[B, ...]`.
        null: what stands for no prompt: None is `model.null_condition(B)`. Contexts may differ in length.
        guidance_scale, guidance_interval, guidance_channels, autocast_dtype: as in `Guided`.
        sample_size: H = W, (H, W) or (C, H, W); None is that of the model's DiT.
        num_inference_steps, seed, callback, progress, options: as in `sample`. A guided step is one forward pass of
            both halves.

    Raises:
        ValueError: an empty condition, rows that do not fit together, a sampler that does not fit, guidance of a model
            that has nothing to stand for no prompt, too many steps, or a list of seeds of another length; the message
            names the argument and what was expected.
        TypeError: an option that there is not.
    """
    check_guidance(guidance_scale, guidance_interval, guidance_channels)
    parameter = next(model.parameters())
    count = _rows(condition)
    shape = (count, *sample_shape(sample_size, model.dit.config))
    conditional = {name: tensor.to(parameter.device) for name, tensor in condition.items()}
    unconditional = None
    if guidance_scale != 1:
        null = model.null_condition(count) if null is None else null
        unconditional = {name: tensor.to(parameter.device) for name, tensor in null.items()}
        conditional, unconditional = _of_one_length(conditional, unconditional)

    def predict(x: Tensor, time: Tensor, **given: Tensor) -> Tensor:
        return model(x.to(parameter.dtype), time, condition=given)

    if "layer_embedding" in conditional and knows_modulations(model):
        times = make_steps(diffusion, num_inference_steps, options).times.to(parameter.device)
        halves = [each["layer_embedding"] for each in (conditional, unconditional) if each is not None]
        predict = Modulated(model, diffusion.model_time(times), layer_embedding=torch.cat(halves))
    guided = Guided(
        predict, conditional, unconditional, diffusion, guidance_scale=guidance_scale,
        guidance_interval=guidance_interval, guidance_channels=guidance_channels, autocast_dtype=autocast_dtype,
    )  # fmt: skip
    with evaluating(model):
        return sample(
            guided, diffusion, shape, device=parameter.device, num_inference_steps=num_inference_steps, seed=seed,
            callback=callback, progress=progress, **options,
        )  # fmt: skip


def _rows(condition: Condition) -> int:
    counts = {len(tensor) for tensor in condition.values()}
    if len(counts) != 1:
        raise ValueError(
            f"condition: got {len(condition)} tensors of {sorted(counts)} rows; expected what model.condition gives"
        )
    return counts.pop()


def _of_one_length(conditional: Condition, null: Condition) -> tuple[Condition, Condition]:
    """Both with contexts of one length and, where there are several tokens, a mask."""
    if "context" not in conditional or "context" not in null:
        return conditional, null
    length = max(each["context"].shape[1] for each in (conditional, null))
    return tuple(_padded(each, length) for each in (conditional, null))


def _padded(condition: Condition, length: int) -> Condition:
    context = condition["context"]
    if length == 1:
        return {"context": context}
    mask = condition.get("context_mask")
    mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device) if mask is None else mask
    more = length - context.shape[1]
    return {"context": F.pad(context, (0, 0, 0, more)), "context_mask": F.pad(mask, (0, more))}
