"""Published text-to-image weights: files of LLM2DiT and of latent Fashion-MNIST diffusion.

They are read as a configuration and weights under fastdiff's names. Neither file says how many heads attention has:
they are those of the published models where nobody says otherwise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import reason_of
from fastdiff.models.dit_config import DiTConfig, preset_config
from fastdiff.models.weights import read_tensors, state_of, without_prefix
from fastdiff.nn.mlp import swiglu_width
from fastdiff.nn.q_former import QFormerConfig

LLM2DIT_ANCHOR, FMNIST_ANCHOR = "init_conv_seq.0.weight", "patch_unembed.linear.weight"
_OWNER = "LLM2DiT or latent Fashion-MNIST diffusion"


class Renamed:
    """A state dict whose tensors move to other names; what is left over keeps its own, so that it is refused."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.left, self.found = dict(state), {}

    def move(self, source: str, target: str) -> None:
        """A module's weight, and its bias where it has one."""
        self.found[f"{target}.weight"] = self.left.pop(f"{source}.weight")
        if f"{source}.bias" in self.left:
            self.found[f"{target}.bias"] = self.left.pop(f"{source}.bias")

    def join(self, sources: list[str], target: str) -> None:
        """The weights of several layers as those of one, and so their biases."""
        for kind in ("weight", "bias"):
            if f"{sources[0]}.{kind}" in self.left:
                self.found[f"{target}.{kind}"] = torch.cat([self.left.pop(f"{each}.{kind}") for each in sources])

    def result(self) -> dict[str, Tensor]:
        return self.found | self.left


def read_published(path: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of a `TextToImageConfig`, and weights, of a file.

    Raises FileNotFoundError where there is none, ValueError naming the file where it is another model's.
    """
    state = without_prefix(state_of(read_tensors(path, _OWNER), path), LLM2DIT_ANCHOR, FMNIST_ANCHOR)
    try:
        if LLM2DIT_ANCHOR in state:
            return _llm2dit(state, overrides)
        return _fmnist_t2i(state, overrides)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        names = ", ".join([*state][:2])
        problem = f"not a checkpoint of {_OWNER} ({len(state)} tensors: {names}, …)"
        raise ValueError(f"{path}: {problem}: {reason_of(error)}") from error


def dit_llama(state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> tuple[DiTConfig, dict[str, Tensor]]:
    """LLM2DiT's DiT_Llama: the tensors of its DiT under our names, and what is left over under its own.

    Its rotary positions pair neighbouring channels of a head, ours the first half with the second. The rows of queries
    and keys are put into that order; the norm over the whole width does not see it.
    """
    width, inner = state["x_embedder.weight"].shape
    channels, depth = state["init_conv_seq.0.weight"].shape[1], _count(state, "layers.")
    patch = int((2 * inner // width) ** 0.5)
    config = preset_config(
        "llm2dit",
        **{
            "input_size": 32, "patch_size": patch, "in_channels": channels, "hidden_size": width, "depth": depth,
            "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1, **overrides,
        },
    )  # fmt: skip
    if config.mlp_hidden_size != len(state["layers.0.feed_forward.w1.weight"]):
        raise ValueError(f"its SwiGLU is {len(state['layers.0.feed_forward.w1.weight'])} wide; expected "
                         f"{swiglu_width(width)}")  # fmt: skip
    renamed = Renamed(state)
    for index in (0, 2, 3, 5):
        renamed.move(f"init_conv_seq.{index}", f"stem.{index}")
    renamed.move("x_embedder", "x_embedder.proj")
    patches = renamed.found["x_embedder.proj.weight"]
    renamed.found["x_embedder.proj.weight"] = patches.view(width, width // 2, patch, patch)
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table", "final_layer.linear",
                 "final_layer.adaLN_modulation.1"):  # fmt: skip
        renamed.move(name, name)
    for index in range(depth):
        theirs, ours = f"layers.{index}", f"blocks.{index}"
        _reorder_heads(renamed.left, f"{theirs}.attention", config.num_heads)
        _move_attention(renamed, f"{theirs}.attention", f"{ours}.attn")
        renamed.move(f"{theirs}.attention_norm", f"{ours}.norm1")
        renamed.move(f"{theirs}.ffn_norm", f"{ours}.norm2")
        renamed.move(f"{theirs}.adaLN_modulation.1", f"{ours}.adaLN_modulation.1")
        _move_swiglu(renamed, f"{theirs}.feed_forward", f"{ours}.mlp")
    return config, renamed.result()


def _llm2dit(state: dict[str, Tensor], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, renamed = dit_llama(state, overrides)
    first = "query_embedder.blocks.0."
    if f"{first}cross_attn.wk.weight" not in renamed:
        raise ValueError("it has no Q-Former (query_embedder): read it as a DiT")
    queries, width = renamed["query_embedder.query_table.weight"].shape
    text_dim = renamed[f"{first}cross_attn.wk.weight"].shape[1]
    depth = _count(state, "query_embedder.blocks.")
    heads = max(1, min(config.num_heads, 8))
    q_former = QFormerConfig(hidden_size=width, num_queries=queries, depth=depth, num_heads=heads)
    theirs = Renamed({name: t for name, t in renamed.items() if name.startswith("query_embedder.")})
    theirs.move("query_embedder.query_table", "q_former.queries")
    theirs.move("query_embedder.output_proj", "q_former.output_proj")
    theirs.move("query_embedder.query_to_layer", "q_former.query_to_layer")
    for index in range(depth):
        source, target = f"query_embedder.blocks.{index}", f"q_former.blocks.{index}"
        _move_attention(theirs, f"{source}.self_attn", f"{target}.self_attn")
        for name in ("attn_norm", "cross_norm", "ffn_norm"):
            theirs.move(f"{source}.{name}", f"{target}.{name}")
        for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm"):
            theirs.move(f"{source}.cross_attn.{name}", f"{target}.cross_attn.{name}")
        _move_swiglu(theirs, f"{source}.ffn", f"{target}.ffn")
    dit = {f"dit.{name}": t for name, t in renamed.items() if not name.startswith("query_embedder.")}
    fields = {"dit": config, "text_dim": text_dim, "conditioning": "q_former", "q_former": q_former,
              "text_dropout_prob": 0.0}  # fmt: skip
    return fields, dit | theirs.result()


def _fmnist_t2i(state: dict[str, Tensor], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    packed = "blocks.0.attn1.in_proj_weight" in state  # torch's MultiheadAttention, which it has without flash-attn
    depth, tokens = _count(state, "blocks."), state["pos_embed"].shape[1]
    config = preset_config(
        "fmnist_t2i",
        **{
            "input_size": patch * int(tokens**0.5), "patch_size": patch, "in_channels": channels, "hidden_size": width,
            "depth": depth, "num_heads": max(1, width // 64), "qkv_bias": packed, "attention_out_bias": packed,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
            "frequency_embedding_size": state["time_embed.1.weight"].shape[1], **overrides,
        },
    )  # fmt: skip
    renamed = Renamed(state)
    for unused in ("null_token", "time_embed.0.frequencies"):
        renamed.left.pop(unused, None)
    renamed.move("patch_embed.proj", "dit.x_embedder.proj")
    renamed.found["dit.pos_embed"] = renamed.left.pop("pos_embed")
    renamed.move("time_embed.1", "dit.t_embedder.mlp.0")
    renamed.move("time_embed.3", "dit.t_embedder.mlp.2")
    renamed.move("context_norm", "dit.context_norm")
    renamed.move("patch_unembed.linear", "dit.final_layer.linear")
    for kind in ("weight", "bias"):  # theirs are by channel, then place in the patch
        name = f"dit.final_layer.linear.{kind}"
        rows = renamed.found[name].unflatten(0, (channels, patch * patch))
        renamed.found[name] = rows.transpose(0, 1).flatten(0, 1)
    for index in range(depth):
        theirs, ours = f"blocks.{index}", f"dit.blocks.{index}"
        for number in (1, 2, 3):
            renamed.move(f"{theirs}.norm{number}", f"{ours}.norm{number}")
        _move_public_attention(renamed, theirs, ours, packed)
        renamed.move(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1")
        renamed.move(f"{theirs}.mlp.dw", f"{ours}.mlp.conv")
        renamed.move(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")
    fields = {"dit": config, "conditioning": "cross_attention", "text_dropout_prob": 0.1}
    if "text_embed.weight" in renamed.left:  # a table of class vectors: what one-hot states are multiplied with
        table = renamed.left.pop("text_embed.weight")
        renamed.found["text_proj.0.weight"] = table.t().contiguous()
        renamed.move("text_proj", "text_proj.1")
        fields |= {"text_dim": len(table), "text_embedding_dim": table.shape[1]}
    else:
        renamed.move("text_proj", "text_proj")
        fields |= {"text_dim": renamed.found["text_proj.weight"].shape[1]}
    return fields, renamed.result()


def _move_public_attention(renamed: Renamed, theirs: str, ours: str, packed: bool) -> None:
    """Self-attention `attn1` and cross-attention `attn2`, of flash-attn's layers or of MultiheadAttention."""
    if not packed:
        renamed.join([f"{theirs}.attn1.{letter}_proj" for letter in "qkv"], f"{ours}.attn.qkv")
        for letter in "qkv":
            renamed.move(f"{theirs}.attn2.{letter}_proj", f"{ours}.cross_attn.w{letter}")
    else:
        for kind in ("weight", "bias"):
            renamed.found[f"{ours}.attn.qkv.{kind}"] = renamed.left.pop(f"{theirs}.attn1.in_proj_{kind}")
            parts = renamed.left.pop(f"{theirs}.attn2.in_proj_{kind}").chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                renamed.found[f"{ours}.cross_attn.w{letter}.{kind}"] = part.contiguous()
    renamed.move(f"{theirs}.attn1.out_proj", f"{ours}.attn.proj")
    renamed.move(f"{theirs}.attn2.out_proj", f"{ours}.cross_attn.wo")


def _move_attention(renamed: Renamed, theirs: str, ours: str) -> None:
    renamed.join([f"{theirs}.w{letter}" for letter in "qkv"], f"{ours}.qkv")
    renamed.move(f"{theirs}.wo", f"{ours}.proj")
    renamed.move(f"{theirs}.q_norm", f"{ours}.q_norm")
    renamed.move(f"{theirs}.k_norm", f"{ours}.k_norm")


def _move_swiglu(renamed: Renamed, theirs: str, ours: str) -> None:
    for source, target in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        renamed.move(f"{theirs}.{source}", f"{ours}.{target}")


def _reorder_heads(state: dict[str, Tensor], attention: str, heads: int) -> None:
    for name in ("wq.weight", "wk.weight", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
        rows = state[f"{attention}.{name}"]
        pairs = rows.unflatten(0, (heads, -1, 2))  # [H, d / 2, 2, …] -> [H, 2, d / 2, …]
        state[f"{attention}.{name}"] = pairs.transpose(1, 2).reshape(rows.shape).contiguous()


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are: their numbers follow `prefix`."""
    numbers = (name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix))
    return 1 + max(int(number) for number in numbers)
