"""Other projects' language models under fastdiff's names: configuration fields and weights, by checkpoint layout."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.weights import without_prefix

Layout = Callable[[Mapping[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "silu": "silu"}
_BLOCK_NAMES = {  # a layout's names inside a block → ours
    "gpt2": {
        "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    },
    "llada": {
        "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    },
}  # fmt: skip
# LLaDA's configuration comes from OLMo's and can say much that LLaDA never does; absent keys have these values.
_LLADA_FIXED = {
    "block_type": ("llama",), "block_group_size": (1,), "activation_type": ("silu",), "layer_norm_type": ("rms",),
    "rope": (True,), "alibi": (False,), "attention_layer_norm": (False,), "include_bias": (False,),
    "scale_logits": (False,), "input_emb_norm": (False,), "embedding_layer_norm": (False,), "clip_qkv": (None,),
    "bias_for_layer_norm": (False, None), "layer_norm_with_affine": (True,), "multi_query_attention": (None, False),
}  # fmt: skip


def from_gpt2(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """transformers' GPT-2 and DiffuGPT (the same blocks under `denoise_model`): fields and weights.

    GPT-2 stores projections as [in, out] and query, key and value in one. Raises KeyError or ValueError for what does
    not fit.
    """
    _require(config, scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False,))
    _require(config, scale_attn_weights=(True,), add_cross_attention=(False,))
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function: got {activation!r}; expected {', '.join(_GPT2_ACTIVATIONS)}")
    width = config["n_embd"]
    fields = dict(
        architecture="gpt2",
        hidden_size=width,
        num_hidden_layers=config["n_layer"],
        num_attention_heads=config["n_head"],
        intermediate_size=config.get("n_inner") or 4 * width,
        max_position_embeddings=config.get("n_positions", config.get("n_ctx")),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        hidden_act=_GPT2_ACTIVATIONS[activation],
    )
    renamed: dict[str, Tensor] = {}
    anchors = ("transformer.wte.weight", "denoise_model.wte.weight", "wte.weight", "embed_tokens.weight")
    for name, tensor in without_prefix(state, *anchors).items():
        name = name.removeprefix("transformer.").removeprefix("denoise_model.")
        if name in ("wte.weight", "embed_tokens.weight"):
            renamed[EMBEDDING] = tensor
        elif name == "wpe.weight":
            renamed["model.embed_positions.weight"] = tensor
        elif name.startswith("ln_f."):
            renamed[f"model.norm.{name[5:]}"] = tensor
        elif name.startswith("h."):
            _, index, rest = name.split(".", 2)
            if rest not in ("attn.bias", "attn.masked_bias"):  # causal masks, which old files hold
                renamed.update(_gpt2_block(f"model.layers.{index}.", rest, tensor))
        else:
            renamed[name] = tensor
    return fields, _untangle_head(renamed, config.get("tie_word_embeddings", True), fields)


def _gpt2_block(prefix: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    module, _, kind = name.rpartition(".")
    if tensor.ndim == 2:
        tensor = tensor.t()
    if module == "attn.c_attn":
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}_proj.{kind}": value.contiguous() for part, value in parts}
    return {f"{prefix}{_BLOCK_NAMES['gpt2'].get(module, module)}.{kind}": tensor.contiguous()}


def from_llada(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GSAI-ML's LLaDA (LLaDAModelLM): fields and weights. Raises KeyError or ValueError for what does not fit."""
    _require(config, **_LLADA_FIXED)
    width, bias = config["d_model"], bool(config.get("include_qkv_bias", False))
    fields = dict(
        architecture="llada",
        hidden_size=width,
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        intermediate_size=config.get("mlp_hidden_size") or int(config.get("mlp_ratio", 4) * width),
        max_position_embeddings=config["max_sequence_length"],
        norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 1e4),
        attention_bias=bias,
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in without_prefix(state, "transformer.wte.weight").items():
        name = name.removeprefix("model.").removeprefix("transformer.")
        if name.startswith("blocks."):
            _, index, module, kind = name.split(".", 3)
            name = f"model.layers.{index}.{_BLOCK_NAMES['llada'].get(module, module)}.{kind}"
        else:
            names = {"wte.weight": EMBEDDING, "ln_f.weight": "model.norm.weight", "ff_out.weight": HEAD}
            name = names.get(name, name)
        renamed[name] = tensor
    return fields, _untangle_head(renamed, config.get("weight_tying", False), fields)


def from_llama(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """transformers' Llama and DiffuLLaMA: fields and weights. Raises KeyError or ValueError for what does not fit."""
    bias = bool(config.get("attention_bias", False))
    fields = dict(architecture="llama", attention_bias=bias, output_bias=bias, mlp_bias=config.get("mlp_bias", False))
    return _llama_style(config, state, fields, rope_theta=1e4)


def from_qwen2(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Dream and transformers' Qwen2: fields and weights. Raises KeyError or ValueError for what does not fit."""
    _require(config, use_sliding_window=(False,))
    return _llama_style(config, state, dict(architecture="dream"), rope_theta=1e4)


def _llama_style(config, state, fields, rope_theta):
    _require(config, hidden_act=("silu",))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type: got {kind!r}; expected 'default'")
    fields |= dict(
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim"),
        intermediate_size=config["intermediate_size"],
        max_position_embeddings=config["max_position_embeddings"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", config.get("rope_theta", rope_theta)),
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in without_prefix(state, "model.embed_tokens.weight").items():
        if name.endswith("rotary_emb.inv_freq"):  # old files hold it; it follows from the configuration
            continue
        if not name.startswith(("model.", HEAD)):  # DiffuLLaMA's training code, or the model without its head
            name = "model." + name.removeprefix("denoise_model.")
        renamed[name] = tensor
    return fields, _untangle_head(renamed, config.get("tie_word_embeddings", False), fields)


def _untangle_head(state: dict[str, Tensor], tied: bool, fields: dict[str, Any]) -> dict[str, Tensor]:
    """Sets vocab_size and tie_word_embeddings from the weights; a tied head is dropped from them.

    Raises KeyError where a head of its own is missing.
    """
    if EMBEDDING not in state and HEAD in state and tied:  # a file may hold either of two tied tensors
        state[EMBEDDING] = state[HEAD]
    if HEAD not in state and not tied:
        raise KeyError(HEAD)
    if HEAD not in state or (tied and torch.equal(state[HEAD], state[EMBEDDING])):
        state.pop(HEAD, None)
        fields["tie_word_embeddings"] = True
    else:
        fields["tie_word_embeddings"] = False
    fields["vocab_size"] = len(state[EMBEDDING])
    return state


def grow_vocabulary(state: dict[str, Tensor], size: int) -> None:
    """Appends rows to embedding and head until there are `size`; each is the mean of the rows that were there."""
    for name in (EMBEDDING, HEAD):
        if name in state and len(state[name]) < size:
            rows = state[name]
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype)
            state[name] = torch.cat([rows, mean.expand(size - len(rows), -1)])


def _require(config: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    for name, values in known.items():
        value = config.get(name, values[0])
        if value not in values:
            raise ValueError(f"{name}: got {value!r}; expected {values[0]!r}")


# By config.json's model_type in lower case: the layout, and whether a checkpoint may be an autoregressive model that
# has no mask token yet.
LAYOUTS: dict[str, Layout] = {
    "gpt2": from_gpt2,
    "llama": from_llama,
    "qwen2": from_qwen2,
    "dream": from_qwen2,
    "llada": from_llada,
}
ADAPTABLE = ("gpt2", "llama", "qwen2")
# For folders without a model_type, by architectures[0].
MODEL_TYPES = {
    "gpt2lmheadmodel": "gpt2",
    "gpt2model": "gpt2",
    "discretediffusionmodel": "gpt2",
    "llamaforcausallm": "llama",
    "qwen2forcausallm": "qwen2",
    "dreammodel": "dream",
    "lladamodellm": "llada",
}
KNOWN = "fastdiff_masked_lm, gpt2 (GPT-2, DiffuGPT), llama (Llama, DiffuLLaMA), qwen2, Dream, llada"
