"""Losses of a QGFD model on held-out examples, at times and with noise that depend on the seed alone."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdiff.data import ExampleSet
from fastdiff.device import autocast, evaluating
from fastdiff.evaluation.features import batches_of
from fastdiff.models.qgfd.model import QGFDModel


@torch.inference_mode()
def held_out_losses(
    model: QGFDModel,
    modality: str,
    examples: ExampleSet,
    count: int = 256,
    *,
    input_noise: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The losses of `count` examples, spread evenly over the set (over and over where it has fewer), each at a time and
    with noise of its own. The same arguments give the same times and noise, whatever the model.

    Args:
        input_noise: standard deviation of noise that is added to what the denoiser sees, beyond what the time says.

    Returns:
        float32 [count] each: "loss"; where the adapters are trained also its parts, "diffusion" and "reconstruction".
    """
    device, labelled = next(model.parameters()).device, model.adapter(modality).label_embedding is not None
    parts: dict[str, list[Tensor]] = {"diffusion": [], "reconstruction": []}
    with evaluating(model):
        done, generator = 0, torch.Generator().manual_seed(seed)
        while done < count:
            for batch in batches_of(examples, count - done, batch_size):
                _, *shape = model.latent_shape(batch, modality)
                size = len(next(iter(batch.values())))
                t = model.diffusion.sample_times(size, generator)
                noise, extra = torch.randn(2, size, *shape, generator=generator)
                batch = {name: value.to(device) for name, value in batch.items() if labelled or name != "labels"}
                with (
                    _disturbed(model, input_noise * extra.to(device)),
                    autocast(device, autocast_dtype),
                ):
                    losses = model.losses(batch, modality, t=t.to(device), noise=noise.to(device))
                for name, values in zip(parts, losses, strict=True):
                    if values is not None:
                        parts[name].append(values.float().cpu())
                done += size
    measured = {name: torch.cat(values) for name, values in parts.items() if values}
    if "reconstruction" not in measured:
        return {"loss": measured["diffusion"]}
    weight = model.config.reconstruction_weight
    return {"loss": measured["diffusion"] + weight * measured["reconstruction"], **measured}


@contextlib.contextmanager
def _disturbed(model: QGFDModel, noise: Tensor) -> Iterator[None]:
    """Within the block the denoiser sees its latents with `noise` added."""
    hook = model.backbone.register_forward_pre_hook(lambda _, inputs: (inputs[0] + noise, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
