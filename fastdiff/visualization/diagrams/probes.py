"""Calls of models on zeros, one sample each, under which `tracing` sees the shapes in them."""

from collections.abc import Callable

import torch
from torch import nn

from fastdiff.visualization.diagrams.anatomy import Trace, tracing

_SIZES = (13, 11, 17, 19, 7, 23, 29, 31, 37, 41, 43, 47, 5, 3)  # of what is free, none of which the model has itself


def probe(model: nn.Module) -> tuple[Trace, dict[int, str]]:
    """What one call of a model shows, and the names of the sizes in it that are free, such as {13: "L"}.

    Known are DiT, TextToImage, MaskedDiffusionLM, QGFDModel, length heads and diffusers' AutoencoderKL, and what is
    derived from them. For other models nothing is called: the trace is empty.
    """
    known = {kind.__name__ for kind in type(model).__mro__}
    training = model.training
    with tracing(model.eval()) as trace:
        sizes = next((call(model) for name, call in _PROBES.items() if name in known), {})
    model.train(training)
    return trace, sizes


def _free(model: nn.Module, *names: str, most: int = 1 << 30) -> dict[str, int]:
    """A size for each name that no parameter of the model has; one that is taken where all are."""
    taken = {size for parameter in model.parameters() for size in parameter.shape}
    sizes = [size for size in _SIZES if size not in taken and size <= most]
    return dict(zip(names, [*sizes, *[min(2, most)] * len(names)], strict=False))


def _named(sizes: dict[str, int]) -> dict[int, str]:
    return {size: name for name, size in sizes.items() if size > 2}


def _zeros(model: nn.Module, *shape: int) -> torch.Tensor:
    like = next(model.parameters())
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def _ids(model: nn.Module, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=next(model.parameters()).device)


def _dit(model: nn.Module) -> dict[int, str]:
    config, sizes = model.config, _free(model, "S")
    sample, time = _zeros(model, 1, config.in_channels, *config.image_size), _zeros(model, 1)
    if config.num_classes:
        model(sample, time, _ids(model, 1))
        return {}
    if config.conditioning == "cross_attention":
        model(sample, time, context=_zeros(model, 1, sizes["S"], config.hidden_size))
        return _named(sizes)
    model(sample, time, layer_embedding=_zeros(model, 1, config.depth, config.hidden_size))
    return {}


def _text_to_image(model: nn.Module) -> dict[int, str]:
    config, sizes = model.config, _free(model, "S")
    layers = (config.text_states,) if config.text_states > 1 else ()
    states = _zeros(model, 1, sizes["S"], *layers, config.text_dim)
    model(_zeros(model, 1, config.dit.in_channels, *config.dit.image_size), _zeros(model, 1), text_states=states)
    return _named(sizes)


def _language_model(model: nn.Module) -> dict[int, str]:
    config = model.config
    sizes, inputs = _free(model, "L", "M", most=config.max_position_embeddings), {}
    if config.timestep_embedding:
        inputs["timesteps"] = _zeros(model, 1)
    if config.num_encoder_layers:
        inputs["encoder_input_ids"] = _ids(model, 1, sizes["M"])
    elif config.cross_attention_dim:
        inputs["encoder_hidden_states"] = _zeros(model, 1, sizes["M"], config.cross_attention_dim)
    model(_ids(model, 1, sizes["L"]), **inputs)
    return _named(sizes)


def _qgfd(model: nn.Module) -> dict[int, str]:
    """Encodes what was decoded of zeros, denoises, and decodes: each modality in turn, step by step."""
    sizes, device = _free(model, "M", "L"), next(model.parameters()).device
    adapters = list(model.adapters.values())
    shapes = [adapter.sample_shape(1, device=device) for adapter in adapters]
    latents = [_zeros(model, 1, shape.length, adapters[0].latent_dim) for shape in shapes]
    for adapter, tokens, shape in zip(adapters, latents, shapes, strict=True):
        adapter.encode(adapter.decode(tokens, shape.mask))
    tokens, mask, places = latents[0], shapes[0].mask, shapes[0].position_ids
    if len(adapters) > 1:  # each has a length of its own
        tokens, mask, places = _zeros(model, 1, sizes["L"], adapters[0].latent_dim), None, None
    condition = _zeros(model, 1, sizes["M"], adapters[0].cond_width)
    model.backbone(tokens, _zeros(model, 1), condition, mask=mask, position_ids=places)
    for adapter, tokens, shape in zip(adapters, latents, shapes, strict=True):
        adapter.decode(tokens, shape.mask)
    return _named(sizes)


def _autoencoder(model: nn.Module) -> dict[int, str]:
    model(_zeros(model, 1, model.config.in_channels, model.config.sample_size, model.config.sample_size))
    return {}


def _length_head(model: nn.Module) -> dict[int, str]:
    model(_zeros(model, 1, model.hidden_size))
    return {}


_PROBES: dict[str, Callable[[nn.Module], dict[int, str]]] = {
    "DiT": _dit, "TextToImage": _text_to_image, "MaskedDiffusionLM": _language_model, "QGFDModel": _qgfd,
    "AutoencoderKL": _autoencoder, "LengthHead": _length_head,
}  # fmt: skip
