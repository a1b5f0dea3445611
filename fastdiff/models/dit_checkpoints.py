"""Other projects' DiT checkpoints: files of facebookresearch/DiT and LLM2DiT, diffusers' DiTTransformer2DModel folders.

They are read as a configuration and weights under fastdiff's names.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import reason_of
from fastdiff.models.dit_config import PRESETS, DiTConfig
from fastdiff.models.pretrained import CONFIG_NAME, check_overrides, read_config
from fastdiff.models.text_to_image_checkpoints import LLM2DIT_ANCHOR, dit_llama
from fastdiff.models.weights import check_counts, read_tensors, read_weights, state_of, without_prefix
from fastdiff.nn import sincos_2d

DIFFUSERS_CLASS = "DiTTransformer2DModel"
# The name in the published checkpoints' folders, for the same model before it had a class of its own: what the older
# class does where its configuration says nothing, and the parts of it that a DiT has not.
_OLDER_CLASS = "Transformer2DModel"
_OLDER_DEFAULTS = {
    "norm_type": "layer_norm", "activation_fn": "geglu", "attention_bias": False, "norm_elementwise_affine": True,
}  # fmt: skip
_OLDER_PARTS = {
    "cross_attention_dim": None, "num_vector_embeds": None, "caption_channels": None, "double_self_attention": False,
    "only_cross_attention": False, "attention_type": "default",
}  # fmt: skip
DIFFUSERS_CLASSES = (DIFFUSERS_CLASS, _OLDER_CLASS)
_DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_LATENT_SHARE = 8  # of the autoencoder that the published checkpoints were trained on: pixels of an image a latent

_FIRST_EMBEDDERS = ("t_embedder", "y_embedder")
_HEADS_BY_WIDTH = {
    preset["hidden_size"]: preset["num_heads"] for name, preset in PRESETS.items() if name.startswith("DiT-")
}
_DIFFUSERS_ACTIVATIONS = {"gelu": "gelu", "gelu-approximate": "gelu_tanh", "linear-silu": "silu"}


def model_folder(path: Path) -> Path:
    """The folder of a diffusers pipeline's model; other paths as they are."""
    inside = path / "transformer"
    return inside if not (path / CONFIG_NAME).is_file() and (inside / CONFIG_NAME).is_file() else path


def read_foreign(
    path: Path, overrides: dict[str, Any], free_fields: tuple[str, ...]
) -> tuple[DiTConfig, dict[str, Tensor]] | None:
    """Configuration and weights of another project's file or folder; None for a folder that is not diffusers'.

    Raises FileNotFoundError, ValueError and TypeError as `fastdiff.models.DiT.from_pretrained` does.
    """
    if path.is_file():
        check_overrides(overrides, (*free_fields, "num_heads", "num_classes"))
        return _read_facebook(path, overrides)
    config = read_config(path)
    if config.get("_class_name") not in DIFFUSERS_CLASSES:
        return None
    variant = overrides.pop("variant", None)
    check_overrides(overrides, free_fields)
    state = read_weights(path, _DIFFUSERS_WEIGHTS, "a DiT", variant)
    check_counts(config, state, path / CONFIG_NAME)
    try:
        config, state = _from_diffusers(config, state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a {DIFFUSERS_CLASS} that can be loaded: {reason_of(error)}") from error
    return dataclasses.replace(config, **overrides), state


def _read_facebook(path: Path, overrides: dict[str, Any]) -> tuple[DiTConfig, dict[str, Tensor]]:
    content = read_tensors(path, "a DiT")
    state = without_prefix(state_of(content, path), "x_embedder.proj.weight", LLM2DIT_ANCHOR)
    if LLM2DIT_ANCHOR in state:
        return _read_llama(state, overrides, path)
    arguments = content.get("args")  # the command line that it was trained with
    arguments = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
    try:
        return _from_facebook(state, arguments, overrides, path)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        names = ", ".join([*state][:2])
        raise ValueError(
            f"{path}: not a facebookresearch/DiT checkpoint ({len(state)} tensors: {names}, …): {reason_of(error)}"
        ) from error


def _read_llama(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> tuple[DiTConfig, dict[str, Tensor]]:
    """LLM2DiT's DiT; a Q-Former in the file is left out."""
    try:
        config, renamed = dit_llama(state, overrides)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a DiT of LLM2DiT ({len(state)} tensors): {reason_of(error)}") from error
    own = {name: tensor for name, tensor in renamed.items() if not name.startswith("query_embedder.")}
    if len(own) < len(renamed):
        warnings.warn(f"{path}: its Q-Former is left out; TextToImage.from_pretrained reads it as well", stacklevel=7)
    return config, own


def _from_facebook(
    state: dict[str, Tensor], arguments: Mapping[str, Any], overrides: Mapping[str, Any], path: Path
) -> tuple[DiTConfig, dict[str, Tensor]]:
    """facebookresearch/DiT's state dict: the names are ours, the configuration is read off the shapes.

    What leaves no trace in them is taken from `overrides`, then from the checkpoint's own command line, then as it was
    published: the heads of that width's preset, a label table with a null label. Raises KeyError or ValueError where
    something does not fit.
    """
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    preset = PRESETS.get(str(arguments.get("model")), {})
    num_heads = overrides.get("num_heads") or preset.get("num_heads") or _HEADS_BY_WIDTH.get(hidden_size)
    if num_heads is None:
        raise ValueError(f"its width {hidden_size} is that of no preset: pass num_heads=")
    fields = _label_fields(len(state["y_embedder.embedding_table.weight"]), arguments, overrides)
    out_channels = len(state["final_layer.linear.weight"]) // patch_size**2
    config = DiTConfig(
        input_size=_input_size(state, patch_size, arguments, overrides, path),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=num_heads,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / hidden_size,
        learn_sigma=_learns_sigma(in_channels, out_channels),
        mlp_activation="gelu_tanh",
        frequency_embedding_size=state["t_embedder.mlp.0.weight"].shape[1],
        **fields,
    )
    return dataclasses.replace(
        config, **{**overrides, "num_heads": num_heads, "num_classes": config.num_classes}
    ), state


def _label_fields(rows: int, arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A label table has a row a class, and one more where labels were dropped in training."""
    source = overrides if "num_classes" in overrides else arguments
    num_classes = source.get("num_classes", rows - 1)
    if num_classes not in (rows - 1, rows):
        of = "num_classes" if source is overrides else "its args.num_classes"
        raise ValueError(f"{of}: got {num_classes!r}; its label table has {rows} rows: expected {rows - 1} or {rows}")
    if num_classes == rows:
        return dict(num_classes=rows, null_label=False, class_dropout_prob=0.0)
    return dict(num_classes=num_classes)


def _input_size(
    state: dict[str, Tensor], patch_size: int, arguments: Mapping[str, Any], overrides: Mapping[str, Any], path: Path
) -> int:
    """Height and width of the latents, from the positions, which leave the state, or from what stands for them."""
    if "pos_embed" not in state:  # it is no parameter: some save those alone
        size = arguments.get("image_size")
        if isinstance(size, int) and size > 0 and size % (_LATENT_SHARE * patch_size) == 0:
            return size // _LATENT_SHARE
        default = DiTConfig().input_size
        if "input_size" not in overrides:
            warnings.warn(f"{path}: no pos_embed; assuming input_size {default}, as of 256 x 256 pixels", stacklevel=7)
        return default - default % patch_size
    return patch_size * _grid_of(state.pop("pos_embed"), len(state["x_embedder.proj.weight"]))


def _grid_of(positions: Tensor, width: int) -> int:
    """Height and width of the grid of positions `[1, N, D]`. Raises ValueError where they are not what we make."""
    positions = positions.float()[0]
    grid = math.isqrt(len(positions))
    fits = grid * grid == len(positions) and positions.shape[1:] == (width,)
    if not fits or not torch.allclose(positions, sincos_2d(grid, grid, width), atol=1e-2, rtol=0):
        raise ValueError("pos_embed holds other positions than those of a square sine-cosine grid")
    return grid


def _from_diffusers(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[DiTConfig, dict[str, Tensor]]:
    """diffusers' DiTTransformer2DModel, from its config.json and state dict.

    Each of its blocks has its own timestep and label embedding. Where all are equal, as in checkpoints converted
    from facebookresearch/DiT, one is kept. Raises KeyError or ValueError for an option that our DiT does not have.
    """
    if config.get("_class_name") == _OLDER_CLASS:
        config = _OLDER_DEFAULTS | dict(config)
        for name, none in _OLDER_PARTS.items():
            if config.get(name) not in (None, none):
                raise ValueError(f"{name}: got {config[name]!r}; expected {none!r}: this DiT has none")
    activation = config.get("activation_fn", "gelu-approximate")
    if activation not in _DIFFUSERS_ACTIVATIONS:
        raise ValueError(f"activation_fn: got {activation!r}; expected one of {', '.join(_DIFFUSERS_ACTIVATIONS)}")
    if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise ValueError(f"norm_type: got {config['norm_type']!r}; expected 'ada_norm_zero'")
    if config.get("dropout"):
        raise ValueError(f"dropout: got {config['dropout']}; expected 0: this DiT has none")
    depth, affine = config["num_layers"], bool(config.get("norm_elementwise_affine", False))
    in_channels = config["in_channels"]
    per_block = not _embedders_equal(state, depth)
    ours = DiTConfig(
        input_size=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=in_channels,
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        depth=depth,
        num_heads=config["num_attention_heads"],
        num_classes=config["num_embeds_ada_norm"],
        learn_sigma=_learns_sigma(in_channels, config.get("out_channels") or in_channels),
        mlp_norm_eps=config.get("norm_eps", 1e-5),  # its first norm has 1e-6 whatever the configuration says
        norm_elementwise_affine=affine,
        qkv_bias=config.get("attention_bias", True),
        mlp_activation=_DIFFUSERS_ACTIVATIONS[activation],
        frequency_shift=1.0,
        embedders_per_block=per_block,
    )
    return ours, _rename_diffusers(state, ours)


def _rename_diffusers(state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The tensors under our names; what is left over keeps its own, so that it is refused as unknown."""
    renamed: dict[str, Tensor] = {}
    state = dict(state)
    if "pos_embed.pos_embed" in state:  # older files have it
        _grid_of(state.pop("pos_embed.pos_embed"), config.hidden_size)

    def move(source: str, target: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
        for kind in kinds:
            renamed[f"{target}.{kind}"] = state.pop(f"{source}.{kind}")

    move("pos_embed.proj", "x_embedder.proj")
    move("proj_out_1", "final_layer.adaLN_modulation.1")
    move("proj_out_2", "final_layer.linear")
    for index in range(config.depth):
        theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
        time, label = _block_embedder_names(index) if index and config.embedders_per_block else _FIRST_EMBEDDERS
        move(f"{theirs}.norm1.emb.timestep_embedder.linear_1", f"{time}.mlp.0")  # where all are equal: the last one's
        move(f"{theirs}.norm1.emb.timestep_embedder.linear_2", f"{time}.mlp.2")
        move(f"{theirs}.norm1.emb.class_embedder.embedding_table", f"{label}.embedding_table", ("weight",))
        move(f"{theirs}.norm1.linear", f"{ours}.adaLN_modulation.1")
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [state.pop(f"{theirs}.attn1.to_{letter}.{kind}") for letter in "qkv"]
            if len({part.dtype for part in parts}) > 1:  # joining them would convert
                raise ValueError(f"{theirs}.attn1 has dtypes {', '.join(str(part.dtype) for part in parts)}")
            renamed[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
        move(f"{theirs}.attn1.to_out.0", f"{ours}.attn.proj")
        move(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.fc1")
        move(f"{theirs}.ff.net.2", f"{ours}.mlp.fc2")
        if config.norm_elementwise_affine:
            move(f"{theirs}.norm3", f"{ours}.norm2")
            weight = renamed[f"{ours}.norm2.weight"]
            renamed[f"{ours}.norm1.weight"] = torch.ones_like(weight)  # diffusers' first norm has no parameters
            renamed[f"{ours}.norm1.bias"] = torch.zeros_like(weight)
    return renamed | state


def _block_embedder_names(index: int) -> tuple[str, str]:
    return f"block_embedders.{index - 1}.0", f"block_embedders.{index - 1}.1"


def _embedders_equal(state: Mapping[str, Tensor], depth: int) -> bool:
    first = "transformer_blocks.0.norm1.emb."
    names = [name.removeprefix(first) for name in state if name.startswith(first)]
    return all(
        torch.equal(state[first + name], state[f"transformer_blocks.{index}.norm1.emb.{name}"])
        for index in range(1, depth)
        for name in names
    )


def _learns_sigma(in_channels: int, out_channels: int) -> bool:
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(f"it has {out_channels} output channels; expected {in_channels} or {2 * in_channels}")
    return out_channels == 2 * in_channels
