"""What modules are called in a picture: by their class where it is known, else by their class's own name.

Classes are known by name, through their bases, so that nothing is imported to draw a picture; another class of the same
sort (an attention, an MLP, a norm) is named by the words in its name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

_ACTIVATIONS = {"gelu": "GELU", "gelu_tanh": "GELU", "silu": "SiLU", "swiglu": "SwiGLU"}
# By the attribute's name, of embeddings, linear layers and bare parameters.
_NAMES = {
    "embed_tokens": "Token embedding", "embed_positions": "Position embedding", "pos_embed": "Position embedding",
    "lm_head": "Language-model head", "text_proj": "Text projection", "x_proj": "Input projection",
    "cond_proj": "Condition projection", "final_proj": "Output projection", "in_proj": "Input projection",
    "out_proj": "Output projection", "latent_proj": "To latents", "token_head": "Token head",
    "conv_in": "First convolution", "conv_out": "Last convolution", "quant_conv": "To mean and variance",
    "post_quant_conv": "From latents", "queries": "Learned queries", "output_proj": "Output projection",
    "query_to_layer": "Queries → layers", "final_norm": "Final norm", "context_norm": "Norm of the context",
    "modality_tokens": "Modality tokens", "final_modulation": "adaLN modulation",
    "adaLN_modulation": "adaLN modulation", "category_embeddings": "Embeddings of categories",
    "category_heads": "Heads of categories", "encoder": "Encoder", "decoder": "Decoder",
    "condition_encoder": "Encoder of conditions", "convolutions": "Convolutions",
}  # fmt: skip


@dataclass(frozen=True)
class Words:
    """A module in words: its name, what there is to say of it, and its role (a key of `svg.ROLES`)."""

    title: str
    detail: str
    role: str


def describe(module: nn.Module, name: str = "") -> Words:
    """The words for a module that is the attribute `name` of another."""
    kinds = [kind.__name__ for kind in type(module).__mro__]
    for known, words in _KNOWN:
        if known in kinds:
            found = words(module)
            return Words(_NAMES.get(name, found.title), found.detail, found.role)
    sort = kinds[0].lower()
    if "crossattention" in sort or ("attention" in sort and "cross" in name.lower()):
        return Words("Cross-attention", _heads(module), "cross")
    for part, words in _SORTS:
        if part in sort:
            return words(module, kinds[0])
    if isinstance(module, nn.Sequential):
        return _sequential(module, name)
    return Words(_NAMES.get(name, spoken(kinds[0])), "", "plain")


def spoken(name: str) -> str:
    """A class's or attribute's name in words: "ViTEmbeddings" → "ViT embeddings", "mid_block" → "Mid block"."""
    name = name.replace("_", " ").removesuffix("2D").removesuffix("1D")
    # before a capital letter: after a small one, after one such as the T of DiT, after three or more such as QGFD
    words = re.sub(r"(?:(?<=[a-z0-9])|(?<=[a-z][A-Z])|(?<=[A-Z]{3}))(?=[A-Z][a-z])", " ", name).split()
    lowered = [word if word[1:].lower() != word[1:] or len(word) == 1 else word.lower() for word in words[1:]]
    return " ".join([words[0][:1].upper() + words[0][1:], *lowered])


def named_parameter(name: str) -> str:
    """The title of a parameter that no module of its own holds."""
    return _NAMES.get(name, spoken(name))


def brief(module: nn.Module, name: str = "") -> str:
    """A part of a block in a few words: "attention, 6 heads", "MLP 512"."""
    words = describe(module, name)
    if words.role in ("attention", "cross"):
        heads = _count_of(module, "num_heads", "num_attention_heads", "heads")
        title = words.title if words.title[:2].isupper() else words.title.lower()
        return f"{title}, {heads} heads" if heads else title
    if words.role == "mlp":
        return f"MLP {_widths(module)[1]}" if _widths(module) else "MLP"
    return "adaLN" if words.role == "modulation" else ""


def _count_of(module: nn.Module, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)


def _heads(module: nn.Module) -> str:
    """Heads, their width, the heads of keys and values where these are fewer, norms of queries and keys."""
    heads = _count_of(module, "num_heads", "num_attention_heads", "heads")
    if not heads:
        return ""
    projection = next((getattr(module, name) for name in ("proj", "o_proj", "wo") if hasattr(module, name)), None)
    inner = getattr(projection, "in_features", None)
    said = f"{heads} heads × {inner // heads}" if inner else f"{heads} heads"
    shared = _count_of(module, "num_key_value_heads")
    if shared and shared != heads:
        said += f" · {shared} of keys and values"
    if getattr(module, "q_norm", None) is not None:
        said += " · norms of queries and keys"
    options = getattr(module, "options", None)
    if isinstance(options, dict) and "steps" in options:
        hops, alpha = options["steps"], options.get("alpha", 0.5)
        said += f" · {hops} hop{'s' if hops != 1 else ''}, α {alpha:g}" if hops else " · not diffused"
    return said


def _widths(module: nn.Module) -> tuple[int, int, int] | None:
    """Input, hidden and output width of an MLP: those of its first and last linear layer (GPT-2's are Conv1D)."""
    layers = [each for each in module.modules() if isinstance(each, nn.Linear)]
    if len(layers) < 2:
        return None
    return layers[0].in_features, layers[0].out_features, layers[-1].out_features


def _mlp(module: nn.Module) -> Words:
    widths = _widths(module)
    said = " → ".join(map(str, widths)) if widths else ""
    activation = _ACTIVATIONS.get(getattr(module, "activation", None), "")
    if getattr(module, "gate_proj", None) is not None:
        activation = "SwiGLU" if activation == "SiLU" else f"gated {activation}"
    title = "MLP with a 3 × 3 convolution" if isinstance(getattr(module, "conv", None), nn.Conv2d) else "MLP"
    return Words(title, " · ".join(filter(None, (said, activation))), "mlp")


def _norm(module: nn.Module) -> Words:
    title = "RMSNorm" if getattr(module, "norm", "layer") == "rms" or "RMS" in type(module).__name__ else "LayerNorm"
    if isinstance(module, nn.GroupNorm):
        return Words("GroupNorm", f"{module.num_groups} groups", "norm")
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    learnt = "" if getattr(module, "weight", None) is not None else "no weights"
    return Words(title, " · ".join(filter(None, (f"ε {eps:g}" if eps else "", learnt))), "norm")


def _linear(module: nn.Linear) -> Words:
    return Words("Linear", f"{module.in_features} → {module.out_features}", "head")


def _embedding(module: nn.Embedding) -> Words:
    return Words("Embedding", f"{module.num_embeddings} × {module.embedding_dim}", "embed")


def _conv(module: nn.Module) -> Words:
    sides = " × ".join(map(str, module.kernel_size))
    stride = f", stride {module.stride[0]}" if module.stride[0] != 1 else ""
    return Words("Convolution", f"{sides}{stride} · {module.in_channels} → {module.out_channels} channels", "conv")


def _patches(module: nn.Module) -> Words:
    dim, channels, side, _ = module.proj.weight.shape
    return Words("Patches to tokens", f"{side} × {side} pixels × {channels} → {dim}", "embed")


def _time(module: nn.Module) -> Words:
    return Words("Time embedding", f"{module.frequency_dim} sinusoids → MLP", "condition")


def _label(module: nn.Module) -> Words:
    null = " and none" if module.null_label else ""
    number = f"{module.num_classes} classes" if module.num_classes != 1 else "1 class"
    return Words("Class embedding", number + null, "condition")


def _final(module: nn.Module) -> Words:
    modulated = "norm, adaLN, " if hasattr(module, "adaLN_modulation") else ""
    return Words("Final layer", f"{modulated}{module.linear.in_features} → {module.linear.out_features}", "head")


def _stem(module: nn.Module) -> Words:
    return Words("Convolutional stem", f"two 5 × 5 · {module.in_channels} → {module[0].out_channels} channels", "conv")


def _mix(module: nn.Module) -> Words:
    return Words("Learned mean of layers", f"{len(module.logits)} hidden states", "condition")


def _attention(module: nn.Module) -> Words:
    cross = getattr(getattr(module, "o_proj", None), "branch", "") == "cross" or hasattr(module, "context_dim")
    title = "QGFD attention" if isinstance(getattr(module, "options", None), dict) else "Self-attention"
    return Words("Cross-attention" if cross else title, _heads(module), "cross" if cross else "attention")


def _sequential(module: nn.Sequential, name: str) -> Words:
    linear = [each for each in module if isinstance(each, nn.Linear)]
    widths = " → ".join(map(str, [linear[0].in_features, *(each.out_features for each in linear)])) if linear else ""
    if "modulation" in name:
        return Words("adaLN modulation", f"SiLU · {widths}", "modulation")
    return Words(_NAMES.get(name, spoken(name or "Sequential")), widths, "head" if linear else "plain")


def _stack(module: nn.Module) -> Words:
    block = brief(module.blocks[0].self_attn) if len(module.blocks) else ""
    number = f"{len(module.blocks)} block{'s' if len(module.blocks) != 1 else ''}"
    widths = f"{module.in_proj.in_features} → {module.in_proj.out_features} → {module.out_proj.out_features}"
    return Words("Stack of blocks", " · ".join(filter(None, (widths, number, block))), "plain")


def _block(module: nn.Module, kind: str) -> Words:
    parts = [_listed(child) or brief(child, name) for name, child in module.named_children()]
    return Words(spoken(kind), " · ".join(dict.fromkeys(filter(None, parts))), "plain")


def _listed(module: nn.Module) -> str:
    """A list of like modules in a block: "2 × resnet block"."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return ""
    name = spoken(type(module[0]).__name__).lower()
    return name if len(module) == 1 else f"{len(module)} × {name}"


_KNOWN: tuple[tuple[str, Callable[[nn.Module], Words]], ...] = (
    ("PatchEmbed", _patches), ("ConvStem", _stem), ("TimestepEmbedding", _time), ("FourierEmbedding", _time),
    ("LabelEmbedding", _label), ("FinalLayer", _final), ("PlainFinalLayer", _final), ("StateMix", _mix),
    ("TokenStack", _stack),
    ("SelfAttention", _attention), ("CrossAttention", _attention), ("Attention", _attention), ("Mlp", _mlp),
    ("ConvMlp", _mlp), ("FeedForward", _mlp), ("_AdaNorm", _norm), ("LayerNorm", _norm), ("GroupNorm", _norm),
    ("RMSNorm", _norm), ("Linear", _linear), ("Embedding", _embedding), ("_ConvNd", _conv),
)  # fmt: skip
# By a word in the class's name, in this order.
_SORTS: tuple[tuple[str, Callable[[nn.Module, str], Words]], ...] = (
    ("block", _block),
    ("layernorm", lambda module, _: _norm(module)),
    ("rmsnorm", lambda module, _: _norm(module)),
    ("attention", lambda module, _: Words("Self-attention", _heads(module), "attention")),
    ("mlp", lambda module, _: _mlp(module)),
    ("embed", lambda _, kind: Words(spoken(kind), "", "embed")),
    ("layer", _block),
    ("downsample", lambda _, kind: Words(spoken(kind), "", "conv")),
    ("upsample", lambda _, kind: Words(spoken(kind), "", "conv")),
)
